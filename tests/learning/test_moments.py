"""Moments collected in packed sweeps, against a loop over single samples through models with an adapter folded in."""

from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

from nsc.adapters.stack import Stack
from nsc.batch import Batch
from nsc.data.packing import pack
from nsc.errors import NonFiniteError, NSCError, TargetError
from nsc.learning.moments import Rows, fit, mean_magnitudes
from nsc.learning.passes import in_passes
from nsc.methods import METHODS, LowRank
from nsc.methods.equations import Gram
from nsc.methods.inputs import Inputs
from nsc.recipes.combination import Combination, stack_of, updates_of
from nsc.recipes.spec import read_recipe
from nsc.runtime.distributed import join
from tests.methods.test_method_laws import layers
from tests.regressions import moments_of
from tests.runtime.ranks import together
from tests.stacks import random_stack, random_tokens
from tests.tiny import tiny_llama, tiny_vit

TASKS = ("a", "b")
LENGTHS = {"a": (3, 9, 4, 1), "b": (7, 2)}
LLAMA = [f"layers.{i}.{part}" for i in range(4) for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]
INPUTS = {name: method.inputs for name, method in METHODS.items() if method.inputs}


def bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return transformers.AutoModel.from_config(config).eval()


def texts_of(model: nn.Module, causal: bool) -> tuple[Rows, dict[str, list[dict[str, Tensor]]]]:
    """Packed rows of each task, and every sample alone."""
    tokens = random_tokens(LENGTHS)

    def batches(task: str) -> list[Batch]:
        rows = tokens[task]
        return in_passes(pack(rows, [0] * len(rows), 0, causal=causal, shares_rows=causal), 12)

    alone = {task: [{"input_ids": torch.tensor([ids])} for ids in rows] for task, rows in tokens.items()}
    return {task: (lambda task=task: batches(task)) for task in tokens}, alone


def pixels_of() -> tuple[Rows, dict[str, list[dict[str, Tensor]]]]:
    from nsc.data.images import collate_images

    generator = torch.Generator().manual_seed(0)
    images = {task: torch.randn(n, 3, 8, 8, generator=generator).double() for task, n in (("a", 3), ("b", 2))}
    rows = {task: (lambda x=x: in_passes([collate_images(list(x), [0] * len(x), 5)], 10)) for task, x in images.items()}
    return rows, {task: [{"pixel_values": image[None]} for image in x] for task, x in images.items()}


Case = tuple[nn.Module, list[str], Rows, dict[str, list[dict[str, Tensor]]]]


def case(kind: str) -> Case:
    """A model in float64, its layers with LoRA, and rows."""
    if kind == "llama":
        model = tiny_llama(initializer_range=0.3).double()
        return model, LLAMA, *texts_of(model, causal=True)
    if kind == "bert":
        model = bert().double()
        names = [
            f"encoder.layer.{i}.{part}" for i in range(2) for part in ("attention.self.query", "attention.self.value")
        ]
        return model, [*names, "encoder.layer.1.intermediate.dense"], *texts_of(model, causal=False)
    model = tiny_vit(initializer_range=0.3).double()
    wanted = ("query", "value", "q_proj", "v_proj")
    names = [name for name, x in model.named_modules() if isinstance(x, nn.Linear) and name.endswith(wanted)]
    return model, names, *pixels_of()


def stack_on(model: nn.Module, names: list[str], folder: Path) -> Stack:
    return random_stack(model, names, TASKS, folder)


def add(model: nn.Module, updates: dict[str, Tensor]) -> nn.Module:
    """A copy with dense updates folded in."""
    other = deepcopy(model)
    for name, delta in updates.items():
        other.get_submodule(name).weight.data += delta
    return other


