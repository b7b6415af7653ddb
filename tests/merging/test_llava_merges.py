"""LLaVA from prompts to proof: its own forward and processor to the bit, every file again, and the same text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from typer.testing import CliRunner

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading, structure
from nsc.bases.base_model import Base
from nsc.bases.image_tower import ImageTower
from nsc.bases.llava import ImageTextBody, places
from nsc.cli import app
from nsc.data.image_text import Prompt, read_prompts
from nsc.data.images import pixels_by
from nsc.data.prompt_writer import Writer
from nsc.errors import NSCError
from nsc.runtime import cuda_graphs
from tests.tape import TapeRecorder
from tests.tiny import llava_prefixes, peft_adapter, random_factors, rewrite, write_adapter

OLD = transformers.__version__.startswith("4.")
TEXT, PROJECTOR = llava_prefixes()
BODY = "language_model.model.layers" if OLD else "language_model.layers"
PATCHES, IMAGE = 4, 64


@pytest.fixture(scope="module")
def result(llava, llava_adapters, questions) -> nsc.MergeResult:
    return nsc.merge(llava, llava_adapters, questions, steps=5, lr=0.02, progress=False)


def stock_inputs(base: Path, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What the base's own processor makes of a prompt."""
    processor = loading.load_processor(Base(str(base)))
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(images=[prompt.image.decode()], text=[text], return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_values_of_the_models_own_forward_and_processor_to_the_bit(llava, questions, dtype):
    body = loading.load_body(Base(str(llava)), dtype)
    assert isinstance(body, ImageTextBody)
    stock = body.__dict__["stock"]
    processor = loading.load_processor(Base(str(llava)))
    writer = Writer(processor, body.image_token, PATCHES, 100)
    for prompt in read_prompts(questions["count"]):
        own = stock_inputs(llava, prompt)
        ids = torch.tensor([writer.ids(prompt)])
        assert torch.equal(ids, own["input_ids"])
        pixels = pixels_by(processor.image_processor, next(body.parameters()).dtype)(prompt.image)[None]
        features = ImageTower(body).features(pixels)[:, 1:]
        with torch.no_grad():
            found = body(ids, features[None], places(ids == IMAGE))[0]
            expected = stock(input_ids=ids, pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(found, expected)


def test_the_command_line_from_prompts_to_proof(llava, llava_adapters, questions, tmp_path):
    words = ["merge", "--base", str(llava), "--steps", "5", "--lr", "0.02", "--out", str(tmp_path / "out")]
    for task in llava_adapters:
        words += ["--adapter", f"{task}={llava_adapters[task]}", "--data", f"{task}={questions[task]}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "fine-tuned whole, merged as differences: multi_modal_projector.linear_1" in done.stderr
    assert "proof: adapter: 10 modules reloaded" in done.stdout and "hidden states to" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert "does not load such modules_to_save, here multi_modal_projector.linear_1" in card and "--full" in card
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert "multi_modal_projector.linear_1 (plain)" in report["absent"]
    for full in ([], ["--full"]):
        again = CliRunner().invoke(
            app, ["apply", str(tmp_path / "out"), "--out", str(tmp_path / f"again{len(full)}"), *full]
        )
        assert again.exit_code == 0, again.stderr
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again0"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    assert "modules_to_save" not in (tmp_path / "again1/README.md").read_text()


def test_the_projector_learns_and_an_absent_task_stays(result):
    rows = [result.modules.index(f"multi_modal_projector.linear_{i}") for i in (1, 2)]
    assert rows == [0, 1] and all(name.startswith(BODY) for name in result.modules[2:])
    moved = (result.coefficients[rows] - 0.4).abs()
    assert (moved[:, :2] > 1e-3).all() and (moved[:, 2] == 0).all()


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_the_written_merge_generates_the_same_text(llava, result, questions, tmp_path, full):
    import peft

    auto = transformers.AutoModelForImageTextToText
    proof = result.save(tmp_path / "out", full=full)
    assert proof.outputs < 1e-5 < 1e-3 < proof.effect
    in_memory = auto.from_pretrained(llava).eval()
    bare = auto.from_pretrained(llava).eval()
    if full:
        written = auto.from_pretrained(tmp_path / "out").eval()
    else:
        written = peft.PeftModel.from_pretrained(auto.from_pretrained(llava), tmp_path / "out").eval()
    told, others = [], []
    for prompt in [p for file in questions.values() for p in read_prompts(file)]:
        own = stock_inputs(llava, prompt)
        with merged_layers(in_memory if OLD else in_memory.model, result.stack, result.coefficients):
            expected = in_memory.generate(**own, do_sample=False, max_new_tokens=8)
        assert torch.equal(written.generate(**own, do_sample=False, max_new_tokens=8), expected)
        told.append(expected)
        others.append(bare.generate(**own, do_sample=False, max_new_tokens=8))
    assert not all(torch.equal(a, b) for a, b in zip(told, others, strict=True))


def test_an_adapter_with_the_other_transformers_names_is_the_same(llava, llava_adapters, questions, result, tmp_path):
    """Before and after 4.52 moved the language model and the projector into ``model``."""
    before = (("language_model.model.", "model.language_model."), ("multi_modal_", "model.multi_modal_"))
    renames = before if OLD else [(new, old) for old, new in before]

    def other(name: str) -> str:
        for own, theirs in renames:
            name = name.replace(own, theirs)
        return name

    folder = Path(shutil.copytree(llava_adapters["count"], tmp_path / "count"))
    rewrite(folder / "adapter_model.safetensors", lambda t: [t.update({other(k): t.pop(k)}) for k in list(t)])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {key: list(map(other, config[key])) for key in ("target_modules", "modules_to_save")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mixed = nsc.merge(llava, llava_adapters | {"count": folder}, questions, steps=5, lr=0.02, progress=False)
    assert torch.equal(mixed.coefficients, result.coefficients)
    assert mixed.save(tmp_path / "out").outputs < 1e-5
    assert nsc.apply(tmp_path / "out").modules == result.modules


def test_a_truncated_merge_is_proven_with_its_projector(result, tmp_path):
    assert result.save(tmp_path / "out", rank=3).outputs < 1e-4


def test_a_projector_that_each_task_keeps(llava, llava_adapters, questions, tmp_path):
    kept = nsc.merge(
        llava, llava_adapters, questions, steps=1, progress=False, keep_modules=["multi_modal_projector.linear_1"]
    )
    assert list(kept.stack.dense) == ["multi_modal_projector.linear_2"]
    kept.save(tmp_path / "out")
    heads = load_file(tmp_path / "out/heads/count.safetensors")
    assert sorted(heads) == [f"{PROJECTOR}.linear_1.bias", f"{PROJECTOR}.linear_1.weight"]
    assert not (tmp_path / "out/heads/plain.safetensors").exists()
    again = nsc.apply(tmp_path / "out")
    assert again.modules == kept.modules and list(again.stack.dense) == list(kept.stack.dense)


def test_lora_in_the_tower_is_refused(llava, llava_adapters, questions, tmp_path):
    shapes = structure.linear_shapes(loading.load_body(Base(str(llava))))
    inside = next(n for n in shapes if n.startswith("vision_tower"))
    name = inside if OLD else f"model.{inside}"
    factors = {name: random_factors([name])[name], f"{TEXT}.3.self_attn.v_proj": random_factors(["v"], m=16)["v"]}
    adapter = write_adapter(tmp_path / "a", factors, target_modules=sorted(factors))
    with pytest.raises(NSCError, match=r"vision_tower.*features are made once and kept"):
        nsc.merge(llava, {"count": adapter}, {"count": questions["count"]}, progress=False)


def test_steps_can_be_recorded(llava, llava_adapters, questions, monkeypatch):
    """On tapes, which refuse to wait for the device as CUDA graphs do."""
    recorders = []
    monkeypatch.setattr(
        cuda_graphs, "CudaRecorder", lambda device: recorders.append(TapeRecorder(device)) or recorders[-1]
    )
    monkeypatch.setattr(cuda_graphs, "obstacle", lambda model: None)
    settings = dict(steps=6, lr=0.02, batch_size=4, dtype="float64", progress=False)  # all samples in each step
    recorded = nsc.merge(llava, llava_adapters, questions, **settings)
    assert len(recorders[0].tapes) >= 2  # the update and a pass
    eager = nsc.merge(llava, llava_adapters, questions, **settings, graphs=False)
    torch.testing.assert_close(recorded.coefficients, eager.coefficients, rtol=0, atol=1e-12)
    assert (eager.coefficients[:2, :2] - 0.4).abs().min() > 1e-3


def test_peft_that_saves_the_projector_as_one_module(llava, questions, tmp_path):
    """And matches targets by the end of their names, but not in the image tower."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(llava)
    text = r".*language_model.*\.(q_proj|v_proj)"
    path = peft_adapter(tmp_path / "a", model, target_modules=text, modules_to_save=["multi_modal_projector"])
    rewrite(path / "adapter_model.safetensors", lambda t: [t[k].mul_(1.5) for k in t if "projector" in k])
    merged = nsc.merge(llava, {"count": path}, {"count": questions["count"]}, steps=1, progress=False)
    assert list(merged.stack.dense) == ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
    assert not merged.adapters["count"].saved and merged.save(tmp_path / "out").outputs < 1e-5


def test_experts_are_matched_by_their_answers_to_images(llava, llava_adapters, questions, tmp_path):
    """The projector that two of them fine-tuned whole takes part; the merge is proven, and repeated byte for byte."""
    result = nsc.merge(
        llava, llava_adapters, questions, method="match", steps=4, lr=0.05, max_new_tokens=3, progress=False
    )
    means = {int(step): sum(values) for step, values in result.report.distances.items()}
    assert means[result.report.kept] == min(means.values()) < means[0]
    result.save(tmp_path / "out")
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
