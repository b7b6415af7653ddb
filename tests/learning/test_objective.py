"""Exactness of the packed, truncated, whitened step, in float64 to 1e-10, against the plain way of writing it."""

import copy
from itertools import product

import pytest
import torch

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import Stack, stack_adapters, whitened
from nsc.adapters.surgery import choose_plans, merged_layers, set_coefficients, share_inputs
from nsc.bases.roles import choose_targets
from nsc.batch import Batch
from nsc.data.packing import collate
from nsc.errors import TargetError
from nsc.learning.assembly import initial_gradient
from nsc.learning.objective import NullSpaceObjective
from nsc_kernels.modules import layer_plan
from tests.plain import plain_objective
from tests.tiny import linears, random_factors, tiny_llama, write_adapter

TASKS = ("a", "b", "c")
TARGETS = ["layers.2.self_attn.v_proj", "layers.3.self_attn.v_proj", "layers.3.mlp.down_proj"]
MIXED_TARGETS = {
    "v of the last quarter": ["layers.3.self_attn.v_proj"],
    "v and down of three blocks": [
        f"layers.{i}.{kind}" for i in (1, 2, 3) for kind in ("self_attn.v_proj", "mlp.down_proj")
    ],
    "all that read one tensor": [
        f"layers.2.{kind}" for kind in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    ],
    "some of two groups": ["layers.1.self_attn.k_proj", "layers.3.self_attn.v_proj", "layers.3.mlp.up_proj"],
}
EXACT = {"rtol": 0, "atol": 1e-10}


@pytest.fixture(scope="module")
def model():
    made = tiny_llama("AutoModel").double().requires_grad_(False).eval()
    made.config.use_cache = False  # as load_body has it: a block that runs twice would append to it
    return made


@pytest.fixture(scope="module")
def stack(model, tmp_path_factory) -> Stack:
    """Three adapters of ranks 2, 3, 5 and scales 1, 2, 0.5 on q, v and down; c has none on q, and a dependent row."""
    kinds = {
        "a": ("q_proj", "v_proj", "down_proj"),
        "b": ("q_proj", "v_proj", "down_proj"),
        "c": ("v_proj", "down_proj"),
    }
    return make_stack(model, tmp_path_factory, kinds)


@pytest.fixture(scope="module")
def mixed(model, tmp_path_factory) -> Stack:
    """The same adapters on all seven projections, but for some that are absent."""
    qkv, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    kinds = {"a": (*qkv, "o_proj", *mlp), "b": ("k_proj", "v_proj", *mlp), "c": (*qkv, "up_proj")}
    return make_stack(model, tmp_path_factory, kinds)


def make_stack(model, tmp_path_factory, kinds) -> Stack:
    shapes = linears(model)
    adapters = {}
    for seed, (task, rank, scale) in enumerate(zip(TASKS, (2, 3, 5), (1, 2, 0.5), strict=True)):
        factors = {}
        for name in (n for n in shapes if n.endswith(kinds[task])):
            m, d = shapes[name]
            (A, B) = random_factors([name], r=rank, d=d, m=m, seed=seed * 100 + len(factors))[name]
            factors[name] = (A.double() / d**0.5, B.double() / rank)
            if task == "c":
                factors[name][0][4] = factors[name][0][0]
        path = write_adapter(tmp_path_factory.mktemp(task), factors, r=rank, alpha=rank * scale)
        adapters[task] = read_adapter(path, task)
    matches = {task: {name: name for name in adapter.factors} for task, adapter in adapters.items()}
    return stack_adapters(adapters, matches, shapes)


def make_batch(seed: int = 0, causal: bool = False) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    lengths, tasks = [5, 9, 7, 3, 8, 1], [0, 0, 1, 1, 2, 2]
    samples = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in lengths]
    batch = collate(samples, tasks, pad_id=0, causal=causal)
    return Batch(batch.inputs, batch.task, batch.weight.double())