@torch.no_grad()
def listen(model: nn.Module, names: list[str], sample: dict[str, Tensor]) -> dict[str, Tensor]:
    """(t, d) inputs of each layer, of one sample alone."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2))
        )
        for name in names
    ]
    model(**sample)
    for hook in hooks:
        hook.remove()
    return seen


def weighted(samples: list[Tensor]) -> Tensor:
    """Tokens of which the plain mean of products is the mean over samples of means over tokens."""
    rows = sum(map(len, samples))
    return torch.cat([x * (rows / (len(samples) * len(x))) ** 0.5 for x in samples])


def plain(
    model: nn.Module, stack: Stack, alone: dict, inputs: Inputs, solve: Callable[..., LowRank], rounds: int
) -> tuple[dict[str, LowRank], dict]:
    """``fit`` again, sample by sample."""
    names, dense = list(stack.modules), {k: {} for k in range(len(TASKS))}
    for name in names:
        updates = updates_of(stack.modules[name], name, stack.tasks, [1.0, 1.0], torch.device("cpu"))
        for k, D in enumerate(updates.deltas()):
            dense[k][name] = D.double()
    found: dict[str, LowRank] = {}
    for _ in range(rounds):
        merge, found, told = found, {}, {}
        for name in names:
            block = name.split(".")[1]
            below = {n: f.B @ f.A for n, f in found.items() if inputs.run == "below" and n.split(".")[1] != block}
            X, Y = [], []
            for k, task in enumerate(TASKS):
                expert = add(model, {**dense[k], **below})
                X.append(weighted([listen(expert, [name], sample)[name] for sample in alone[task]]))
                if merge and inputs.run == "merge":
                    other = add(model, {n: f.B @ f.A for n, f in merge.items()})
                    Y.append(weighted([listen(other, [name], sample)[name] for sample in alone[task]]))
            updates = updates_of(stack.modules[name], name, stack.tasks, [1.0, 1.0], torch.device("cpu"))
            told[name] = moments_of(inputs, updates, X, Y or None, model.get_submodule(name).weight.data)
            found[name] = solve(name, told[name])
    return found, told


def collected(model, stack, rows, inputs, solve, rounds, **more) -> tuple[dict[str, LowRank], dict]:
    """``fit``, and the moments of the last round."""
    told = {}

    def keep(name, moments):
        told[name] = moments
        return solve(name, moments)

    return fit(model, stack, rows, inputs, keep, rounds, **more), told


def parts(value: Tensor | tuple | Gram) -> tuple[Tensor, ...]:
    if isinstance(value, Gram):
        return (value.product(torch.eye(len(value.beside), dtype=torch.float64)),)
    return value if isinstance(value, tuple) else (value,)


def require_same(found: dict, wanted: dict, tolerance: float) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        for key, value in vars(wanted[name]).items():
            mine, theirs = parts(getattr(found[name], key)), parts(value)
            for a, b in zip(mine, theirs, strict=True):
                assert a.dtype == torch.float64 and a.shape == b.shape
                assert (a - b).norm() <= tolerance * b.norm(), (name, key)


@pytest.mark.parametrize(
    ("kind", "method"),
    [("llama", name) for name in INPUTS] + [("bert", "ssr"), ("bert", "iteris"), ("vit", "regmean"), ("vit", "ssr")],
)
@pytest.mark.parametrize("tokens", [None, 10**9], ids=["few tokens", "many"])
def test_moments_are_those_of_a_loop_over_samples(kind, method, tokens, tmp_path):
    """Batches hold weights in float32, which is all that differs."""
    model, names, rows, alone = case(kind)
    stack = stack_on(model, names, tmp_path)
    solve = solver(stack, method)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    rounds = 2 if INPUTS[method].run == "merge" else 1
    found, told = collected(model, stack, rows, INPUTS[method], solve, rounds, tokens=tokens)
    assert INPUTS[method].of == "u" or all((m.second.rows is None) == (tokens is not None) for m in told.values())
    wanted, by_hand = plain(model, stack, alone, INPUTS[method], solve, rounds)
    require_same(told, by_hand, 2e-5 if rounds > 1 else 2e-6)
    for name in wanted:
        assert (found[name].A - wanted[name].A).norm() <= 1e-3 * wanted[name].A.norm()
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def solver(stack: Stack, method: str) -> Callable[..., LowRank]:
    combination = Combination(stack, read_recipe(method))
    return lambda name, moments: combination.solution(name, moments)[0]


@pytest.mark.parametrize("method", INPUTS)
def test_a_sweep_for_each_layer_gives_the_same(method, tmp_path):
    model, names, rows, _ = case("llama")
    stack = stack_on(model, names, tmp_path)
    rounds = 2 if INPUTS[method].run == "merge" else 1
    solve = solver(stack, method)
    whole = collected(model, stack, rows, INPUTS[method], solve, rounds)[1]
    require_same(collected(model, stack, rows, INPUTS[method], solve, rounds, budget=1)[1], whole, 1e-13)


@pytest.mark.parametrize("method", INPUTS)
@pytest.mark.parametrize(("tokens", "size"), [(None, 4), (10**9, 2)], ids=["few tokens", "many"])
def test_processes_find_what_one_does(method, tokens, size, tmp_path):
    """Four of them have more ranks than task b has rows."""
    model, names, rows, _ = case("llama")
    stack = stack_on(model, names, tmp_path)
    rounds = 2 if INPUTS[method].run == "merge" else 1
    find = partial(collected, model, stack, rows, INPUTS[method], solver(stack, method), rounds, tokens=tokens)
    wanted, outcomes = find()[1], together(tmp_path, size, lambda rank: find(team=join())[1])
    for told in outcomes:
        require_same(told, outcomes[0], 0.0)
        require_same(told, wanted, 1e-12)


def test_layers_that_read_one_tensor_share_one_sum(tmp_path):
    model, names, rows, _ = case("llama")
    told = collected(model, stack_on(model, names, tmp_path), rows, Inputs("x"), lambda *_: None, 1)[1]
    sums = {name: moments.second.rows.data_ptr() for name, moments in told.items()}
    for i in range(4):
        assert sums[f"layers.{i}.self_attn.q_proj"] == sums[f"layers.{i}.self_attn.v_proj"]
    assert len(set(sums.values())) == 8


@pytest.mark.parametrize("method", INPUTS)
def test_padding_never_counts(method, tmp_path):
    """Whatever the embedding of the padding token, the sums are the same bit for bit."""
    model, names, rows, _ = case("llama")
    stack, told = stack_on(model, names, tmp_path), []
    assert any((batch.weight == 0).any() for task in TASKS for batch in rows[task]())
    for padding in (0.0, 1e6):
        model.embed_tokens.weight.data[0] = padding
        rounds = 2 if INPUTS[method].run == "merge" else 1
        told.append(collected(model, stack, rows, INPUTS[method], solver(stack, method), rounds)[1])
    require_same(*told, 0.0)


class Bare(nn.Module):
    """An embedding and two linears, the second of which is given ``rows`` rows."""

    def __init__(self, rows: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.rows = nn.Embedding(9, 40), rows
        self.first, self.second = nn.Linear(40, 26), nn.Linear(26, 40)

    def forward(self, input_ids: Tensor, **_: Tensor) -> tuple[Tensor]:
        return (self.second(self.first(self.embedding(input_ids))[: self.rows]),)


def few(counted: int = 3) -> Rows:
    """A row of five tokens, of which the last do not count."""
    ids, weight = torch.tensor([[3, 4, 5, 0, 0]]), torch.zeros(1, 5)
    weight[:, :counted] = 1 / counted
    return {task: lambda: [Batch({"input_ids": ids}, torch.zeros_like(ids), weight)] for task in "abc"}


@pytest.mark.parametrize("of", ["u", "x"])
def test_a_token_that_is_not_a_number_does_no_harm_unless_it_counts(of):
    model, stack = Bare(), stack_of(layers())
    model.embedding.weight.data[0] = float("nan")
    told = collected(model, stack, few(), Inputs(of), lambda *_: None, 1)[1]
    assert all(part.isfinite().all() for moments in told.values() for part in parts(moments.second))
    with pytest.raises(NonFiniteError, match=r"enter first \(task a\)"):
        fit(model, stack, few(4), Inputs(of), lambda *_: None)


def test_what_cannot_be_collected():
    stack = stack_of(layers())
    two = {task: lambda: [batch for batch in few()["a"]() for _ in range(2)] for task in "abc"}
    assert fit(Bare(), stack, two, Inputs("u"), lambda *_: None).keys() == {"first", "second"}
    model = Bare(rows=0)
    with pytest.raises(TargetError, match="second saw 0 rows of a batch of 5 tokens"):
        fit(model, stack, few(), Inputs("u"), lambda *_: None)
    model.forward = lambda input_ids, **_: (model.first(model.embedding(input_ids)),)
    with pytest.raises(TargetError, match="second never ran"):
        fit(model, stack, few(), Inputs("u"), lambda *_: None)
    model = Bare()
    model.first = nn.Sequential(model.first)
    with pytest.raises(NSCError, match="first is quantised or offloaded"):
        fit(model, stack, few(), METHODS["iteris"].inputs, lambda *_: None)


@pytest.mark.parametrize("kind", ["llama", "bert", "vit"])
def test_mean_magnitudes_are_those_of_the_base_on_single_samples(kind, tmp_path):
    """Every task the same, every sample of a task the same, every token of a sample the same; no adapter is in it."""
    model, names, rows, alone = case(kind)
    found = mean_magnitudes(model, stack_on(model, names, tmp_path), rows)
    assert set(found) == set(names)
    for name in names:
        of_tasks = [
            torch.stack([listen(model, [name], sample)[name].abs().mean(0) for sample in alone[task]]).mean(0)
            for task in TASKS
        ]
        torch.testing.assert_close(found[name], torch.stack(of_tasks).mean(0), rtol=1e-7, atol=0)  # weights are float32


def test_magnitudes_that_are_not_finite_are_refused(tmp_path):
    model, names, rows, _ = case("llama")
    model.layers[1].self_attn.q_proj.weight.data[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite activations enter layers"):
        mean_magnitudes(model, stack_on(model, names, tmp_path), rows)
