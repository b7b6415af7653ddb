"""Heads of tasks say what transformers' own classes say, pool as they pool, and are refused where they do not fit."""

import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.task_head import TaskHead, load_task_head
from nsc.errors import NSCError
from tests.tiny import rewrite

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
TEXT = dict(SIZES, vocab_size=64, max_position_embeddings=64)
GROUPED = dict(TEXT, num_key_value_heads=2)
IMAGE = dict(SIZES, image_size=8, patch_size=4)
DISTIL = dict(vocab_size=64, max_position_embeddings=64, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
TEXTS: dict[str, tuple[str, dict[str, Any], str]] = {  # name -> kind of transformers, its config, pooling
    "BERT": ("Bert", TEXT, "first"),
    "RoBERTa": ("Roberta", TEXT, "first"),
    "DistilBERT": ("DistilBert", DISTIL | {"initializer_range": 0.2}, "first"),
    "ModernBERT, mean": ("ModernBert", TEXT | {"classifier_pooling": "mean"}, "mean"),
    "ModernBERT, first": ("ModernBert", TEXT | {"classifier_pooling": "cls"}, "first"),
    "DeBERTa-v2": ("DebertaV2", TEXT, "first"),
    "ELECTRA": ("Electra", TEXT | {"embedding_size": 16}, "first"),
    "ALBERT": ("Albert", TEXT | {"embedding_size": 16}, "first"),
    "LLaMA": ("Llama", GROUPED, "last"),
    "Qwen2": ("Qwen2", GROUPED, "last"),
    "GPT-2": ("GPT2", dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64), "last"),
}
IMAGES = {
    "ViT": ("ViT", IMAGE),
    "DINOv2": ("Dinov2", IMAGE),
    "CLIP": ("CLIP", {"vision_config": IMAGE}),
    "SigLIP": ("Siglip", {"vision_config": IMAGE}),
    "BEiT, mean": ("Beit", IMAGE | {"use_mean_pooling": True}),
}
CLOSE = {"rtol": 0, "atol": 1e-6}


def made(path: Path, kind: str, config: dict[str, Any], auto: Any, labels: int = 3) -> tuple[nn.Module, Path]:
    """transformers' class for the task, random, and a folder with its body alone and another number of labels."""
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(**config, num_labels=labels, pad_token_id=0)
    whole = auto.from_config(settings).eval()
    for parameter in outside(whole).values():
        nn.init.normal_(parameter, std=0.2)
    if kind == "GPT2":
        for parameter in whole.transformer.h.parameters():
            nn.init.normal_(parameter, std=0.2)
    whole.save_pretrained(path)
    heads = set(outside(whole))
    rewrite(path / "model.safetensors", lambda tensors: [tensors.pop(key) for key in heads])
    settings.num_labels = 2
    settings.save_pretrained(path)
    return whole, path


def outside(whole: nn.Module) -> dict[str, Tensor]:
    """The parameters outside the body, by their names in the class."""
    body = whole.base_model_prefix
    if not hasattr(whole, body):
        body = "vision_model"
    return {name: x.data for name, x in whole.named_parameters() if not name.startswith(f"{body}.")}


def text_class(path: Path, name: str, labels: int = 3, **config: Any) -> tuple[nn.Module, Base]:
    kind, settings, _ = TEXTS[name]
    whole, folder = made(path, kind, settings | config, transformers.AutoModelForSequenceClassification, labels)
    return whole, loading.load(Base(str(folder)), "float32", "cpu")


def pooled(head: TaskHead, states: Tensor) -> Tensor:
    return {"first": states[:, 0], "last": states[:, -1], "mean": states.mean(1)}[head.pooling]


