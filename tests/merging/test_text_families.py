"""Learning on texts where they go through more than a decoder: encoder-decoders, multimodal wrappers, Conv1D layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

import nsc
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.conv1d import as_stored, transposed_weights
from nsc.config import MergeConfig
from nsc.data.modalities import feed_of
from nsc.errors import NameMismatch
from tests.differential.architectures import ARCHITECTURES, Architecture
from tests.tiny import save_tokenizer

FAMILIES = ("t5", "bart", "gpt2", "gemma3", "llava", "mistral3", "paligemma", "qwen2.5-vl", "qwen3-vl", "mllama")
ROWS = {"a": ["word1 word2 word3 word4", "word9 word8"], "b": ["word5 word6 word7", "word3 word3 word4 word9 word2"]}


def save_family(folder: Path, architecture: Architecture, **lora: object) -> dict[str, Path]:
    """A base with a tokenizer, and two adapters that PEFT made on it."""
    adapters = architecture.save(folder, ROWS, **{"lora_alpha": 4, **lora})
    save_tokenizer(folder / "base")
    return adapters


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_are_learned_from_texts(family, tmp_path):
    adapters = save_family(tmp_path, ARCHITECTURES[family])
    result = nsc.merge(tmp_path / "base", adapters, ROWS, steps=4, lr=0.05, progress=False)
    assert ((result.coefficients - 0.4).abs() > 1e-3).any(0).all()
    proof = result.save(tmp_path / "out")
    assert proof.outputs < 1e-5 < 1e-3 < proof.effect


def test_layers_that_no_text_reaches_keep_their_start(tmp_path):
    """Of a tower, and of attention to what it gives; none of them is measured."""
    architecture = ARCHITECTURES["mllama"]
    adapters = save_family(tmp_path, architecture, target_modules=r".*\.(q_proj|v_proj)")
    result = nsc.merge(tmp_path / "base", adapters, ROWS, steps=4, lr=0.05, progress=False)
    reached = [name.startswith("language_model.layers.0.") for name in result.modules]
    moved = ((result.coefficients - 0.4).abs() > 1e-3).any(1)
    assert 0 < sum(reached) < len(reached) and torch.equal(moved, torch.tensor(reached))


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_decoder_reads_the_text_itself(family, tmp_path):
    """One token later, behind the start token, in each row as if it were alone."""
    save_family(tmp_path, ARCHITECTURES[family])
    base = loading.load(Base(str(tmp_path / "base")), "float64")
    stock = transformers.AutoModel.from_pretrained(tmp_path / "base").double().eval()
    feed = feed_of(base)
    for batch in feed.batches(base, [], ROWS, MergeConfig(graphs=False))[1]:
        states = base.model(**batch.arguments(torch.float64))[0]
        for ids, weight, row in zip(batch.inputs["input_ids"], batch.weight, states, strict=True):
            own = ids[weight > 0][None]
            shifted = torch.cat([torch.tensor([[stock.config.decoder_start_token_id]]), own[:, :-1]], 1)
            alone = stock(input_ids=own, decoder_input_ids=shifted)[0][0]
            torch.testing.assert_close(row[weight > 0], alone, rtol=0, atol=1e-6)  # T5 masks in float32


def test_conv1d_runs_as_a_linear_and_is_put_back(tmp_path):
    save_family(tmp_path, ARCHITECTURES["gpt2"])
    ids = torch.arange(5, 11)[None]
    stock = transformers.AutoModel.from_pretrained(tmp_path / "base").double().eval()
    model = loading.load_body(Base(str(tmp_path / "base")), "float64")
    assert not any(isinstance(m, Conv1D) for m in model.modules())
    assert len(transposed_weights(model)) == sum(isinstance(m, Conv1D) for m in stock.modules()) == 8
    torch.testing.assert_close(model(ids)[0], stock(ids)[0], rtol=0, atol=1e-12)
    with as_stored(model):
        assert all(torch.equal(x, stock.get_parameter(name)) for name, x in model.named_parameters())
        torch.testing.assert_close(model(ids)[0], stock(ids)[0], rtol=0, atol=1e-12)
    assert not any(isinstance(m, Conv1D) for m in model.modules())


def test_a_conv1d_that_was_fine_tuned_whole_is_refused(tmp_path):
    """Also a square one, of which the shape would not tell."""
    adapters = save_family(tmp_path, ARCHITECTURES["gpt2"], target_modules=["c_fc"], modules_to_save=["attn.c_proj"])
    with pytest.raises(NameMismatch, match=r"attn\.c_proj\.\w+, whose weight the base stores transposed"):
        nsc.merge(tmp_path / "base", adapters, method="task-arithmetic", progress=False)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_layer_says_whether_it_is_stored_transposed_and_not_the_flag(family, tmp_path):
    adapters = save_family(tmp_path, ARCHITECTURES[family])
    written = []
    for flag in (True, False):
        for folder in adapters.values():
            file = folder / "adapter_config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": flag}))
        out = tmp_path / f"out{flag}"
        nsc.merge(tmp_path / "base", adapters, method="ties", progress=False).save(out, rank=4)
        assert json.loads((out / "adapter_config.json").read_text())["fan_in_fan_out"] is (family == "gpt2")
        written.append((out / "adapter_model.safetensors").read_bytes())
    assert written[0] == written[1]
