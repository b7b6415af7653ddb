"""The pieces of examples/vlm.py on a tiny model and images made here; easy-VQA itself is not needed."""

import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

from tests.tiny import VISION, save_base

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import easyvqa
import vlm
import vlm_base
from easyvqa import Row, Scene

import nsc

PROMPT = "word0 word1"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"{i}.png" for i in range(8)]
    for i, path in enumerate(paths):
        picture = Image.new("RGB", (64, 64), "white")
        corner = (4 + 36 * (i % 2), 4 + 36 * (i // 2 % 2))
        ImageDraw.Draw(picture).rectangle((*corner, corner[0] + 20, corner[1] + 20), ["red", "blue"][i // 4])
        picture.save(path)
    return paths


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A LLaVA of two of four random blocks, saved as the example saves its own."""
    folder = tmp_path_factory.mktemp("vlm")
    torch.manual_seed(0)
    model, processor = vlm_base.assemble(save_base(folder / "llama"), (0, 3), VISION)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def rows(images):
    return [Row(image, PROMPT, f"word{2 + i} word{9 - i}") for i, image in enumerate(images)]


@pytest.fixture(scope="module")
def adapters(base, rows, tmp_path_factory):
    """Two adapters trained for a few steps on different answers."""
    out = tmp_path_factory.mktemp("adapters")
    for seed, task in enumerate(("first", "second")):
        torch.manual_seed(seed)
        model, processor = vlm.load_vlm(base, torch.float32)
        model = vlm.add_lora(model, r=4)
        trained = [p for p in model.parameters() if p.requires_grad]
        vlm_base.fit(model, processor, trained, rows[4 * seed : 4 * seed + 4], 4, 1e-2, task, batch_size=2)
        model.save_pretrained(out / task, save_embedding_layers=False)
    return {task: out / task for task in ("first", "second")}


def test_the_kept_blocks_are_those_of_the_language_model(base):
    kept = dict(vlm.load_vlm(base, torch.float32)[0].get_decoder().named_parameters())
    whole = load_file(base.parent / "llama/model.safetensors")
    for name in ("self_attn.q_proj.weight", "mlp.up_proj.weight"):
        assert torch.equal(kept[f"layers.1.{name}"], whole[f"model.layers.3.{name}"])
    assert torch.equal(kept["embed_tokens.weight"][:-1], whole["model.embed_tokens.weight"])


def test_an_answer_counts_as_right_where_greedy_decoding_gives_it(base, rows, monkeypatch):
    monkeypatch.setattr(vlm_base, "END", "")
    model, processor = vlm.load_vlm(base, torch.float32)
    model.get_output_embeddings().weight.data[[0, 1, 2, 3, -1]] = 0  # special tokens: a second <image> were no answer
    own = []
    for row in rows:
        text = vlm_base.question(processor, row.prompt)
        inputs = processor(text=text, images=Image.open(row.image), return_tensors="pt")
        inputs.pop("token_type_ids", None)  # of older tokenizers
        ids = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -3:]
        own.append(Row(row.image, row.prompt, processor.tokenizer.decode(ids)))
    assert vlm.accuracy(model, processor, own, batch_size=3) == 1
    wrong = [Row(row.image, row.prompt, f"{row.answer.rsplit(' ', 1)[0]} word59") for row in own[:4]]
    assert vlm.accuracy(model, processor, wrong + own[4:]) == 0.5


def test_training_moves_what_it_is_given_and_nothing_else(base, adapters):
    tensors = load_file(adapters["first"] / "adapter_model.safetensors")
    assert {name.split(".")[-2] for name in tensors} == {"lora_A", "lora_B", "linear_1", "linear_2"}
    assert not any("vision" in name for name in tensors)
    assert len([name for name in tensors if "lora_B" in name]) == 4
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
    before = dict(vlm.load_vlm(base, torch.float32)[0].named_parameters())
    names = [name for name in tensors if "multi_modal_projector" in name]
    assert len(names) == 4
    assert all(not torch.equal(tensors[n], before[n.removeprefix("base_model.model.")]) for n in names)


def test_the_plain_sum_of_one_adapter_is_that_adapter(base, adapters, rows):
    model, processor = vlm.load_vlm(base, torch.float32)
    summed = vlm.add_scaled(model, {"first": adapters["first"]}, 1.0)
    peft = vlm.PeftModel.from_pretrained(vlm.load_vlm(base, torch.float32)[0], adapters["first"]).eval()
    with torch.no_grad():
        (ours, _), (theirs, _) = (vlm_base.answer_logits(m, processor, rows) for m in (summed, peft))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_plain_sums_are_linear_in_the_scale(base, adapters):
    sums = [
        dict(vlm.add_scaled(vlm.load_vlm(base, torch.float64)[0], adapters, s).named_parameters()) for s in (0, 1, 2)
    ]
    moved = 0
    for name, start in sums[0].items():
        torch.testing.assert_close(sums[2][name] - start, 2 * (sums[1][name] - start), rtol=1e-6, atol=1e-12)
        moved += not torch.equal(sums[1][name], start)
    assert moved == 8  # q_proj and v_proj of two blocks, weight and bias of the two linears of the projector


def test_the_tower_learns_from_the_scenes_alone(images, base, monkeypatch, capsys):
    kinds = [("red", "blue")[i // 4] for i in range(8)]
    shown = [Scene(image, kinds[i], "rectangle", easyvqa.PLACES[i % 4]) for i, image in enumerate(images)]
    monkeypatch.setattr(vlm_base, "scenes", lambda part: shown)
    torch.manual_seed(0)
    model, processor = vlm.load_vlm(base, torch.float32)
    tower = vlm_base.tower_of(model).requires_grad_(True)
    vlm_base.train_tower(tower, processor, steps=100, batch_size=8)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[1] < losses[0] / 2


def test_questions_become_tasks(tmp_path, images, monkeypatch):
    folder = tmp_path / "train"
    (folder / "images").mkdir(parents=True)
    for path in images[:3]:
        (folder / "images" / path.name).write_bytes(path.read_bytes())
    questions = [
        ["what color is the shape?", "red", 0],
        ["what shape is present?", "rectangle", 0],
        ["is there a red shape?", "yes", 0],
        ["is there a circle?", "no", 0],
        ["is there not a circle?", "yes", 0],
        ["what is the red shape?", "rectangle", 1],
        ["is a rectangle present?", "yes", 1],
        ["is there a blue shape?", "no", 1],
        ["is there no circle?", "yes", 2],
    ]
    (folder / "questions.json").write_text(json.dumps(questions))
    monkeypatch.setattr(easyvqa, "_folder", lambda: tmp_path)
    easyvqa.scenes.cache_clear()
    answers = {task: sorted(row.answer for row in easyvqa.load(task, "train")) for task in easyvqa.TASKS}
    easyvqa.scenes.cache_clear()
    assert answers == {
        "color": ["red"],
        "shape": ["rectangle", "rectangle"],
        "presence": ["no", "no", "yes", "yes"],
        "caption": ["a red rectangle at the top left", "a red rectangle at the top right"],
    }
    rows = [
        json.loads(line) for line in easyvqa.write_unlabelled("color", tmp_path / "c.jsonl", 9).read_text().splitlines()
    ]
    assert rows == [{"image": str(folder / "images/0.png"), "prompt": "what color is the shape?"}]


def test_the_table_holds_a_merge_and_keeps_its_scores(base, adapters, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(vlm, "SCALES", (0.4, 1))
    monkeypatch.setattr(vlm, "load", lambda task, part: rows)
    monkeypatch.setattr(easyvqa, "load", lambda task, part: rows)
    data = {task: easyvqa.write_unlabelled(task, tmp_path / f"{task}.jsonl", 4) for task in adapters}
    result = nsc.merge(base, adapters, data, steps=2, batch_size=1, progress=False)
    result.save(tmp_path / "merged")
    taken = []
    monkeypatch.setattr(vlm, "accuracy", lambda model, processor, rows: taken.append(rows) or 0.5)
    tables = [vlm.compare(base, adapters, {"NSC": tmp_path / "merged"}, tmp_path / "scores.json") for _ in range(2)]
    assert len(taken) == 2 * 5 + 2  # the second time only the merge's
    assert tables[0] == tables[1]
    assert tables[0].split("\n")[0].split() == ["task", "metric", "fine-tuned", "base", "sum", "x", "0.4", "NSC"]
