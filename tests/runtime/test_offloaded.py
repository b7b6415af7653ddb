"""Bases that fit no device, offloaded by accelerate or quantised, on a CPU; the proof always takes the full base."""

import copy
import sys
from dataclasses import replace

import accelerate
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import nn

import nsc
from nsc.adapters.surgery import choose_plans
from nsc.bases import loading, structure
from nsc.bases.base_model import Base
from nsc.errors import NSCError
from nsc.learning.assembly import initial_gradient
from nsc.merging.from_data import _identity
from nsc.runtime.placement import fetched_linear, input_device, is_plain, reload_in_backward, run_device
from nsc.runtime.quantization import dequantise_where_used, dequantised
from tests.conftest import ADAPTERS
from tests.runtime.ranks import TARGETS
from tests.tiny import WORDS, peft_adapter, save_base, tiny_llama

CPU = torch.device("cpu")
BITS = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=["cpu", "disk"])
def offloaded(request, tmp_path):
    """The tiny LLaMA of ``setting``, whose weights are on the meta device except while they are used."""
    model = tiny_llama("AutoModel").double().requires_grad_(False).eval()
    if request.param == "cpu":
        accelerate.cpu_offload(model, CPU)
    else:
        accelerate.disk_offload(model, str(tmp_path / "weights"), CPU)
    reload_in_backward(model)
    return model


def test_an_offloaded_base_gives_the_gradient_of_the_resident_one(setting, offloaded):
    model, stack, batches = setting
    batch, lam = batches(0)[0], torch.full((len(stack.names), len(stack.tasks)), 0.4, dtype=torch.float64)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert input_device(offloaded) == CPU and run_device(offloaded.get_submodule(TARGETS[0])) == CPU
    expected, found = (initial_gradient(m, stack, TARGETS, batch, lam) for m in (model, offloaded))
    assert expected[1].abs().max() > 1e-4
    for one, other in zip(expected, found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    assert set(choose_plans(offloaded, stack, "weights", 10).values()) == {"factors"}


def test_no_copy_of_an_offloaded_weight_waits_for_the_backward(offloaded):
    kept = []

    def pack(x):
        kept.append(tuple(x.shape))
        return x

    weights = {tuple(p.shape) for name, p in offloaded.named_parameters() if "proj" in name}
    weights |= {shape[::-1] for shape in weights}
    states = torch.randn(1, 5, 32, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = offloaded(inputs_embeds=states)[0].square().sum()
    assert kept and not weights & set(kept)
    loss.backward()
    assert states.grad.abs().max() > 0


def test_a_fetched_linear_is_a_linear_that_fetches_twice():
    z, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 5), (4, 5), (4,)))
    fetched = []
    call = z.requires_grad_(), bias, lambda: fetched.append(1) or weight
    torch.testing.assert_close(fetched_linear(*call), F.linear(z, weight, bias), rtol=0, atol=1e-12)
    assert len(fetched) == 1 and torch.autograd.gradcheck(lambda z: fetched_linear(z, *call[1:]), z)


def test_a_weight_is_plain_only_where_it_can_be_folded_into():
    class Quantised(torch.Tensor):
        pass

    plain, strange = nn.Linear(2, 3), nn.Linear(2, 3)
    strange.weight = nn.Parameter(torch.randn(3, 2).as_subclass(Quantised))
    assert is_plain(plain) and not is_plain(strange) and not is_plain(nn.Linear(2, 3, device="meta"))
    assert not is_plain(nn.LayerNorm(3))


def test_a_dispatched_base_merges_as_a_resident_one(base, adapters, texts, merged, tmp_path):
    spread = nsc.merge(base, adapters, texts, steps=5, lr=0.05, progress=False, device_map="auto")
    torch.testing.assert_close(spread.coefficients, merged.coefficients, rtol=0, atol=1e-6)
    assert spread.model is None and "hidden states to" in str(spread.save(tmp_path / "out"))


def test_a_base_that_memory_does_not_hold_is_proven_by_its_files(base, merged, tmp_path, monkeypatch):
    bare = replace(merged, model=None)
    monkeypatch.setattr("nsc.export.result._fits", lambda *args: False)
    assert "outputs not compared" in str(bare.save(tmp_path / "adapter"))
    assert "full model: 4" not in (told := str(bare.save(tmp_path / "full", full=True)))
    assert told.startswith("full model") and "outputs not compared" in told


