"""Layers fine-tuned whole: the plain float64 sum and its gradient, learned, kept or refused with the reason."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import nsc
from nsc.adapters.lora import read_adapters
from nsc.adapters.matching import body_of, match_adapters
from nsc.adapters.modules_to_save import dense_stacks, split_saved
from nsc.adapters.stack import DenseStack, stack_adapters, whitened
from nsc.adapters.surgery import choose_plans, merged_layers
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body
from nsc.bases.structure import linear_shapes
from nsc.batch import Batch
from nsc.data.packing import pack
from nsc.errors import NameMismatch, NSCError
from nsc.learning.assembly import initial_gradient
from nsc.learning.loop import learn
from nsc_kernels import MergedDenseLinear
from tests.tiny import peft_adapter, random_factors, save_base, tiny_llama, write_adapter

GATE, DOWN = "layers.0.mlp.gate_proj", "layers.1.mlp.down_proj"
TARGETS = ["layers.3.self_attn.v_proj"]


def layer(bias: bool, dtype: torch.dtype = torch.float64, present=(True, False, True)) -> MergedDenseLinear:
    torch.manual_seed(0)
    P = sum(present)
    base = nn.Linear(5, 3, bias=bias, dtype=dtype).requires_grad_(False)
    deltas = torch.randn(P, 3, 5, dtype=dtype)
    return MergedDenseLinear(base, deltas, torch.randn(P, 3, dtype=dtype) if bias else None, present, torch.zeros(3))


@pytest.mark.parametrize("bias", [True, False])
def test_the_layer_is_the_plain_sum(bias):
    made, z = layer(bias), torch.randn(2, 4, 5, dtype=torch.float64, requires_grad=True)
    lam = torch.tensor([0.3, 9.0, -0.7], dtype=torch.float64, requires_grad=True)

    def plain(lam, z):
        W = made.base.weight + lam[0] * made.deltas[0] + lam[2] * made.deltas[1]
        return z @ W.T + (made.base.bias + lam[0] * made.bias_deltas[0] + lam[2] * made.bias_deltas[1] if bias else 0)

    made.lam = lam
    dy = torch.randn(2, 4, 3, dtype=torch.float64)
    found, expected = made(z), plain(lam, z)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    gradients = zip(*(torch.autograd.grad(y, (lam, z), dy) for y in (found, expected)), strict=True)
    for ours, theirs in gradients:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert torch.autograd.grad(made(z), lam, dy)[0][1] == 0


def test_coefficients_are_not_rounded_to_the_layers_dtype():
    made = layer(False, torch.bfloat16, (True,) * 3)
    made.deltas[:] = torch.tensor([1.0, 1.0, -1.0], dtype=torch.bfloat16)[:, None, None]
    made.lam = torch.tensor([1.0, 2**-9, 1.0])
    z = torch.ones(5, dtype=torch.bfloat16)
    expected = made.base(z) + 5 * 2**-9
    assert torch.equal(made(z), expected) and not torch.equal(made(z), made.base(z))


def test_nothing_but_the_differences_and_the_input_is_kept():
    made, kept = layer(True), []
    made.lam = torch.ones(3, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        made(torch.randn(7, 5, dtype=torch.float64)).sum()
    sizes = sorted(x.numel() for x in kept if x.data_ptr() not in (made.deltas.data_ptr(), made.bias_deltas.data_ptr()))
    assert any(x.data_ptr() == made.deltas.data_ptr() for x in kept) and max(sizes) <= 7 * 5


def test_shapes_must_follow():
    base, lam = nn.Linear(5, 3), torch.zeros(2)
    with pytest.raises(ValueError, match=r"P = 1 the number of tasks present"):
        MergedDenseLinear(base, torch.zeros(2, 3, 5), None, [True, False], lam)
    with pytest.raises(ValueError, match="bias_deltas"):
        MergedDenseLinear(base, torch.zeros(1, 3, 5), torch.zeros(1, 5), [True, False], lam)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict[str, Path]]:
    """A base and adapters that also fine-tuned gate_proj of block 0 (both) and down_proj of block 1 (one)."""
    folder = tmp_path_factory.mktemp("whole")
    base = save_base(folder / "base", kind="AutoModel", dtype=torch.float64, mlp_bias=True)
    stored = load_file(base / "model.safetensors")
    made = {}
    for seed, (task, layers) in enumerate({"a": [GATE, DOWN], "b": [GATE]}.items()):
        generator = torch.Generator().manual_seed(seed)
        names = [f"layers.{i}.self_attn.q_proj" for i in range(4)]
        factors = random_factors(names, seed=seed) | random_factors(TARGETS, m=16, seed=seed)
        saved = {f"{x}.{k}": stored[f"{x}.{k}"] for x in layers for k in ("weight", "bias")}
        saved = {n: x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype) for n, x in saved.items()}
        settings = dict(alpha=0.8, saved=saved, target_modules=sorted(factors))
        made[task] = write_adapter(folder / task, {n: f for n, f in factors.items()}, **settings)
    return base, made


@pytest.fixture(scope="module")
def prepared(whole):
    base, made = whole
    model = load_body(Base(str(base)))
    adapters = read_adapters(made)
    matches = match_adapters(adapters, linear_shapes(model))
    _, merged = split_saved(adapters, matches, body_of(Base(str(base), model)), [])
    stack = stack_adapters(adapters, matches, linear_shapes(model), dense_stacks(Base(str(base)), merged))
    (batch,) = pack([[5, 6, 7, 8], [9, 10, 11, 12]], [0, 1], 0, causal=True, shares_rows=False)
    batch = Batch(batch.inputs, batch.task, batch.weight.double())
    return model, adapters, stack, batch


def plain_loss(model, adapters, stack, lam: torch.Tensor, batch: Batch) -> torch.Tensor:
    """By dense merged weights straight from the adapters' files."""
    changed = {}
    for i, name in enumerate(stack.names):
        for key in ("weight", "bias") if name in stack.dense else ("weight",):
            changed[f"{name}.{key}"] = model.get_parameter(f"{name}.{key}")
        for k, adapter in enumerate(adapters.values()):
            if name in adapter.factors:
                f = adapter.factors[name]
                changed[f"{name}.weight"] = (
                    changed[f"{name}.weight"] + lam[i, k] * f.scale * f.B.double() @ f.A.double()
                )
            for key in ("weight", "bias"):
                if (saved := adapter.saved.get(f"{name}.{key}")) is not None:
                    base = model.get_parameter(f"{name}.{key}")
                    changed[f"{name}.{key}"] = changed[f"{name}.{key}"] + lam[i, k] * (saved - base)
    seen = []
    hook = model.get_submodule(TARGETS[0]).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.func.functional_call(model, changed, (), batch.inputs)
    hook.remove()
    total = lam.new_zeros(())
    for k, adapter in enumerate(adapters.values()):
        A = adapter.factors[TARGETS[0]].A.double()
        z = seen[0][batch.task == k]
        ratio = (z - z @ torch.linalg.pinv(A) @ A).norm(dim=-1) / z.norm(dim=-1)
        total = total + (ratio * batch.weight[batch.task == k]).sum() / len(adapters)
    return total


