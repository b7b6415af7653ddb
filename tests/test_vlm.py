"""LLaVA from prompts to proof: its own forward and processor to the bit, packing, modality, and the same text again."""

import json
import shutil
from pathlib import Path

import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tape import TapeRecorder
from tiny import WORDS, random_factors, rewrite, save_llava_base, write_adapter
from typer.testing import CliRunner

import nsc
from nsc import families, graphs
from nsc.bodies import ImageTextBody
from nsc.cli import app
from nsc.config import MergeConfig
from nsc.data import text_of
from nsc.errors import DataError, NSCError
from nsc.feeds import feed_of
from nsc.images import as_image, pixels_by
from nsc.surgery import merged_layers
from nsc.towers import ImageTower
from nsc.vlm import Prompt, Writer, places, read_prompts

OLD = transformers.__version__.startswith("4.")
TEXT = "language_model.model.layers" if OLD else "model.language_model.layers"
PROJECTOR = "multi_modal_projector" if OLD else "model.multi_modal_projector"
BODY = "language_model.model.layers" if OLD else "language_model.layers"
PATCHES, IMAGE = 4, 64


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    return save_llava_base(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory, llava) -> dict[str, Path]:
    """LoRA on q and v; the projector fine-tuned by two of three."""
    made = {}
    stored = load_file(llava / "model.safetensors")
    for seed, task in enumerate(("count", "color", "plain")):
        generator = seeded(seed)
        saved = {
            f"{PROJECTOR}.{key.split('multi_modal_projector.')[1]}": tensor
            + 0.2 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in stored.items()
            if "multi_modal_projector" in key and task != "plain"
        }
        names = [f"{TEXT}.{i}.self_attn.{kind}" for i in range(4) for kind in ("q_proj", "v_proj")]
        factors = {n: random_factors([n], m=16 if "v_proj" in n else 32, seed=seed)[n] for n in names}
        path = tmp_path_factory.mktemp("adapters") / task
        made[task] = write_adapter(path, factors, alpha=0.4, saved=saved or None, target_modules=names)
    return made


@pytest.fixture(scope="module")
def questions(tmp_path_factory, adapters) -> dict[str, Path]:
    """Three images a task, of different sizes, with questions of different lengths."""
    files = {}
    for k, task in enumerate(adapters):
        folder = tmp_path_factory.mktemp(task)
        rows = []
        for i in range(4):
            pixels = torch.randint(256, (9 + i, 12, 3), dtype=torch.uint8, generator=seeded(9 * k + i))
            PIL.Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
            words = " ".join(WORDS[5 + (7 * k + i + j) % 50] for j in range(1 + 2 * i))
            rows.append({"image": f"{i}.png", "question": words, "answer": "never read"})
        files[task] = folder / "rows.jsonl"
        files[task].write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.fixture(scope="module")
def result(llava, adapters, questions) -> nsc.MergeResult:
    return nsc.merge(llava, adapters, questions, steps=5, lr=0.02, progress=False)


def stock_inputs(base: Path, prompt: Prompt) -> dict[str, torch.Tensor]:
    """What the base's own processor makes of a prompt."""
    processor = families.load_processor(str(base))
    content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    made = processor(images=[prompt.image.decode()], text=[text], return_tensors="pt")
    return {name: made[name] for name in ("input_ids", "attention_mask", "pixel_values")}


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_values_of_the_models_own_forward_and_processor_to_the_bit(llava, questions, dtype):
    body = families.load_body(str(llava), dtype)
    assert isinstance(body, ImageTextBody)
    stock = body.__dict__["stock"]
    processor = families.load_processor(str(llava))
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


@pytest.mark.parametrize("shares_rows", [True, False])
def test_packed_prompts_are_those_alone(llava, questions, monkeypatch, shares_rows):
    if not shares_rows:
        monkeypatch.setattr("nsc.feeds.can_share_rows", lambda model: False)
    body = families.load_body(str(llava), "float64")
    prompts = {task: read_prompts(file) for task, file in questions.items()}
    feed = feed_of(str(llava))
    _, packed = feed.batches(str(llava), body, [], prompts, MergeConfig())
    assert (len(packed) > 1) != shares_rows and (packed[0].segment is not None) == shares_rows
    alone = {}
    for k, rows in enumerate(prompts.values()):
        for prompt in rows:
            _, (batch,) = feed.batches(str(llava), body, [], {"one": [prompt]}, MergeConfig())
            with torch.no_grad():
                alone[k, batch.task.numel()] = body(**batch.arguments(torch.float64))[0][0]
    weight = torch.zeros(3)
    for batch in packed:
        with torch.no_grad():
            states = body(**batch.arguments(torch.float64))[0]
        for r, row in enumerate(batch.weight > 0):
            cuts = (batch.inputs["input_ids"][r] == 5).nonzero().flatten().tolist()  # word1 begins each prompt
            if batch.segment is None:
                cuts = [0]
            ends = [*cuts[1:], int(row.sum())]
            for a, b in zip(cuts, ends, strict=True):
                expected = alone[int(batch.task[r, a]), b - a]
                torch.testing.assert_close(states[r, a:b], expected, rtol=0, atol=1e-5)  # RMSNorm is float32
        weight.index_add_(0, batch.task.flatten(), batch.weight.flatten())
    torch.testing.assert_close(weight, torch.ones(3))