def test_what_is_learned_depends_on_the_bits_of_the_base_but_not_on_its_places():
    config = nsc.MergeConfig()
    identity = [
        _identity("b", {}, {}, [], c)
        for c in (
            config,
            replace(config, weights="int8"),
            replace(config, device_map="auto"),
            replace(config, shard=True),
        )
    ]
    assert identity[0] == identity[2] == identity[3] != identity[1]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(weights="int4"), "weights must be one of full, int8, fp8, nf4, not int4"),
        (dict(shard=True, weights="int8"), "shard needs full weights"),
        (dict(shard=True, device_map="auto"), "shard needs full weights and no device_map"),
    ],
    ids=str,
)
def test_settings_that_exclude_one_another(wrong, said):
    with pytest.raises(NSCError, match=said):
        nsc.MergeConfig(**wrong)


@pytest.mark.parametrize("bits", BITS)
def test_a_missing_library_is_told_with_the_extra_that_brings_it(base, bits, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == BITS[bits]] + [BITS[bits]]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, f"{BITS[bits]}.quantization", None)
    with pytest.raises(NSCError, match=rf"weights {bits} need {BITS[bits]}.*nsc-merging\[quantized\]"):
        loading.load_body(Base(str(base)), weights=bits)


def test_a_base_that_was_not_quantised_is_refused():
    with pytest.raises(NSCError, match="no linear of the base was quantised"):
        dequantise_where_used(tiny_llama())


@pytest.fixture(scope="module", params=BITS)
def quantised(request, tmp_path_factory):
    """(bits, folder, full body, quantised body) of a wider LLaMA."""
    pytest.importorskip(BITS[request.param])
    folder = save_base(tmp_path_factory.mktemp("wide"), hidden_size=128, intermediate_size=192)
    full = loading.load_body(Base(str(folder)))
    if transformers.__version__.startswith("4.50"):  # nf4 on a CPU takes Intel's extension; torchao 0.10 is too new
        with pytest.raises(NSCError, match="update both" if request.param != "nf4" else "cannot be loaded"):
            loading.load_body(Base(str(folder)), weights=request.param)
        pytest.skip("transformers 4.50 goes with torchao below 0.10, which has no fp8, and with nf4 on GPUs")
    fewer = loading.load_body(Base(str(folder)), weights=request.param)
    return request.param, folder, full, fewer


def test_a_quantised_linear_is_the_linear_of_its_weight_and_so_is_its_gradient(quantised):
    bits, _, full, fewer = quantised
    assert structure.linear_shapes(fewer) == structure.linear_shapes(full)
    for name in structure.linear_shapes(full):
        linear = fewer.get_submodule(name)
        weight = dequantised(linear)
        original = full.get_submodule(name).weight
        error = (weight - original).norm() / original.norm()
        assert not is_plain(linear) and {"int8": 1e-4, "fp8": 1e-2, "nf4": 5e-2}[bits] < error < 0.15
        z, dy = torch.randn(7, weight.shape[1], requires_grad=True), torch.randn(7, weight.shape[0])
        y = linear(z)
        (dz,) = torch.autograd.grad(y, z, dy)
        torch.testing.assert_close(y, z @ weight.T, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(dz, dy @ weight, rtol=1e-5, atol=1e-5)
    held = [sum(p.untyped_storage().nbytes() for p in dict(m.named_parameters()).values()) for m in (full, fewer)]
    assert bits != "nf4" or held[1] < 0.4 * held[0]


def test_coefficients_learned_on_fewer_bits_are_written_and_proven_in_full(quantised, tmp_path):
    bits, folder, full, fewer = quantised
    size = dict(hidden_size=128, intermediate_size=192)
    adapters = {
        task: peft_adapter(tmp_path / task, tiny_llama("AutoModelForCausalLM", **size), seed=seed, **ADAPTERS[task])
        for seed, task in enumerate(("plain", "rslora"))
    }
    texts = {task: [" ".join(WORDS[i : i + 9 + k]) for i in range(6)] for k, task in enumerate(adapters)}
    result = nsc.merge(folder, adapters, texts, steps=3, lr=1e-2, progress=False, weights=bits)
    lam = torch.full_like(result.coefficients, 0.4)
    stands_for = copy.deepcopy(full)
    for name in structure.linear_shapes(full):
        stands_for.get_submodule(name).weight.data = dequantised(fewer.get_submodule(name))
    of_full, expected, found = (
        initial_gradient(model, result.stack, result.record.targets, result.batch, lam)[1]
        for model in (full, stands_for, fewer)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert (of_full - found).abs().max() > 1e-5
    assert result.model is None and "hidden states to" in str(result.save(tmp_path / "out"))
    assert "hidden states to" in str(result.save(tmp_path / "full", full=True))
    written, stored = (load_file(place / "model.safetensors") for place in (tmp_path / "full", folder))
    assert {k: (v.dtype, v.shape) for k, v in written.items()} == {k: (v.dtype, v.shape) for k, v in stored.items()}
