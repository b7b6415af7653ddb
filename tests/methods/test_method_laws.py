"""Laws that every merging method keeps in every space, and for each law the methods that cannot, with the reason.

The parameters are all names there are: a method that is added is covered, or must be named below. An exception that
turns out to keep its law fails too.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsc.adapters.stack import Stack
from nsc.errors import NSCError
from nsc.methods import LowRank, Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import names, read_recipe
from tests.merging_goldens import dense
from tests.regressions import with_rows

ISOTROPIZED = ("core-task-arithmetic, isotropized", "ctm-task-arithmetic, isotropized", "ties, isotropized")
NAMES = [*names(), *ISOTROPIZED]
TASKS, LAYERS = tuple("abc"), {"first": (26, 40), "second": (40, 26)}
SCALES = (2.0, 4.0, 1.0)
WEIGHTS = {"a": 0.7, "b": 1.3, "c": 1.0}

# Method -> settings with which it changes nothing that it need not.
NEUTRAL = {
    "ties": {"density": 1.0},
    "dare": {"drop": 0.0},
    "dare-ties": {"drop": 0.0},
    "robustmerge": {"density": 1.0, "fuse": 1.0},
    "ties, isotropized": {"density": 0.5},
    "ssr": {"ridge": 0.0},
    "featcal": {"p": 1.0, "t": 1.0},
}

BASIS = "the bases are singular vectors of the stacked factors, and entries in another basis are other entries"
OTHER_FACTORS = {
    "core-ties": BASIS,
    "core-dare": BASIS,
    "core-dare-ties": BASIS,
    "linear": "cross terms B_i A_j",
    "lego": "units of A and B side by side are averaged and measured",
    "robustmerge": "factors of different tasks are added",
}
JOINT = {"lego": "the largest entry of a unit is looked for in A and B together"}
CHANGES_ONE = {
    "iso-c": "all singular values become their mean",
    "iso-cts": "all singular values become their mean",
    **dict.fromkeys(ISOTROPIZED, "all singular values become their mean"),
    "fr": "frequencies are taken out, and those on the inner ring count twice",
}
NOT_FOLDED = {"linear": "half of each scale is in either factor, so that cross terms have the mean of two"}
ROOM = "refused: the core has room for an adapter without effect, so it is singular"
NO_ZEROS = {
    "core-ties": BASIS,
    "core-dare": BASIS,
    "core-dare-ties": BASIS,
    "core-cart": "ranks are fractions of the core's size, to which an adapter without effect adds its own",
    "iso-c": ROOM,
    "iso-cts": ROOM,
    ISOTROPIZED[0]: ROOM,
    "linear": "adapters without the layer are left out, and one without effect has cross terms",
    "lego": "adapters without the layer are left out, and one without effect has units",
    "robustmerge": "adapters without the layer are left out, and one without effect is averaged over",
    "zero-interference": "adapters without the layer are left out, and the merge does nothing on the rows of one's A",
    "ssr": "the span has no directions of an adapter without the layer, though its inputs count",
}
LEFT_OUT = ("linear", "lego", "robustmerge", "zero-interference")

everyone = pytest.mark.parametrize("name", NAMES)


def method_of(name: str) -> str:
    """Without the space."""
    return next((name[len(prefix) :] for prefix in ("core-", "knots-", "ctm-") if name.startswith(prefix)), name)


def recipe(name: str, **settings):
    if name in ISOTROPIZED:
        return read_recipe(name.partition(",")[0], isotropize=True, **settings)
    return read_recipe(name, **settings)


def layers(
    tasks=TASKS, scales=SCALES, rank: int = 4, shapes: Mapping[str, tuple[int, int]] = LAYERS, dtype=torch.float64
) -> dict[str, Updates]:
    """Random factors that depend on the names of layer and task only."""

    def normal(layer: str, task: str, side: int, *shape: int) -> Tensor:
        seed = 1000 * list(shapes).index(layer) + 10 * ord(task) + side
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)

    return {
        layer: Updates(
            layer,
            tuple(tasks),
            tuple(normal(layer, t, 0, rank, d) for t in tasks),
            tuple(normal(layer, t, 1, m, rank) for t in tasks),
            tuple(scales),
            (1.0,) * len(tasks),
        )
        for layer, (m, d) in shapes.items()
    }


def merge(
    adapters: dict[str, Updates] | Stack, name: str, coefficients: Tensor | None = None, **settings
) -> list[Tensor]:
    """The merged update of every layer, dense, float64."""
    stack = adapters if isinstance(adapters, Stack) else stack_of(adapters)
    combination = with_rows(Combination(stack, recipe(name, **settings), coefficients))
    return [dense(combination.update(layer)).double() for layer in combination.names]


def same(merged: list[Tensor], expected: list[Tensor], tolerance: float = 1e-10) -> bool:
    pairs = zip(merged, expected, strict=True)
    return all((f - e).abs().max() <= tolerance * e.abs().max() for f, e in pairs)


def each(adapters: dict[str, Updates], change: Callable[[Updates], Updates]) -> dict[str, Updates]:
    return {layer: change(updates) for layer, updates in adapters.items()}


def refactored(factors: tuple[float, ...]) -> Callable[[Updates], Updates]:
    """A_k times, B_k divided by."""

    def change(u: Updates) -> Updates:
        return replace(
            u,
            A=tuple(a * c for a, c in zip(u.A, factors, strict=True)),
            B=tuple(b / c for b, c in zip(u.B, factors, strict=True)),
        )

    return change


@everyone
def test_order_of_tasks(name):
    order = (2, 0, 1)
    turned = layers([TASKS[k] for k in order], [SCALES[k] for k in order])
    assert same(merge(turned, name, weights=WEIGHTS), merge(layers(), name, weights=WEIGHTS))


@everyone
def test_a_against_b(name):
    expected = merge(layers(), name)
    assert same(merge(each(layers(), refactored((3.0, 0.2, 1.7))), name), expected) == (name not in OTHER_FACTORS)
    assert same(merge(each(layers(), refactored((3.0, 3.0, 3.0))), name), expected) == (name not in JOINT)


@everyone
def test_one_task_is_itself(name):
    alone = layers(TASKS[:1], SCALES[:1])
    own = [u.scales[0] * u.B[0] @ u.A[0] for u in alone.values()]
    merged = merge(alone, name, **NEUTRAL.get(method_of(name), {}))
    assert same(merged, own) == (name not in CHANGES_ONE)


@everyone
def test_the_scale_is_applied_once(name):
    assert same(merge(layers(), name, scale=2.0), [2 * D for D in merge(layers(), name)])


@everyone
def test_alpha_over_r_is_applied_once(name):
    """Scales 2, 4, 1 beside the factors are the same as in B."""
    folded = each(layers(scales=(1.0,) * 3), lambda u: replace(u, B=tuple(s * b for s, b in zip(SCALES, u.B))))  # noqa: B905
    assert same(merge(folded, name), merge(layers(), name)) == (name not in NOT_FOLDED)


def test_half_of_a_scale_is_in_either_factor_of_linear():
    if "linear" not in names():
        pytest.skip("not here yet")
    roots = [s**0.5 for s in SCALES]
    halves = each(
        layers(scales=(1.0,) * 3),
        lambda u: replace(
            u,
            A=tuple(r * a for r, a in zip(roots, u.A, strict=True)),
            B=tuple(r * b for r, b in zip(roots, u.B, strict=True)),
        ),
    )
    assert same(merge(halves, "linear"), merge(layers(), "linear"))


@everyone
def test_a_common_weight_is_a_scale(name):
    weighted = merge(layers(), name, weights=dict.fromkeys(TASKS, 0.4))
    assert same(weighted, merge(layers(), name, scale=0.4)) == (name not in JOINT)


@everyone
def test_coefficients_are_weights_of_each_layer(name):
    rows = torch.tensor([list(WEIGHTS.values())] * len(LAYERS), dtype=torch.float64)
    assert same(merge(layers(), name, rows), merge(layers(), name, weights=WEIGHTS))


@everyone
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_dtypes(name, dtype):
    """What the rounded factors give in float64, to the precision of float32."""
    small = layers(dtype=dtype)
    combination = with_rows(Combination(stack_of(small), recipe(name)))
    assert {part.dtype for part in parts(combination)} <= {torch.float32, torch.float64}
    rounded = each(small, lambda u: replace(u, A=tuple(a.double() for a in u.A), B=tuple(b.double() for b in u.B)))
    exact = with_rows(Combination(stack_of(rounded), recipe(name)))
    assert {part.dtype for part in parts(exact)} == {torch.float64}
    assert same(merge(small, name), merge(rounded, name), 2e-6)


def parts(combination: Combination) -> list[Tensor]:
    """Factors, or the dense matrix, of every layer."""
    updates = [combination.update(layer) for layer in combination.names]
    return [part for update in updates for part in (update if isinstance(update, LowRank) else (update,))]


@everyone
def test_an_adapter_absent_from_a_layer(name):
    """It counts as an update of zeros; methods of factors do without it."""
    there = layers()
    first = there["first"]
    A, B = first.A[:2], first.B[:2]
    zeros = replace(first, B=(*B, torch.zeros_like(first.B[2])))
    absent = replace(
        first, A=(*A, first.A[2][:0]), B=(*B, first.B[2][:, :0]), scales=(*SCALES[:2], 0.0)
    )  # as a stack has it
    merged = merge({**there, "first": absent}, name)
    assert all(D.isfinite().all() for D in merged)
    refused = pytest.raises(NSCError, match="singular") if NO_ZEROS.get(name) == ROOM else nullcontext()
    with refused:
        assert same(merged, merge({**there, "first": zeros}, name)) == (name not in NO_ZEROS)
    if name in LEFT_OUT:
        two = layers(TASKS[:2], SCALES[:2])
        assert same(merged[:1], merge(two, name)[:1])


@everyone
def test_inputs_are_left_as_they_were(name):
    stack, untouched = stack_of(layers()), stack_of(layers())
    merge(stack, name, weights=WEIGHTS)
    for layer, module in stack.modules.items():
        assert torch.equal(module.A, untouched.modules[layer].A) and torch.equal(module.B, untouched.modules[layer].B)


@everyone
def test_strides_do_not_matter(name):
    def turn(blocks):
        return tuple(block.T.contiguous().T for block in blocks)

    stack = stack_of(layers())
    turned = {n: replace(m, A_blocks=turn(m.A_blocks), B_blocks=turn(m.B_blocks)) for n, m in stack.modules.items()}
    assert not any(block.is_contiguous() for m in turned.values() for block in (*m.A_blocks, *m.B_blocks))
    assert same(merge(replace(stack, modules=turned), name), merge(stack, name))


@everyone
def test_twice_the_same_whatever_the_global_generator(name):
    torch.manual_seed(1)
    first = merge(layers(), name)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert all(map(torch.equal, first, merge(layers(), name)))
    assert torch.equal(state, torch.get_rng_state())


@everyone
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_gives_what_the_cpu_gives(name):
    combination = with_rows(Combination(stack_of(layers()), recipe(name), device="cuda"))
    assert {part.device.type for part in parts(combination)} == {"cuda"}
    on_gpu = [dense(combination.update(layer)).cpu() for layer in combination.names]
    assert same(on_gpu, merge(layers(), name))


def test_another_process_gives_the_same():
    """With other hashes of strings, so that no set's order is in a result."""
    code = "import json, tests.methods.test_method_laws as t; print(json.dumps(t.probes()))"
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "17", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == pytest.approx(probes(), rel=1e-9)


def probes() -> dict[str, float]:
    """One number of each method that depends on all entries."""
    weigh = {shape: torch.linspace(1, 2, shape[0] * shape[1]).double().view(shape) for shape in LAYERS.values()}
    return {name: sum((D * weigh[D.shape]).abs().sum().item() for D in merge(layers(), name)) for name in NAMES}
