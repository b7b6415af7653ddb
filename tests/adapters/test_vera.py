"""VeRA adapters: their factors against PEFT's own updates, what is refused, and a merge of two."""

import json
import math
from dataclasses import fields
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nsc
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import check_shapes
from nsc.adapters.stack import stack_adapters
from nsc.adapters.unsupported import REFUSED_FIELDS, VERA_UNDERSTOOD
from nsc.bases.module_names import resolve
from nsc.errors import AdapterError, NameMismatch, NSCError, UnsupportedAdapter
from nsc.recipes.combination import Combination
from nsc.recipes.spec import names, read_recipe
from tests.merging_goldens import dense
from tests.regressions import with_rows
from tests.tiny import linears, peft_adapter, rewrite, tiny_llama

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]  # (32, 32), (16, 32), (48, 32), (32, 48)
WEIGHTS = "adapter_model.safetensors"


def vera(path: Path, seed: int = 0, **config) -> nn.Module:
    """A VeRA adapter saved by PEFT, with random lambdas; the model that carries it."""
    torch.manual_seed(seed)
    model = tiny_llama("AutoModelForCausalLM")
    wrapped = peft.get_peft_model(model, peft.VeraConfig(**{"r": 6, "target_modules": TARGETS, **config}))
    for name, parameter in wrapped.named_parameters():
        if "vera_lambda" in name:
            nn.init.normal_(parameter, std=0.5)
    wrapped.save_pretrained(path)
    return model


@pytest.fixture
def saved(tmp_path) -> Path:
    vera(tmp_path / "mnli")
    return tmp_path / "mnli"


def stack_on(model: nn.Module, path: Path):
    shapes = linears(model)
    adapter = read_adapter(path)
    match = resolve("a", adapter.factors, shapes)
    check_shapes(adapter, match, shapes)
    return stack_adapters({"a": adapter}, {"a": match}, shapes)


def test_factors_are_those_of_peft_in_layers_of_every_shape(tmp_path):
    model = vera(tmp_path / "a")
    stack = stack_on(tiny_llama("AutoModelForCausalLM"), tmp_path / "a")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.vera.Linear)}
    assert stack.modules.keys() == layers.keys() and len(layers) == 16
    for name, layer in layers.items():
        module = stack.modules[name]
        assert module.A.shape == (6, layer.in_features) and module.scales == (1.0,) and module.ranks == (6,)
        expected = layer.get_delta_weight("default")
        torch.testing.assert_close(module.delta(torch.ones(1)).float(), expected, rtol=1e-5, atol=1e-7)
    assert {m.A.shape[1] for m in stack.modules.values()} == {32, 48}


def test_half_precision_is_folded_without_rounding(saved):
    rewrite(saved / WEIGHTS, lambda t: t.update({key: x.bfloat16() for key, x in t.items()}))
    stored, adapter = load_file(saved / WEIGHTS), read_adapter(saved)
    name = "model.layers.2.mlp.down_proj"
    b, d = (stored[f"base_model.model.{name}.vera_lambda_{side}"].double() for side in "bd")
    factors = adapter.factors[name]
    assert factors.A.dtype == torch.float32
    assert torch.equal(factors.A.double(), d[:, None] * stored["base_model.vera_A"].double())
    assert torch.equal(factors.B.double(), b[:, None] * stored["base_model.vera_B"].double()[:32])


@pytest.mark.parametrize("prefix", ["base_model.model.", ""])
@pytest.mark.parametrize("infix", ["", ".default", ".mnli"])
def test_key_forms(saved, prefix, infix):
    before = read_adapter(saved)

    def rename(tensors):
        for key in list(tensors):
            name = key.removeprefix("base_model.model.")
            name = prefix + name if name != key else (key if prefix else key.removeprefix("base_model."))
            tensors[name + infix] = tensors.pop(key)

    rewrite(saved / WEIGHTS, rename)
    after = read_adapter(saved)
    assert after.factors.keys() == before.factors.keys()
    assert all(torch.equal(after.factors[n].A, f.A) for n, f in before.factors.items())


def test_every_setting_of_this_peft_is_known():
    assert {field.name for field in fields(peft.VeraConfig)} <= VERA_UNDERSTOOD | REFUSED_FIELDS.keys()


def configure(path: Path, **changes) -> Path:
    file = path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(save_projection=False), "save_projection=False.*base_model.vera_A"),
        (dict(bias="vera_only"), "trained bias"),
        (dict(vera_of_tomorrow=3), "vera_of_tomorrow.*unknown"),
        (dict(use_rslora=True), "use_rslora.*unknown"),
        (dict(peft_type="LORA"), "tensor of unknown kind"),
    ],
    ids=str,
)
def test_refused_settings(saved, changes, said):
    with pytest.raises(UnsupportedAdapter, match=f"(?s)'mnli'.*{said}"):
        read_adapter(configure(saved, **changes))