def make_lam(stack: Stack) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.rand(len(stack.names), len(stack.tasks), generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("prepare", [whitened, lambda stack: stack], ids=["whitened", "gram"])
@pytest.mark.parametrize("targets", [TARGETS, TARGETS[:1]], ids=["three targets", "one target"])
def test_packed_truncated_step_equals_the_plain_loop(model, stack, prepare, targets):
    lam, batch = make_lam(stack), make_batch()
    plain = lam.clone().requires_grad_()
    expected = plain_objective(model, stack, plain, batch, targets)
    (gradient,) = torch.autograd.grad(expected, plain)
    loss, packed = initial_gradient(model, prepare(stack), targets, batch, lam)
    torch.testing.assert_close(loss, expected.detach(), **EXACT)
    torch.testing.assert_close(packed, gradient, **EXACT)
    assert gradient.abs().max() > 1e-4


def test_packed_gradient_is_the_sum_of_per_task_gradients(model, stack):
    lam, batch, lean = make_lam(stack), make_batch(), whitened(stack)
    loss, packed = initial_gradient(model, lean, TARGETS, batch, lam)
    alone = []
    for k in range(3):
        mine = batch.task[:, 0] == k
        part = Batch({key: v[mine] for key, v in batch.inputs.items()}, batch.task[mine], batch.weight[mine])
        alone.append(initial_gradient(model, lean, TARGETS, part, lam))
    torch.testing.assert_close(sum(g for _, g in alone), packed, **EXACT)
    torch.testing.assert_close(sum(value for value, _ in alone), loss, **EXACT)


def test_forward_stops_at_the_last_target(model, stack):
    ran = []
    names = ["layers.2.mlp.gate_proj", "layers.2.mlp", "layers.3.self_attn.o_proj", "norm"]
    hooks = [model.get_submodule(n).register_forward_hook(lambda *_, n=n: ran.append(n)) for n in names]
    with merged_layers(model, whitened(stack), make_lam(stack)) as layers:
        NullSpaceObjective(model, layers, whitened(stack), TARGETS[:1]).loss(make_batch())
    for hook in hooks:
        hook.remove()
    assert ran == []


def test_padding_never_counts(model, stack):
    batch = make_batch()
    garbage = dict(batch.inputs)
    garbage["input_ids"] = torch.where(batch.weight > 0, garbage["input_ids"], 33)
    lam, lean = make_lam(stack), whitened(stack)
    clean = initial_gradient(model, lean, TARGETS, batch, lam)
    dirty = initial_gradient(model, lean, TARGETS, Batch(garbage, batch.task, batch.weight), lam)
    torch.testing.assert_close(dirty, clean, **EXACT)


def test_a_causal_model_needs_no_mask(model, stack):
    lam, lean = make_lam(stack), whitened(stack)
    masked = initial_gradient(model, lean, TARGETS, make_batch(causal=False), lam)
    unmasked = initial_gradient(model, lean, TARGETS, make_batch(causal=True), lam)
    assert "attention_mask" not in make_batch(causal=True).inputs
    torch.testing.assert_close(unmasked, masked, rtol=0, atol=1e-7)  # HF's masked and unmasked kernels round apart


def test_ratios_are_the_parts_of_the_loss(model, stack):
    lean, lam, batch = whitened(stack), make_lam(stack), make_batch()
    with merged_layers(model, lean, lam) as layers:
        objective = NullSpaceObjective(model, layers, lean, TARGETS)
        table, loss = objective.ratios(batch), objective.loss(batch)
    assert table.shape == (3, 3) and ((table > 0) & (table <= 1)).all()
    torch.testing.assert_close(table.mean(), loss, **EXACT)


@pytest.mark.parametrize("samples", [1, 2, 4, 6, 9])
def test_parts_of_a_batch_add_up(model, stack, samples):
    lean, lam, batch = whitened(stack), make_lam(stack), make_batch()
    loss, gradient = initial_gradient(model, lean, TARGETS, batch, lam)
    parts = [initial_gradient(model, lean, TARGETS, part, lam) for part in batch.split(samples)]
    assert len(parts) == -(-6 // samples)
    torch.testing.assert_close(sum(value for value, _ in parts), loss, **EXACT)
    torch.testing.assert_close(sum(g for _, g in parts), gradient, **EXACT)


def test_surgery_is_reversible_also_after_an_error(model, stack):
    before = copy.deepcopy(model.state_dict())
    modules = {name: model.get_submodule(name) for name in stack.names}
    with pytest.raises(RuntimeError, match="on purpose"), merged_layers(model, stack, make_lam(stack)):
        assert model.get_submodule(stack.names[0]) is not modules[stack.names[0]]
        raise RuntimeError("on purpose")
    assert all(model.get_submodule(name) is module for name, module in modules.items())
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_samples_weigh_the_same_within_a_task():
    batch = collate([[5, 6, 7, 8], [9], [4, 3]], [0, 0, 1], pad_id=0, causal=True)
    assert batch.weight.tolist() == [[0.125] * 4, [0.5, 0, 0, 0], [0.5, 0.5, 0, 0]]


@pytest.mark.parametrize("plan", ["factors", "weights", "auto"])
@pytest.mark.parametrize("prepare", [whitened, lambda stack: stack], ids=["whitened", "gram"])
@pytest.mark.parametrize("targets", MIXED_TARGETS.values(), ids=MIXED_TARGETS)
def test_every_way_to_run_a_step_is_the_plain_loop(model, mixed, targets, prepare, plan):
    """By factors and by weights, layers that share their input, and blocks that run again for the backward."""
    batch, plain, form = make_batch(), make_lam(mixed).requires_grad_(), prepare(mixed)
    expected = plain_objective(model, mixed, plain, batch, targets)
    (gradient,) = torch.autograd.grad(expected, plain)
    assert gradient.abs().max() > 1e-4
    for share, checkpointing in product((False, True), repeat=2):
        lam = make_lam(mixed).requires_grad_()
        with merged_layers(model, form, lam.detach(), choose_plans(model, form, plan, 30)) as layers:
            if share:
                share_inputs(model, layers, targets, batch.within(1)[0])
            set_coefficients(layers, lam)
            loss = NullSpaceObjective(model, layers, form, targets, checkpointing).loss(batch)
            loss.backward()
        torch.testing.assert_close(loss.detach(), expected.detach(), **EXACT)
        torch.testing.assert_close(lam.grad, gradient, **EXACT)


def test_the_cheaper_plan_is_chosen_for_each_layer(model, stack):
    """With few rows a wide layer runs by factors and a narrow one by weights; what has no weight, by factors."""
    few = choose_plans(model, stack, "auto", 20)
    assert set(few.values()) == {"factors", "weights"}
    for name, plan in few.items():
        R, d = stack.modules[name].A.shape
        assert plan == layer_plan(20, d, stack.modules[name].B.shape[0], R)
    replaced = copy.deepcopy(model)
    name = stack.names[0]
    replaced.get_submodule(name).__class__ = type("Quantised", (torch.nn.Linear,), {})
    assert choose_plans(replaced, stack, "weights", 1000)[name] == "factors"


def test_default_targets_follow_the_depth(model, stack):
    assert choose_targets(model, stack.names) == ["layers.3.self_attn.v_proj"]
    down = choose_targets(model, stack.names, modules=["down_proj"], blocks=[0, 2])
    assert down == ["layers.0.mlp.down_proj", "layers.2.mlp.down_proj"]
    q_only = [name for name in stack.names if name.endswith("q_proj")]
    assert choose_targets(model, q_only) == ["layers.3.self_attn.q_proj"]


@pytest.mark.parametrize("choice", [{"modules": ["k_proj"]}, {"blocks": [9]}, {"blocks": []}])
def test_no_target_is_an_error_that_says_what_there_was(model, stack, choice):
    with pytest.raises(TargetError, match=r"of 4 blocks.*down_proj, q_proj, v_proj"):
        choose_targets(model, stack.names, **choice)


def test_an_adapter_without_a_target_is_an_error(model, stack):
    with merged_layers(model, stack, make_lam(stack)) as layers, pytest.raises(TargetError, match="adapter c touches"):
        NullSpaceObjective(model, layers, stack, ["layers.3.self_attn.q_proj"])