def test_rows_are_in_the_models_own_order(prepared):
    _, _, stack, _ = prepared
    assert stack.names[:3] == ["layers.0.self_attn.q_proj", GATE, "layers.1.self_attn.q_proj"]
    assert stack.present[stack.names.index(DOWN)].tolist() == [True, False] and len(stack.present) == 7


def test_gradient_of_every_coefficient_is_that_of_dense_weights(prepared):
    model, adapters, stack, batch = prepared
    lam = 0.4 + 0.1 * torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lam.requires_grad_()
    expected = plain_loss(model, adapters, stack, lam, batch)
    (wanted,) = torch.autograd.grad(expected, lam)
    loss, gradient = initial_gradient(model, whitened(stack), TARGETS, batch, lam.detach())
    assert loss.item() == pytest.approx(expected.item(), abs=1e-7)  # RMSNorm computes in float32
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=2e-7)
    dense = [stack.names.index(GATE), stack.names.index(DOWN)]
    assert gradient[dense[0]].abs().min() > 1e-5 < gradient[dense[1], 0].abs() and gradient[dense[1], 1] == 0


@pytest.mark.parametrize("settings", [{"layers": "weights"}, {"gradient_checkpointing": True}, {"tokens_per_pass": 4}])
def test_every_way_to_learn_finds_the_same(prepared, settings):
    model, _, stack, batch = prepared
    found = [
        learn(
            model,
            whitened(stack),
            TARGETS,
            lambda _: [batch],
            nsc.MergeConfig(steps=3, lr=0.01, **more),
            progress=False,
        )
        for more in ({}, settings)
    ]
    torch.testing.assert_close(found[0].coefficients, found[1].coefficients, rtol=0, atol=1e-8)
    absent = stack.names.index(DOWN)
    assert found[0].frozen[absent].tolist() == [False, True] and found[0].coefficients[absent, 1] == 0.4
    assert GATE not in choose_plans(model, stack, "weights", 9)


def test_merged_weights_are_the_plain_sum(whole, tmp_path):
    base, made = whole
    result = nsc.merge(base, made, {"a": ["word5 word6"], "b": ["word7 word8"]}, steps=4, lr=0.05, progress=False)
    assert result.save(tmp_path / "adapter").outputs < 1e-6
    assert result.save(tmp_path / "full", full=True).outputs < 1e-6
    full, stored = load_file(tmp_path / "full/model.safetensors"), load_file(base / "model.safetensors")
    written = load_file(tmp_path / "adapter/adapter_model.safetensors")
    row = result.coefficients[result.modules.index(GATE)].double()
    assert (row - 0.4).abs().min() > 0.01
    for key in ("weight", "bias"):
        name = f"{GATE}.{key}"
        expected = stored[name] + sum(
            c * (load_file(made[t] / "adapter_model.safetensors")[f"base_model.model.{name}"] - stored[name])
            for c, t in zip(row, result.tasks, strict=True)
        )
        torch.testing.assert_close(full[name], expected, rtol=0, atol=1e-10)
        assert torch.equal(written[f"base_model.model.{name}"], expected.float())
    assert torch.equal(full["layers.3.mlp.gate_proj.bias"], stored["layers.3.mlp.gate_proj.bias"])


