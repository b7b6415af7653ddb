"""Merges over many architectures against stock PEFT, transformers and a dense sum made of the files alone, in float64.

Adapters are PEFT's own, with random non-zero B. What is written is loaded by the class that they were trained on.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import nsc
from tests.differential.architectures import ARCHITECTURES, Architecture

SCALE = 0.5
WEIGHTS, LOGITS = 1e-7, 1e-5  # relative
_ATTENTION = [(r"attention\.q_proj", "attention.attention.query"), (r"attention\.v_proj", "attention.attention.value")]
_SELF = [(r"attention\.q_proj", "attention.self.query"), (r"attention\.v_proj", "attention.self.value")]
OLD_NAMES = {  # as the checkpoints have them, too
    "swin": _SELF,
    "segformer": [*_SELF, (r"segformer\.stages\.(\d+)\.blocks\.", r"segformer.encoder.block.\1.")],
    "vit": [*_ATTENTION, (r"vit\.layers\.", "vit.encoder.layer.")],
    "dinov2": _ATTENTION,
    "qwen2.5-vl": [(r"model\.language_model\.layers", "model.layers")],
    "gemma3": [(r"model\.language_model\.layers", "language_model.model.layers")],
    "mllama": [(r"model\.language_model\.layers", "language_model.model.layers")],
}


@dataclass(frozen=True)
class Case:
    """One architecture on disk: the base, two adapters, and what their merge should be."""

    architecture: Architecture
    base: Path
    adapters: Mapping[str, Path]

    def load(self, folder: Path | None = None) -> Any:
        """The class that the adapters were trained on, with the weights of a folder, in float64."""
        return getattr(transformers, self.architecture.model).from_pretrained(folder or self.base).double().eval()

    def updates(self) -> dict[str, Tensor]:
        """Parameter -> the sum of the updates of all adapters, from their files alone."""
        found: dict[str, Tensor] = {}
        for folder in self.adapters.values():
            config = json.loads((folder / "adapter_config.json").read_text())
            tensors = load_file(folder / "adapter_model.safetensors")
            for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                A, B = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
                update = config["lora_alpha"] / config["r"] * B @ A
                update = update.T if config["fan_in_fan_out"] else update
                found[f"{name}.weight"] = found.get(f"{name}.weight", 0) + SCALE * update
        return found

    def expected(self) -> Any:
        """The base with these updates, in float64."""
        model = self.load()
        with torch.no_grad():
            for name, update in self.updates().items():
                model.get_parameter(name).add_(update)
        return model

    def merged(self) -> nsc.MergeResult:
        return nsc.merge(self.base, self.adapters, method="task-arithmetic", scale=SCALE, progress=False)

    @torch.no_grad()
    def logits(self, model: nn.Module) -> Tensor:
        arguments = self.architecture.arguments()
        inputs = {name: x.double() if x.is_floating_point() else x for name, x in arguments.items()}
        return getattr(model(**inputs), self.architecture.output)


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module", params=list(ARCHITECTURES))
def case(request, tmp_path_factory) -> Iterator[Case]:
    architecture, folder = ARCHITECTURES[request.param], tmp_path_factory.mktemp(request.param)
    yield Case(architecture, folder / "base", architecture.save(folder, "ab", lora_alpha=3))


def test_the_adapter_is_what_stock_peft_makes_of_the_dense_sum(case, tmp_path):
    proof = case.merged().save(tmp_path / "out")
    updates, model = case.updates(), case.load()
    loaded = PeftModel.from_pretrained(model, tmp_path / "out").double().eval()
    layers = {name: m for name, m in loaded.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert {f"{name}.weight" for name in layers} == updates.keys() and proof.modules == len(layers)
    for name, layer in layers.items():
        assert distance(layer.get_delta_weight("default"), updates[f"{name}.weight"]) < WEIGHTS
    expected = case.logits(case.expected())
    assert distance(case.logits(loaded), expected) < LOGITS
    assert distance(case.logits(case.load()), expected) > 10 * LOGITS


def test_the_full_model_is_the_dense_sum(case, tmp_path):
    case.merged().save(tmp_path / "out", full=True)
    expected, loaded, updates = case.expected(), case.load(tmp_path / "out"), case.updates()
    written = dict(loaded.named_parameters())
    for name, parameter in expected.named_parameters():
        bound = WEIGHTS if name in updates else 0
        assert distance(written[name], parameter) <= bound or torch.equal(written[name], parameter), name
    assert distance(case.logits(loaded), case.logits(expected)) < LOGITS
    before, after = (load_all(folder) for folder in (case.base, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert sum(not torch.equal(before[key], after[key]) for key in before) == len(updates)


@pytest.mark.parametrize(("case", "renames"), OLD_NAMES.items(), indirect=["case"], ids=OLD_NAMES)
def test_names_of_an_older_transformers_are_renamed_as_it_renames_weights(case, renames, tmp_path):
    """With a head that each task keeps."""
    new = case.merged()
    stored = {key.removesuffix(".weight") for key in load_all(case.base)}
    copies = {task: Path(shutil.copytree(folder, tmp_path / task)) for task, folder in case.adapters.items()}
    for folder in copies.values():
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        for current, old in renames:
            tensors = {re.sub(current, old, key): tensor for key, tensor in tensors.items()}
        assert all(key.removeprefix("base_model.model.").partition(".lora_")[0] in stored for key in tensors)
        modules = sorted({key.removeprefix("base_model.model.").partition(".lora_")[0] for key in tensors})
        tensors["base_model.model.classifier.weight"] = torch.ones(2, 4)
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
        config |= {"target_modules": "|".join(map(re.escape, modules)), "modules_to_save": ["classifier"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
    old = replace(case, adapters=copies).merged()
    assert old.modules == new.modules
    old.save(tmp_path / "old")
    new.save(tmp_path / "new")
    assert load_file(tmp_path / "old/heads/a.safetensors")["classifier.weight"].equal(torch.ones(2, 4))
    nsc.apply(tmp_path / "old").save(tmp_path / "again")
    for name in ("old", "again"):
        found, expected = (load_file(tmp_path / n / "adapter_model.safetensors") for n in (name, "new"))
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_keys_that_transformers_ignores_are_copied(case, tmp_path):
    """Such as layers for training, another copy of the weights, or buffers of older versions."""
    base = Path(shutil.copytree(case.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    first = tensors["model.layers.0.self_attn.q_proj.weight"]
    extra = ["ema.model.layers.0.self_attn.q_proj", "model.layers.9.self_attn.q_proj", "draft.layers.1.mlp.down_proj"]
    save_file(tensors | {f"{name}.weight": first + 1 for name in extra}, base / "model.safetensors", {"format": "pt"})
    replace(case, base=base).merged().save(tmp_path / "out", full=True)
    written = load_all(tmp_path / "out")
    assert all(torch.equal(written[f"{name}.weight"], first + 1) for name in extra)
    assert distance(written["model.layers.0.self_attn.q_proj.weight"], first) > 0.1


def load_all(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for file in folder.glob("*.safetensors") for key, tensor in load_file(file).items()}
