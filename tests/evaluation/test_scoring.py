"""Metrics on labelled rows against plain computations, their shares of fine-tuned by hand, and what is refused."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from nsc.adapters.lora import read_adapter
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.data.labelled import Labelled, read_labelled
from nsc.errors import DataError, NSCError
from nsc.evaluation.metrics import METRICS, normalised
from nsc.evaluation.scoring import exams_of
from tests.tiny import WORDS, save_image_base

TEXTS = [" ".join(WORDS[(5 * i + j) % 60] for j in range(2 + 3 * i)) for i in range(5)]


@pytest.fixture(scope="module")
def model(base):
    return loading.load_body(Base(str(base)), "float32", "cpu")


@pytest.fixture
def adapter(adapters):
    """One with a head of so many outputs, or with none."""

    def build(outputs=None):
        read = read_adapter(adapters["plain"], "task")
        generator = torch.Generator().manual_seed(0)
        head = {} if outputs is None else {"score.weight": torch.randn(outputs, 32, generator=generator)}
        read.saved.clear()
        read.saved.update(head)
        return read

    return build


def exam(base, model, adapter, labels, metric=None, texts=TEXTS):
    metrics = {"task": metric} if metric else {}
    rows = {"task": Labelled(list(texts), list(labels))}
    return exams_of(Base(str(base), model), {"task": adapter}, rows, 64, metrics)["task"]


def last_states(base, model, texts=TEXTS):
    """(n, d): each text alone through the model."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text)["input_ids"]]))[0][:, -1] for text in texts])


def test_classes_are_scored_at_the_last_token(base, model, adapter):
    head, labels = adapter(3), [0, 1, 2, 1, 0]
    found = exam(base, model, head, labels)
    logits = last_states(base, model) @ head.saved["score.weight"].T
    assert found.metric == "accuracy" and found.higher
    assert found.score(model) == pytest.approx((logits.argmax(1) == torch.tensor(labels)).double().mean().item())
    assert found.loss(model) == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item(), abs=1e-6)


def test_numbers_are_scored_by_every_metric_of_numbers(base, model, adapter):
    head, labels = adapter(1), [0.5, -1.0, 2.0, 0.1, 0.3]
    said = (last_states(base, model) @ head.saved["score.weight"].T)[:, 0].double()
    true = torch.tensor(labels, dtype=torch.float64)
    ranks = [x.argsort().argsort().double() for x in (said, true)]
    expected = {
        "pearson": torch.corrcoef(torch.stack((said, true)))[0, 1],
        "spearman": torch.corrcoef(torch.stack(ranks))[0, 1],
        "rmse": (said - true).square().mean().sqrt(),
        "mae": (said - true).abs().mean(),
        "loss": (said - true).square().mean(),
    }
    for metric, value in expected.items():
        assert exam(base, model, head, labels, metric).score(model) == pytest.approx(value.item(), rel=1e-6, abs=1e-5)
    assert exam(base, model, head, labels).metric == "pearson"
    assert [metric for metric in METRICS if not METRICS[metric].higher] == ["rmse", "mae", "loss", "perplexity"]