def test_unsaved_projections_are_refused_and_the_remedy_works(tmp_path):
    """What PEFT itself writes with save_projection=False; added as the message says, it is read."""
    with pytest.warns(UserWarning, match="not save vera_A"):
        model = vera(tmp_path / "a", save_projection=False)
    with pytest.raises(UnsupportedAdapter, match="save_projection=False"):
        read_adapter(tmp_path / "a")
    layer = model.get_submodule("model.layers.0.mlp.up_proj")
    shared = {f"base_model.vera_{side}": getattr(layer, f"vera_{side}")["default"] for side in "AB"}
    rewrite(tmp_path / "a" / WEIGHTS, lambda t: t.update(shared))
    stack = stack_on(tiny_llama("AutoModelForCausalLM"), configure(tmp_path / "a", save_projection=True))
    delta = stack.modules["model.layers.0.mlp.up_proj"].delta(torch.ones(1)).float()
    torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-7)


B0 = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"
D0 = B0[:-1] + "d"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("base_model.vera_A"), "no vera_A and vera_B"),
        (lambda t: t.pop(B0), "q_proj' has no vera_lambda_b"),
        (lambda t: t.update({D0: torch.ones(5)}), r"q_proj'.*\(5,\).*do not fit vera_A \(6, 48\)"),
        (lambda t: t.update({B0: torch.ones(49)}), r"q_proj'.*\(49,\).*vera_B \(48, 6\)"),
        (lambda t: t.update({B0: torch.ones(32, 1)}), "must be 1-D"),
        (lambda t: t.update({B0: torch.full((32,), math.nan)}), "NaN"),
        (lambda t: t.update({B0 + ".other": torch.ones(32)}), "two adapter names"),
        (lambda t: t.update({"base_model.vera_B": torch.ones(48, 5)}), r"ranks disagree.*\(48, 5\).*r = 6"),
        (lambda t: [t.pop(key) for key in list(t) if "lambda" in key], "no vera_lambda_b / vera_lambda_d"),
        (lambda t: [x.zero_() for key, x in t.items() if "lambda_b" in key], "every module is zero"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_broken_tensors(saved, change, said):
    rewrite(saved / WEIGHTS, change)
    with pytest.raises(AdapterError, match=said):
        read_adapter(saved)


@pytest.mark.parametrize("size", [40, 64])
@pytest.mark.parametrize("targets", [TARGETS, ["down_proj"]], ids=str)
def test_another_base_is_refused(tmp_path, size, targets):
    """Also where its layers could take a part of A: PEFT would not load it either."""
    vera(tmp_path / "a", target_modules=targets)
    with pytest.raises(NameMismatch, match="Wrong base"):
        stack_on(tiny_llama("AutoModelForCausalLM", intermediate_size=size), tmp_path / "a")


def test_inspection(saved, tmp_path):
    vera(tmp_path / "qnli", seed=1)
    reports = nsc.inspect([saved, tmp_path / "qnli"])
    text = nsc.format_inspection(reports)
    assert not any(report.problems or report.overlaps for report in reports)
    assert "q_proj x 4: rank 6, scale 1" in text and "VeRA: conditions and overlaps" in text
    (broken,) = nsc.inspect([configure(saved, save_projection=False)])
    assert any("save_projection=False" in problem for problem in broken.problems)


# Two adapters that share A span half of the core's columns.
SINGULAR = {"tsv", "core-tsv", "ctm-tsv", "iso-c", "iso-cts", "zero-interference"}


@pytest.mark.parametrize("method", names())
def test_every_method_takes_vera_or_refuses_it(tmp_path, method):
    for seed, task in enumerate(("mnli", "qnli")):
        vera(tmp_path / task, seed, target_modules=["down_proj"], layers_to_transform=[0])
    model = tiny_llama("AutoModelForCausalLM")
    adapters = {task: read_adapter(tmp_path / task) for task in ("mnli", "qnli")}
    shapes = linears(model)
    matches = {task: resolve(task, adapter.factors, shapes) for task, adapter in adapters.items()}
    merged = with_rows(Combination(stack_adapters(adapters, matches, shapes), read_recipe(method)))
    (name,) = merged.names
    if method in SINGULAR:
        with pytest.raises(NSCError, match="as with VeRA"):
            merged.update(name)
    else:
        update = dense(merged.update(name))
        assert update.shape == (32, 48) and update.isfinite().all() and update.any()


def test_two_vera_adapters_and_a_lora_merge(base, tmp_path, texts):
    """Learned, proven by reload, replayed; the update is the weighted sum of PEFT's own."""
    models = {task: vera(tmp_path / task, seed) for seed, task in enumerate(("plain", "double"))}
    lora = peft_adapter(tmp_path / "pattern", tiny_llama("AutoModelForCausalLM"), target_modules=["v_proj"])
    adapters = {"plain": tmp_path / "plain", "double": tmp_path / "double", "pattern": lora}
    data = {task: texts[task] for task in adapters}
    result = nsc.merge(base, adapters, data, steps=2, lr=0.05, progress=False)
    result.save(tmp_path / "out")
    merged = read_adapter(tmp_path / "out").factors
    name = "model.layers.1.mlp.down_proj"
    row = result.coefficients[result.modules.index(name.removeprefix("model."))]
    deltas = [m.get_submodule(name).get_delta_weight("default").double() for m in models.values()]
    expected = row[0] * deltas[0] + row[1] * deltas[1]
    found = merged[name].scale * merged[name].B.double() @ merged[name].A.double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    assert all(torch.equal(f.A, merged[n].A) for n, f in read_adapter(tmp_path / "again").factors.items())