@pytest.mark.parametrize("labels", [3, 1])
@pytest.mark.parametrize("name", TEXTS)
def test_a_text_head_is_the_class_of_transformers(tmp_path, name, labels):
    whole, base = text_class(tmp_path, name, labels)
    saved = outside(whole)
    head = load_task_head(base, saved, "task")
    assert (head.pooling, head.outputs) == (TEXTS[name][2], labels)
    ids = torch.randint(3, 64, (4, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = whole(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        states = base.model(input_ids=ids)[0]
        found = head(pooled(head, states))
    assert found.shape == (4, labels) and said.std(0).min() > 1e-2  # samples differ
    torch.testing.assert_close(found, said, **CLOSE)
    assert all(not p.requires_grad for p in head.module.parameters())


@pytest.mark.parametrize("name", ["BERT", "ModernBERT, mean", "LLaMA"])
def test_padding_is_not_pooled(tmp_path, name):
    """A sample of 4 tokens in a row of 7 says what it says in its class, padded there."""
    whole, base = text_class(tmp_path, name)
    head = load_task_head(base, outside(whole), "task")
    ids = torch.randint(3, 64, (1, 7), generator=torch.Generator().manual_seed(1))
    ids[:, 4:] = 0
    mask = (ids > 0).long()
    with torch.no_grad():
        said = whole(input_ids=ids, attention_mask=mask).logits
        found = head(pooled(head, base.model(input_ids=ids, attention_mask=mask)[0][:, :4]))
    torch.testing.assert_close(found, said, **CLOSE)


@pytest.mark.parametrize("name", IMAGES)
def test_an_image_head_is_the_class_of_transformers(tmp_path, name):
    whole, folder = made(tmp_path, *IMAGES[name], transformers.AutoModelForImageClassification)
    base = loading.load(Base(str(folder)), "float32", "cpu")
    head = load_task_head(base, outside(whole), "task")
    assert (head.pooling, head.outputs) == ("all", 3)
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        said = whole(pixel_values=pixels).logits
        found = head(base.model(pixel_values=pixels)[0])
    assert said.std(0).min() > 1e-2
    torch.testing.assert_close(found, said, **CLOSE)


def test_weights_of_a_head_that_the_adapter_lacks_are_the_bases(tmp_path):
    """RoBERTa's head of two layers, of which only the last was trained."""
    whole, base = text_class(tmp_path, "RoBERTa")
    saved, ids = outside(whole), torch.randint(3, 64, (2, 5), generator=torch.Generator().manual_seed(1))
    trained = {name: saved[name] for name in saved if "out_proj" in name}
    rewrite(
        tmp_path / "model.safetensors", lambda tensors: tensors.update({n: saved[n] for n in saved.keys() - trained})
    )
    head = load_task_head(base, trained, "task")
    with torch.no_grad():
        torch.testing.assert_close(head(base.model(input_ids=ids)[0][:, 0]), whole(input_ids=ids).logits, **CLOSE)


def test_a_head_whose_outputs_cancel_is_followed(tmp_path):
    """Two classes of opposite weights: the sum of their logits depends on nothing."""
    whole, base = text_class(tmp_path, "LLaMA", 2)
    saved = {"score.weight": torch.stack([whole.score.weight.data[0], -whole.score.weight.data[0]])}
    assert load_task_head(base, saved, "task").pooling == "last"


def test_a_head_keeps_nothing_of_what_it_read(tmp_path):
    """Neither states nor the graph of the forward behind them."""
    whole, base = text_class(tmp_path, "BERT")
    head, weight = load_task_head(base, outside(whole), "task"), torch.ones(32, requires_grad=True)
    states = torch.randn(2, 32) * weight
    said, known = head(states), weakref.ref(states)
    torch.autograd.grad(said.sum(), weight)
    del states, said
    gc.collect()
    assert known() is None


def second_token(self, states):
    return states[:, 1]


def greatest(self, states):
    return states.amax(1)


@pytest.mark.parametrize("pooling", [second_token, greatest])
def test_pooling_that_is_not_followed_is_refused(tmp_path, monkeypatch, pooling):
    whole, base = text_class(tmp_path, "BERT")
    monkeypatch.setattr(type(base.model.pooler), "forward", pooling)
    with pytest.raises(NSCError, match=r"adapter task: BertForSequenceClassification pools its tokens in a way"):
        load_task_head(base, outside(whole), "task")


CHANGES = {
    "another class": (lambda s: {"score.weight": torch.zeros(3, 32)}, "carries score.weight, which is not the head of"),
    "a layer lost": (
        lambda s: {n: x for n, x in s.items() if "dense" not in n},
        "classifier.dense.weight of its head .* is neither in the adapter nor in the base",
    ),
    "one layer too many": (
        lambda s: s | {"classifier.extra.weight": torch.zeros(3, 3)},
        "carries classifier.extra.weight, which is no part of RobertaForSequenceClassification",
    ),
    "weights that are not finite": (
        lambda s: {n: x.fill_(math.inf) for n, x in s.items()},
        "of its head holds NaN or infinity",
    ),
    "another width": (lambda s: s | {"classifier.dense.weight": torch.zeros(16, 16)}, "its head does not fit"),
}


@pytest.mark.parametrize(("change", "said"), CHANGES.values(), ids=CHANGES)
def test_heads_that_do_not_fit_are_refused(tmp_path, change, said):
    whole, base = text_class(tmp_path, "RoBERTa")
    with pytest.raises(NSCError, match=f"adapter mood.*{said}"):
        load_task_head(base, change(outside(whole)), "mood")


@pytest.mark.parametrize("name", ["BERT", "ALBERT"])
def test_a_pooler_that_transformers_filled_at_random_is_refused(tmp_path, name):
    whole, base = text_class(tmp_path, name)
    rewrite(
        tmp_path / "model.safetensors", lambda tensors: [tensors.pop(key) for key in list(tensors) if "pool" in key]
    )
    base = loading.load(Base(base.id), "float32", "cpu")
    with pytest.raises(
        NSCError, match=r"adapter mood: its head reads the base's pooler, but base .* has no weights for"
    ):
        load_task_head(base, outside(whole), "mood")


def test_a_class_that_needs_more_than_states_is_refused(tmp_path):
    config = dict(vocab_size=64, d_model=32, n_layer=2, n_head=4, d_inner=48)
    whole, folder = made(tmp_path, "XLNet", config, transformers.AutoModelForSequenceClassification)
    base = loading.load(Base(str(folder)), "float32", "cpu")
    with pytest.raises(
        NSCError, match="adapter mood: XLNetForSequenceClassification does not run on hidden states alone"
    ):
        load_task_head(base, outside(whole), "mood")


def test_a_base_without_such_a_class_is_refused(tmp_path):
    config = transformers.CLIPVisionConfig(**IMAGE)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    base = loading.load(Base(str(tmp_path)), "float32", "cpu")
    with pytest.raises(NSCError, match="adapter mood carries a head, but transformers builds no model with one"):
        load_task_head(base, {"classifier.weight": torch.zeros(3, 32)}, "mood")