def test_the_model_is_what_it_was_after_the_proof(whole):
    base, made = whole
    model = load_body(Base(str(base)))
    before = {name: id(p) for name, p in model.named_parameters()}
    stack = nsc.merge(base, made, {"a": ["word5"], "b": ["word7"]}, steps=0, progress=False).stack
    with merged_layers(model, stack, torch.zeros(7, 2)) as layers:
        assert isinstance(layers[GATE], MergedDenseLinear)
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_delta_of_a_stack():
    stack = DenseStack(torch.ones(2, 3, 5), None, [True, False, True])
    assert stack.delta(torch.tensor([1.0, 100.0, 2.0])).unique().tolist() == [3.0]
    assert stack.bias_delta(torch.zeros(3)) is None


REFUSALS = {
    "another shape": ({f"model.{GATE}.weight": (47, 32)}, r"\(47, 32\), but the base's is \(48, 32\)"),
    "an embedding": ({"model.embed_tokens.weight": (64, 32)}, "no linear layer of the base"),
    "a norm": ({"model.norm.weight": (32,)}, "no linear layer of the base"),
    "a bias of none": ({f"model.{GATE}.weight": (48, 32), f"model.{GATE}.bias": (48,)}, "no parameter of the base"),
}


@pytest.mark.parametrize(("saved", "why"), REFUSALS.values(), ids=list(REFUSALS))
def test_what_cannot_be_merged_says_why(base, tmp_path, saved, why):
    tensors = {name: torch.ones(shape) for name, shape in saved.items()}
    factors = random_factors(["model.layers.3.self_attn.q_proj"])
    adapter = write_adapter(tmp_path / "a", factors, saved=tensors, target_modules=sorted(factors))
    with pytest.raises(NameMismatch, match=why):
        nsc.merge(base, {"a": adapter}, {"a": ["word5"]}, progress=False)


def test_lora_of_another_adapter_on_the_same_layer(base, tmp_path, texts):
    whole = peft_adapter(
        tmp_path / "a", tiny_llama("AutoModelForCausalLM"), target_modules=["v_proj"], modules_to_save=["gate_proj"]
    )
    lora = peft_adapter(tmp_path / "b", tiny_llama("AutoModelForCausalLM"), target_modules=["v_proj", "gate_proj"])
    data = {"a": texts["plain"], "b": texts["plain"]}
    with pytest.raises(NameMismatch, match=r"a fine-tuned .*gate_proj whole, adapter b by LoRA"):
        nsc.merge(base, {"a": whole, "b": lora}, data, progress=False)
    kept = nsc.merge(base, {"a": whole, "b": lora}, data, progress=False, steps=1, keep_modules=("gate_proj",))
    assert not kept.stack.dense and len(kept.adapters["a"].saved) == 4


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_tied_weights(tmp_path, module):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    name = "lm_head.weight" if module == "lm_head" else "model.embed_tokens.weight"
    factors = random_factors(["model.layers.0.self_attn.q_proj", "model.layers.3.self_attn.q_proj"])
    adapter = write_adapter(tmp_path / "a", factors, saved={name: torch.ones(64, 32)}, target_modules=sorted(factors))
    with pytest.raises(NameMismatch, match=rf"{module}.*ties to another parameter.*keep_modules"):
        nsc.merge(base, {"a": adapter}, {"a": ["word5"]}, progress=False)
    kept = nsc.merge(base, {"a": adapter}, {"a": ["word5"]}, progress=False, steps=0, keep_modules=(module,))
    assert list(kept.adapters["a"].saved) == [name]


def test_a_module_to_keep_that_is_not_there(whole):
    base, made = whole
    with pytest.raises(NSCError, match=r"keep_modules names score, but .* holds layers\.0\.mlp\.gate_proj"):
        nsc.merge(base, made, {"a": ["word5"], "b": ["word7"]}, progress=False, keep_modules=["score"])


def test_a_rank_and_layers_that_vllm_does_not_take():
    from nsc.export.report import vllm_limits

    assert vllm_limits(512, []) == []
    (rank,) = vllm_limits(513, [])
    assert "rank 513 is above 512" in rank and "--rank" in rank and "--full" in rank
    (saved,) = vllm_limits(8, ["w", "x", "y", "z"])
    assert "such modules_to_save, here w, x, y and 1 more" in saved and "--full" in saved