@pytest.mark.parametrize("modality", ["text", "image", "both"])
def test_modality_says_which_positions_count(llava, questions, modality):
    config = MergeConfig()
    object.__setattr__(config, "modality", modality)
    body = families.load_body(str(llava))
    prompts = {task: read_prompts(file) for task, file in questions.items()}
    _, batches = feed_of(str(llava)).batches(str(llava), body, [], prompts, config)
    for batch in batches:
        image, real = batch.inputs["input_ids"] == IMAGE, batch.segment >= 0
        counts = {"text": real & ~image, "image": image, "both": real}[modality]
        assert torch.equal(batch.weight > 0, counts)
    total = sum(torch.zeros(3).index_add(0, b.task.flatten(), b.weight.flatten()) for b in batches)
    torch.testing.assert_close(total, torch.ones(3))
    shares = {float(w) for b in batches for w in b.weight[b.weight > 0]}
    assert (len(shares) == 1) == (modality == "image")  # every sample weighs the same, whatever its length


def test_the_command_line_from_prompts_to_proof(llava, adapters, questions, tmp_path):
    words = ["merge", "--base", str(llava), "--steps", "5", "--lr", "0.02", "--out", str(tmp_path / "out")]
    for task in adapters:
        words += ["--adapter", f"{task}={adapters[task]}", "--data", f"{task}={questions[task]}"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.stderr
    assert "fine-tuned whole, merged as differences: multi_modal_projector.linear_1" in done.stderr
    assert "proof: adapter: 10 modules reloaded" in done.stdout and "hidden states to" in done.stdout
    card = (tmp_path / "out/README.md").read_text()
    assert "does not load modules_to_save, here multi_modal_projector.linear_1" in card and "--full" in card
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


def test_an_adapter_with_the_other_transformers_names_is_the_same(llava, adapters, questions, result, tmp_path):
    """Before and after 4.52 moved the language model and the projector into ``model``."""
    before = (("language_model.model.", "model.language_model."), ("multi_modal_", "model.multi_modal_"))
    renames = before if OLD else [(new, old) for old, new in before]

    def other(name: str) -> str:
        for own, theirs in renames:
            name = name.replace(own, theirs)
        return name

    folder = Path(shutil.copytree(adapters["count"], tmp_path / "count"))
    rewrite(folder / "adapter_model.safetensors", lambda t: [t.update({other(k): t.pop(k)}) for k in list(t)])
    config = json.loads((folder / "adapter_config.json").read_text())
    config |= {key: list(map(other, config[key])) for key in ("target_modules", "modules_to_save")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mixed = nsc.merge(llava, adapters | {"count": folder}, questions, steps=5, lr=0.02, progress=False)
    assert torch.equal(mixed.coefficients, result.coefficients)
    assert mixed.save(tmp_path / "out").outputs < 1e-5
    assert nsc.apply(tmp_path / "out").modules == result.modules


def test_a_truncated_merge_is_proven_with_its_projector(result, tmp_path):
    assert result.save(tmp_path / "out", rank=3).outputs < 1e-4


def test_a_projector_that_each_task_keeps(llava, adapters, questions, tmp_path):
    kept = nsc.merge(
        llava, adapters, questions, steps=1, progress=False, keep_modules=["multi_modal_projector.linear_1"]
    )
    assert list(kept.stack.dense) == ["multi_modal_projector.linear_2"]
    kept.save(tmp_path / "out")
    heads = load_file(tmp_path / "out/heads/count.safetensors")
    assert sorted(heads) == [f"{PROJECTOR}.linear_1.bias", f"{PROJECTOR}.linear_1.weight"]
    assert not (tmp_path / "out/heads/plain.safetensors").exists()
    again = nsc.apply(tmp_path / "out")
    assert again.modules == kept.modules and list(again.stack.dense) == list(kept.stack.dense)


def test_rows_of_every_form_are_the_same_prompts(questions, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [json.loads(line) for line in questions["count"].read_text().splitlines()]
    folder = questions["count"].parent
    stored = [
        {"picture": {"bytes": (folder / r["image"]).read_bytes(), "path": None}, "ask": r["question"]} for r in rows
    ]
    parquet.write_table(arrow.Table.from_pylist(stored), tmp_path / "rows.parquet")
    expected = read_prompts(questions["count"])
    assert [p.text for p in expected] == [r["question"] for r in rows]
    listed = read_prompts([(folder / r["image"], r["question"]) for r in rows])
    for found in (listed, read_prompts(f"{tmp_path / 'rows.parquet'}#picture+ask")):
        assert [p.digest for p in found] == [p.digest for p in expected]


def test_rows_that_cannot_be_read(tmp_path, questions):
    file = tmp_path / "rows.jsonl"
    for row, message in (
        ({"question": "what"}, "row 1 has the fields question, no image"),
        ({"image": "none.png", "question": "what"}, "row 1 cannot be read"),
        (["what"], "row 1 holds a list"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(DataError, match=message):
            read_prompts(file)
    with pytest.raises(DataError, match="takes images with text"):
        read_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="not the expected text"):
        text_of({"image": 1}, None, "row")


def test_text_is_cut_and_the_image_is_not(llava):
    processor = families.load_processor(str(llava))
    image = as_image(PIL.Image.new("RGB", (8, 8)), "black")
    assert Writer(processor, IMAGE, PATCHES, 3).ids(Prompt(image, "word5 word6 word7")) == [
        5,
        *[IMAGE] * PATCHES,
        9,
        10,
    ]
    placed = Prompt(image, "word9 word9 <image> word9")
    assert Writer(processor, IMAGE, PATCHES, 8).ids(placed) == [13, 13, *[IMAGE] * PATCHES, 13]
    with pytest.raises(DataError, match="beyond 1 tokens; raise max_length"):
        Writer(processor, IMAGE, PATCHES, 1).ids(placed)
    with pytest.raises(DataError, match="has 2 images"):
        Writer(processor, IMAGE, PATCHES, 8).ids(Prompt(image, "<image> <image>"))


def test_without_a_template_the_image_comes_first(tmp_path):
    base = save_llava_base(tmp_path / "base", chat_template=None)
    image = as_image(PIL.Image.new("RGB", (8, 8)), "black")
    assert Writer(families.load_processor(str(base)), IMAGE, 2, 9).ids(Prompt(image, "word5")) == [IMAGE, IMAGE, 9]


def test_lora_in_the_tower_is_refused(llava, adapters, questions, tmp_path):
    inside = next(n for n in families.linear_shapes(families.load_body(str(llava))) if n.startswith("vision_tower"))
    name = inside if OLD else f"model.{inside}"
    factors = {name: random_factors([name])[name], f"{TEXT}.3.self_attn.v_proj": random_factors(["v"], m=16)["v"]}
    adapter = write_adapter(tmp_path / "a", factors, target_modules=sorted(factors))
    with pytest.raises(NSCError, match=r"vision_tower.*features are made once and kept"):
        nsc.merge(llava, {"count": adapter}, {"count": questions["count"]}, progress=False)


def test_steps_can_be_recorded(llava, adapters, questions, monkeypatch):
    """On tapes, which refuse to wait for the device as CUDA graphs do."""
    recorders = []
    monkeypatch.setattr(graphs, "CudaRecorder", lambda device: recorders.append(TapeRecorder(device)) or recorders[-1])
    monkeypatch.setattr(graphs, "obstacle", lambda model: None)
    settings = dict(steps=6, lr=0.02, batch_size=4, dtype="float64", progress=False)  # all samples in each step
    recorded = nsc.merge(llava, adapters, questions, **settings)
    assert len(recorders[0].tapes) >= 2  # the update and a pass
    eager = nsc.merge(llava, adapters, questions, **settings, graphs=False)
    torch.testing.assert_close(recorded.coefficients, eager.coefficients, rtol=0, atol=1e-12)
    assert (eager.coefficients[:2, :2] - 0.4).abs().min() > 1e-3


NAMES = {"llava_next": "cuts images in tiles", "qwen2_vl": "has no vision_feature_layer"}


@pytest.mark.parametrize(("kind", "why"), NAMES.items())
def test_other_ways_to_feed_images_are_refused_by_name(kind, why, tmp_path):
    transformers.AutoConfig.for_model(kind, image_token_id=5).save_pretrained(tmp_path)
    with pytest.raises(NSCError, match=f"{kind} {why}.*LLaVA's structure"):
        feed_of(str(tmp_path))


def test_a_model_that_computes_something_else_is_refused(llava, questions):
    body, prompts = families.load_body(str(llava)), {"count": read_prompts(questions["count"])}
    body.multi_modal_projector = torch.nn.Sequential(body.multi_modal_projector, torch.nn.Tanh())  # not the model's own
    with pytest.raises(NSCError, match="makes something else of its images"):
        feed_of(str(llava)).batches(str(llava), body, [], prompts, MergeConfig())
