"""Images with text as rows: of every form, packed as those alone, of either modality; what cannot be fed says why."""

import json

import PIL.Image
import pytest
import torch
import transformers

from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.data.image_text import Prompt, read_prompts
from nsc.data.images import as_image
from nsc.data.modalities import feed_of
from nsc.data.prompt_writer import Writer
from nsc.data.sources import text_of
from nsc.errors import DataError, NSCError
from tests.tiny import save_llava_base

PATCHES, IMAGE = 4, 64
NAMES = {"llava_next": "cuts images in tiles", "qwen2_vl": "has no vision_feature_layer"}


@pytest.mark.parametrize("shares_rows", [True, False])
def test_packed_prompts_are_those_alone(llava, questions, monkeypatch, shares_rows):
    if not shares_rows:
        monkeypatch.setattr("nsc.data.modalities.can_share_rows", lambda model: False)
    body = loading.load_body(Base(str(llava)), "float64")
    prompts = {task: read_prompts(file) for task, file in questions.items()}
    feed = feed_of(Base(str(llava)))
    _, packed = feed.batches(Base(str(llava), body), [], prompts, MergeConfig())
    assert (len(packed) > 1) != shares_rows and (packed[0].segment is not None) == shares_rows
    alone = {}
    for k, rows in enumerate(prompts.values()):
        for prompt in rows:
            _, (batch,) = feed.batches(Base(str(llava), body), [], {"one": [prompt]}, MergeConfig())
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
    body = loading.load_body(Base(str(llava)))
    prompts = {task: read_prompts(file) for task, file in questions.items()}
    _, batches = feed_of(Base(str(llava))).batches(Base(str(llava), body), [], prompts, config)
    for batch in batches:
        image, real = batch.inputs["input_ids"] == IMAGE, batch.segment >= 0
        counts = {"text": real & ~image, "image": image, "both": real}[modality]
        assert torch.equal(batch.weight > 0, counts)
    total = sum(torch.zeros(3).index_add(0, b.task.flatten(), b.weight.flatten()) for b in batches)
    torch.testing.assert_close(total, torch.ones(3))
    shares = {float(w) for b in batches for w in b.weight[b.weight > 0]}
    assert (len(shares) == 1) == (modality == "image")  # every sample weighs the same, whatever its length


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
        ({"photo": {"bytes": "", "path": "x"}, "question": "what"}, "line 1 has the fields photo, question, no image"),
        ({"image": "none.png", "question": "what"}, "line 1 cannot be read"),
        (["what"], "line 1 holds a list"),
    ):
        file.write_text(json.dumps(row))
        with pytest.raises(DataError, match=message):
            read_prompts(file)
    with pytest.raises(DataError, match=r"does not exist; each image with text is read from"):
        read_prompts(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="not the expected text"):
        text_of({"image": 1}, None, "row")


def test_text_is_cut_and_the_image_is_not(llava):
    processor = loading.load_processor(Base(str(llava)))
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
    assert Writer(loading.load_processor(Base(str(base))), IMAGE, 2, 9).ids(Prompt(image, "word5")) == [IMAGE, IMAGE, 9]


@pytest.mark.parametrize(("kind", "why"), NAMES.items())
def test_other_ways_to_feed_images_are_refused_by_name(kind, why, tmp_path):
    transformers.AutoConfig.for_model(kind, image_token_id=5).save_pretrained(tmp_path)
    feed, rows = feed_of(Base(str(tmp_path))), tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "seen"}))
    assert feed.read(rows) == feed.read(["seen"]) == ["seen"]
    rows.write_text(json.dumps({"photo": "cat.jpg", "text": "seen"}))
    with pytest.raises(DataError, match=f"line 1 holds an image in photo, but {kind} {why}.*LLaVA's structure"):
        feed.read(rows)
    with pytest.raises(DataError, match=f"text 1 is a tuple, not a text, but {kind} {why}"):
        feed.read([("cat.jpg", "seen")])


def test_rows_without_images_are_read_as_texts(tmp_path, questions):
    """Of a base that takes images with text, too; but not a row whose image goes by another name."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"question": "what"}) + "\n" + json.dumps("word"))
    assert read_prompts(rows) == read_prompts(["what", "word"]) == ["what", "word"]
    image = next(iter(questions["count"].parent.glob("*.png")))
    for name, message in (("image", "rows with and without an image"), ("photo", "no image; name it first")):
        rows.write_text(json.dumps("word") + "\n" + json.dumps({name: str(image), "text": "what"}))
        with pytest.raises(DataError, match=message):
            read_prompts(rows)


def test_a_model_that_computes_something_else_is_refused(llava, questions):
    body, prompts = loading.load_body(Base(str(llava))), {"count": read_prompts(questions["count"])}
    body.multi_modal_projector = torch.nn.Sequential(body.multi_modal_projector, torch.nn.Tanh())  # not the model's own
    with pytest.raises(NSCError, match="makes something else of its images"):
        feed_of(Base(str(llava))).batches(Base(str(llava), body), [], prompts, MergeConfig())
