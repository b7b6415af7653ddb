"""Bases that fit no device, offloaded by accelerate or quantised, on a CPU; the proof always takes the full base."""

import copy
import shutil
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
from nsc.adapters.lora import read_adapters
from nsc.adapters.surgery import choose_plans
from nsc.bases import loading, structure
from nsc.bases.base_model import Base
from nsc.bases.heads import load_generating_head
from nsc.config import learned_settings
from nsc.data.sources import read_data
from nsc.data.text import read_texts
from nsc.errors import NSCError
from nsc.learning.assembly import initial_gradient
from nsc.learning.preparation import prepare, stack_on
from nsc.merging.from_data import _identity
from nsc.recipes.merged_factors import factors_to_fit
from nsc.recipes.updates import dense
from nsc.runtime.distributed import Team
from nsc.runtime.placement import fetched_linear, input_device, is_plain, reload_in_backward, run_device
from nsc.runtime.quantization import dequantise_where_used, dequantised
from tests.conftest import ADAPTERS
from tests.learning.test_match import found as gradient
from tests.learning.test_match import setting as experts_setting  # noqa: F401
from tests.runtime.ranks import TARGETS
from tests.tiny import WORDS, peft_adapter, save_base, tiny_llama

CPU = torch.device("cpu")
NEAR = {"rtol": 0, "atol": 1e-4}
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


# --- matching and regressions -----------------------------------------------------------------------------------------


def expert_problem(setting, offload, **settings):
    """A problem of matching, on a base that may be offloaded; two tasks have heads, one writes tokens."""
    config = nsc.MergeConfig(
        **{**learned_settings("match", settings), "device": "cpu", "steps": 1, "max_new_tokens": 4, **settings}
    )
    read = read_adapters(setting.adapters)
    base, matched = stack_on(Base(str(setting.base)), read, config)
    if offload:
        accelerate.cpu_offload(base.model, CPU)
        reload_in_backward(base.model)
    samples = read_data(setting.texts, read, read_texts)
    return prepare(base, matched, samples, config, factors_to_fit(matched.stack, config))


@pytest.mark.parametrize("granularity", ["layer", "rank", "factors"])
def test_experts_are_matched_on_an_offloaded_base_as_on_a_resident_one(experts_setting, granularity):  # noqa: F811
    resident, away = (expert_problem(experts_setting, offload, granularity=granularity) for offload in (False, True))
    assert all(parameter.is_meta for parameter in away.base.model.parameters())
    for pick, output in resident.batches.outputs.items():
        torch.testing.assert_close(away.batches.outputs[pick].values, output.values, rtol=0, atol=1e-5)
    for one, other in zip(gradient(resident), gradient(away), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert gradient(away)[1].abs().max() > 1e-3


def test_a_head_that_is_tied_to_offloaded_embeddings_is_read_again(tmp_path):
    folder = save_base(tmp_path / "base", tie_word_embeddings=True)
    base = loading.load(Base(str(folder)))
    resident = load_generating_head(base).weight.clone()
    accelerate.cpu_offload(base.model, CPU)
    assert torch.equal(load_generating_head(base).weight, resident)


@pytest.mark.parametrize("method", ["ssr", "regmean", "regmean++", "featcal"])
def test_a_regression_on_a_dispatched_base(base, adapters, texts, method, tmp_path, monkeypatch):
    """What accelerate would keep on the disk is kept on the CPU."""
    load_body = loading.load_body

    def offloading(*args):
        model = load_body(*args)
        if args[-1]:
            accelerate.cpu_offload(model, CPU)
        return model

    expected = nsc.merge(base, adapters, texts, method=method, search="none", progress=False)
    monkeypatch.setattr(loading, "load_body", offloading)
    spread = nsc.merge(base, adapters, texts, method=method, progress=False, device_map="auto")  # is not searched
    for name in expected.modules:
        torch.testing.assert_close(dense(spread.merged.update(name)), dense(expected.merged.update(name)), **NEAR)
    assert spread.model is None and "hidden states to" in str(spread.save(tmp_path / "out"))
    assert nsc.apply(tmp_path / "out").record.settings["device_map"] == "auto"
    with pytest.raises(NSCError, match="is quantised or offloaded, but this method needs the norms"):
        nsc.merge(base, adapters, texts, method="iteris", progress=False, device_map="auto")


@pytest.mark.parametrize("base_as", [{"shard": True}, {"device_map": "auto"}])
def test_a_regression_asks_for_a_whole_base_in_each_process(base, adapters, texts, base_as, monkeypatch):
    monkeypatch.setattr("nsc.merging.from_rows.join", lambda device: Team(0, 2))
    with pytest.raises(NSCError, match="runs the experts on a whole base in each process: leave out shard"):
        nsc.merge(base, adapters, texts, method="nsc+ssr", progress=False, **base_as)


def test_bits_are_no_setting_of_a_regression(base, adapters, texts):
    """Its weights are those of tasks."""
    with pytest.raises(NSCError, match="weights"):
        nsc.merge(base, adapters, texts, method="ssr", progress=False, weights="int8")


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


@pytest.mark.parametrize("granularity", ["layer", "rank", "factors"])
def test_experts_are_matched_on_fewer_bits_as_on_the_weights_that_they_stand_for(quantised, tmp_path, granularity):
    bits, folder, _, fewer = quantised
    size = dict(hidden_size=128, intermediate_size=192)
    kinds = {"plain": "AutoModelForCausalLM", "double": "AutoModelForSequenceClassification"}
    adapters = {
        task: peft_adapter(tmp_path / task, tiny_llama(kind, **size), seed=k, **ADAPTERS[task])
        for k, (task, kind) in enumerate(kinds.items())
    }
    texts = {task: [" ".join(WORDS[i : i + 4 + k]) for i in range(8)] for k, task in enumerate(adapters)}
    full = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for name in structure.linear_shapes(fewer):
        full.model.get_submodule(name).weight.data = dequantised(fewer.get_submodule(name)).to(torch.float32)
    shutil.copytree(folder, tmp_path / "stands")
    full.save_pretrained(tmp_path / "stands")
    settings = dict(method="match", granularity=granularity, steps=3, max_new_tokens=2, stop="last", progress=False)
    settings |= {"layers": "factors"} if granularity != "factors" else {}
    expected = nsc.merge(tmp_path / "stands", adapters, texts, **settings)
    result = nsc.merge(folder, adapters, texts, weights=bits, **settings)
    assert result.report.losses == pytest.approx(expected.report.losses, rel=1e-2)
    assert result.model is None and "hidden states to" in str(result.save(tmp_path / "out"))