def test_answers_are_scored_by_the_loss_of_their_own_tokens(base, model, adapter):
    whole = transformers.AutoModelForCausalLM.from_pretrained(base)
    answers = ["word3", "word5 word6 word7", "word1 word1", "word9", "word2"]
    losses = []
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for text, answer in zip(TEXTS, answers, strict=True):
        prompt, said = (tokenizer(x, add_special_tokens=False)["input_ids"] for x in (text, answer))
        with torch.no_grad():
            logits = whole(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        losses.append(F.cross_entropy(logits, torch.tensor(said), reduction="none"))
    expected = torch.cat(losses).mean().item()
    found = exam(base, model, adapter(), answers)
    assert found.metric == "loss" and not found.higher
    assert found.score(model) == pytest.approx(expected, abs=1e-5)
    assert exam(base, model, adapter(), answers, "perplexity").score(model) == pytest.approx(
        math.exp(expected), rel=1e-5
    )


def test_images_are_scored_as_their_class_pools_them(tmp_path, adapter):
    pillow, parquet = pytest.importorskip("PIL.Image"), pytest.importorskip("pyarrow.parquet")
    import io

    import pyarrow

    base, rows, pictures = save_image_base(tmp_path / "base"), [], []
    for i in range(4):
        pixels = torch.randint(256, (9, 9 + i, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        pictures.append(pillow.fromarray(pixels.numpy()))
        pictures[-1].save(buffer := io.BytesIO(), format="PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "label": i % 2})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "test.parquet")
    labelled = read_labelled(Base(str(base)), tmp_path / "test.parquet")
    assert labelled.labels == [0, 1, 0, 1]
    body, head = loading.load_body(Base(str(base)), "float32", "cpu"), adapter(2)
    head = replace(head, saved={"classifier.weight": head.saved["score.weight"], "classifier.bias": torch.zeros(2)})
    found = exams_of(Base(str(base), body), {"task": head}, {"task": labelled}, 64)["task"]
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    with torch.no_grad():
        states = torch.cat(
            [body(processor(images=[p], return_tensors="pt")["pixel_values"])[0][:, 0] for p in pictures]
        )
    logits = states @ head.saved["classifier.weight"].T
    labels = torch.tensor(labelled.labels)
    assert found.score(body) == (logits.argmax(1) == labels).double().mean().item()
    assert found.loss(body) == pytest.approx(F.cross_entropy(logits, labels).item(), abs=1e-6)


def test_shares_of_fine_tuned_by_hand():
    assert normalised(0.6, 0.8, higher=True) == (pytest.approx(75), "")
    assert normalised(0.9, 0.8, higher=True) == (pytest.approx(112.5), "")
    assert normalised(-0.2, 0.8, higher=True) == (pytest.approx(-25), "")  # a correlation the wrong way round
    assert normalised(2.0, 0.5, higher=False) == (pytest.approx(25), "")
    assert normalised(0.4, 0.5, higher=False) == (pytest.approx(125), "")


@pytest.mark.parametrize(
    "score, alone, higher, why",
    [
        (0.5, 0.0, True, "alone reaches 0"),
        (0.5, -0.3, True, "alone reaches -0.3"),
        (0.0, 0.5, False, "is 0"),
        (math.nan, 0.5, True, "not defined"),
        (0.5, math.nan, True, "not defined"),
        (math.inf, 0.5, False, "not defined"),
    ],
)
def test_where_there_is_no_share_there_is_a_reason(score, alone, higher, why):
    share, reason = normalised(score, alone, higher)
    assert math.isnan(share) and why in reason


def test_a_constant_has_no_correlation(base, model, adapter):
    head = adapter(1)
    head.saved["score.weight"].zero_()
    assert math.isnan(exam(base, model, head, [0.5, -1.0, 2.0, 0.1, 0.3], "pearson").score(model))


def test_labels_are_read_by_their_usual_names_or_by_those_given(base, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(
            json.dumps(r) + "\n"
            for r in (
                {"text": "word1", "a": "word2", "label": 1, "mark": 0.5},
                {"text": "word3", "a": "word4", "label": 0, "mark": 1.5},
            )
        )
    )
    assert read_labelled(Base(str(base)), file) == (["word1", "word3"], [1, 0])
    assert read_labelled(Base(str(base)), f"{file}#text+a:mark") == (["word1\nword2", "word3\nword4"], [0.5, 1.5])
    assert read_labelled(Base(str(base)), f"{file}#:mark").labels == [0.5, 1.5]
    assert read_labelled(Base(str(base)), f"{file}#a") == (["word2", "word4"], [1, 0])
    assert read_labelled(Base(str(base)), [("word1", 1)]) == (["word1"], [1])
    with pytest.raises(DataError, match=r"line 1 has no grade"):
        read_labelled(Base(str(base)), f"{file}#text:grade")
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_labelled(Base(str(base)), tmp_path / "absent.jsonl")
    file.write_text('{"text": "word1"}\n')
    with pytest.raises(DataError, match=r"line 1 has no label"):
        read_labelled(Base(str(base)), file)


@pytest.mark.parametrize(
    "outputs, labels, metric, why",
    [
        (3, [0, 1, 3, 0, 0], None, "row 3: class 3, but the head has 3"),
        (3, [0, 1, 0.5, 0, 0], None, "row 3: class 0.5"),
        (3, ["yes"] * 5, None, "'yes' is not a number"),
        (None, [1] * 5, None, "answer 1 is not a text"),
        (3, [0] * 5, "pearson", "pearson does not fit a head with 3"),
        (1, [0.0] * 5, "accuracy", "head with 1 outputs"),
        (None, ["word1"] * 5, "accuracy", "needs an adapter with a head"),
        (3, [0] * 5, "f2", "unknown metric f2"),
        (None, ["word1", "  "] + ["word1"] * 3, None, "row 2: the answer has no token"),
    ],
)
def test_what_does_not_go_together_is_refused(base, model, adapter, outputs, labels, metric, why):
    with pytest.raises(NSCError, match=why):
        exam(base, model, adapter(outputs), labels, metric)


def test_without_torchmetrics_the_extra_is_named(base, model, adapter, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchmetrics"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    with pytest.raises(NSCError, match=r"nsc-merging\[compare\]"):
        exam(base, model, adapter(3), [0] * 5)
    assert exam(base, model, adapter(3), [0] * 5, "loss").score(model) > 0
