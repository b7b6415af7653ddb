"""Core Space and KnOTS: the originals' values with every method that runs in them, and that nothing is lost there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods import METHODS, Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spaces import SPACES, core, knots
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import LAYERS, array, cases, dense, require_golden
from tests.merging_goldens import updates as golden_updates

CORE_NAMES = {"tv": "task-arithmetic", "ties": "ties", "dare-ties": "dare-ties", "tsv": "tsv", "cart": "cart"}
SHAPES = {
    "equal ranks": ((30, 20), (4, 4, 4)),
    "unequal ranks": ((20, 30), (2, 4, 6)),
    "an absent adapter": ((20, 30), (3, 0, 5)),
    "one adapter": ((20, 30), (4,)),
    "more ranks than rows": ((10, 30), (4, 4, 4)),
    "more ranks than columns": ((30, 10), (4, 4, 4)),
    "more ranks than either": ((9, 10), (4, 12, 4)),
}


def factors(shape: tuple[int, int], ranks: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Updates:
    """Random adapters of one layer with scales and weights of their own; rank 0 for one that does not touch it."""
    draw = torch.Generator().manual_seed(0)
    (m, d), K = shape, len(ranks)
    A = tuple(torch.randn(r, d, generator=draw, dtype=torch.float64).to(dtype) for r in ranks)
    B = tuple(torch.randn(m, r, generator=draw, dtype=torch.float64).to(dtype) for r in ranks)
    return Updates("layer", ("a", "b", "c")[:K], A, B, (2.0, 0.5, 1.0)[:K], (1.0, -0.7, 0.4)[:K])


def vera(lambda_d: list[Tensor], lambda_b: list[Tensor], A: Tensor, B: Tensor) -> Updates:
    """VeRA adapters as LoRA: A_k = diag(lambda_d,k) A,  B_k = diag(lambda_b,k) B."""
    K = len(lambda_d)
    rows, columns = (tuple(v[:, None] * shared for v in vs) for vs, shared in ((lambda_d, A), (lambda_b, B)))
    return Updates("layer", tuple("abcdef"[:K]), rows, columns, (1.0,) * K, (1.0,) * K)


def random_vera(shape: tuple[int, int] = (30, 20), rank: int = 6, dtype: torch.dtype = torch.float64) -> Updates:
    """Three of them on one layer."""
    draw = torch.Generator().manual_seed(0)
    lambda_d, lambda_b = ([torch.rand(n, generator=draw).to(dtype) + 0.1 for _ in range(3)] for n in (rank, shape[0]))
    A, B = (torch.randn(*s, generator=draw).to(dtype) for s in ((rank, shape[1]), (shape[0], rank)))
    return vera(lambda_d, lambda_b, A, B)


def merged(method: str, updates: Updates, **settings: object) -> Tensor:
    """(m, d) of one layer."""
    weights = dict(zip(updates.tasks, updates.weights, strict=True))
    recipe = read_recipe(method, weights=weights, **settings)
    return dense(Combination(stack_of({"layer": updates}), recipe).update("layer"))


def total(updates: Updates) -> Tensor:
    """sum_k w_k s_k B_k A_k, float64."""
    parts = zip(updates.weights, updates.scales, updates.B, updates.A, strict=True)
    return sum(w * s * b.double() @ a.double() for w, s, b, a in parts)


def inputs(case: dict, layer: str) -> Updates:
    """The case's adapters, VeRA ones as LoRA."""
    if case["input_set"] != "vera":
        return golden_updates(case, layer)
    dtype = torch.float64 if case["run_dtype"] == "f64" else torch.float32
    here = lambda name: array(f"vera/{layer}/{name}", "inputs").to(dtype)  # noqa: E731
    lambda_d, lambda_b = ([here(f"task{k}/{side}") for k in range(3)] for side in ("lambda_d", "lambda_b"))
    return vera(lambda_d, lambda_b, here("A"), here("B"))


def masks_of(case: dict) -> dict[str, Tensor]:
    """layer -> (K, p, q) bool, those that the original drew."""
    masks = {}
    for layer in LAYERS:
        keys = [key for key in case.get("extra_keys", ()) if f"/extra/keep/{layer}" in key]
        if keys:
            masks[layer] = torch.stack([array(key) for key in keys]).reshape(-1, *array(keys[0]).shape[-2:]).bool()
    return masks


def share(percent: float) -> float:
    """The originals take more than 1 for percent."""
    return percent / 100 if percent > 1 else percent


def translated_core(hyper: dict) -> tuple[str, dict]:
    """The Core Space repository's choices in ours."""
    method = CORE_NAMES[hyper["merge_method"]]
    settings = {"scale": hyper["scaling_coeffs"], "isotropize": hyper["isotropize"]}
    if "ties" in method:
        settings["density"] = share(hyper["topK"])
    if "dare" in method:
        settings["drop"] = hyper["dare_pruning_coeffs"]
    if method == "cart":
        settings |= {"ratio": hyper["cart_pruning_rank"], "prior": hyper["cart_scaling_coeffs"], "rounding": "up"}
    space = "" if hyper["merge_space"] == "full" else f"{hyper['merge_space']}-"
    return space + method, settings


def translated_knots(hyper: dict) -> tuple[str, dict]:
    """The KnOTS repository's."""
    (scale,) = hyper["scaling_coeffs"]
    tail = hyper["merge_method"] == "ties"
    method = f"{'dare-' if hyper['dare'] else ''}{'ties' if tail else ''}".strip("-") or "task-arithmetic"
    settings = {"scale": scale}
    if tail:
        settings |= {"density": share(hyper["topK"]), "agg": hyper["merging_type"]}
    if hyper["dare"]:
        settings["drop"] = hyper["dare_pruning_coeffs"]
    return f"knots-{method}", settings


def require_translated(case: dict, method: str, settings: dict) -> None:
    """The case's value, where the method is here already."""
    if method.partition("-")[2] not in METHODS and method not in METHODS:
        pytest.skip(f"{method} is not there yet")
    stack = stack_of({layer: inputs(case, layer) for layer in LAYERS})
    require_golden(case, Combination(stack, read_recipe(method, **settings), masks=masks_of(case)))


SPECTRAL = ("core_full_tv", "core_full_tsv", "core_full_cart")


@pytest.mark.parametrize("case", cases("core_core_", "core_vera_", "core_knots_", *SPECTRAL), ids=lambda c: c["id"])
def test_core_space(case):
    if case["hyper"]["merge_space"] == "knots" and share(case["hyper"].get("topK", 100)) < 1:
        pytest.skip("it trims right singular vectors without their values, unlike KnOTS itself")
    require_translated(case, *translated_core(case["hyper"]))


@pytest.mark.parametrize("case", cases("knots_svd_"), ids=lambda c: c["id"])
def test_knots(case):
    if case["hyper"]["merge_method"] == "tv" and share(case["hyper"]["topK"]) < 1:
        pytest.skip("a sum of trimmed parts is no method here")
    require_translated(case, *translated_knots(case["hyper"]))


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("shape, ranks", SHAPES.values(), ids=SHAPES)
def test_nothing_is_lost(space, shape, ranks):
    updates = factors(shape, ranks)
    torch.testing.assert_close(merged(f"{space}-task-arithmetic", updates), total(updates), rtol=0, atol=1e-10)
    view = SPACES[space](updates)
    for k, X in enumerate(view.X):
        alone = updates.scales[k] * updates.B[k] @ updates.A[k]
        torch.testing.assert_close(dense(view.lift(X)), alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("space", ["core", "knots"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_lost_of_what_is_stored_in_few_digits(space, dtype):
    updates = factors((60, 50), (4, 4, 4), dtype=dtype)
    sums = merged(f"{space}-task-arithmetic", updates)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, total(updates), rtol=0, atol=1e-10)


@pytest.mark.parametrize("space", ["core", "knots"])
def test_a_task_far_smaller_than_the_others_is_kept(space):
    updates = factors((60, 50), (4, 4, 4))
    small = replace(updates, B=(updates.B[0], updates.B[1] * 1e-9, updates.B[2]))
    lifted = dense((view := SPACES[space](small)).lift(view.X[1]))
    torch.testing.assert_close(lifted, small.scales[1] * small.B[1] @ small.A[1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape, ranks", SHAPES.values(), ids=SHAPES)
def test_rows_of_knots_are_the_right_half_of_the_dense_decomposition(shape, ranks):
    updates = factors(shape, ranks)
    _, S, Vh = torch.linalg.svd(torch.cat(list(updates.deltas()), 1), full_matrices=False)
    X = torch.cat(list(knots(updates).X), 1)
    rank = min(shape[0], sum(min(r, *shape) for r in ranks))
    assert X.shape == (rank, len(ranks) * shape[1]) and knots(updates).layer.space == "knots"
    torch.testing.assert_close(X.abs(), (S[:, None] * Vh)[:rank].abs(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape, ranks", SHAPES.values(), ids=SHAPES)
def test_core_is_what_the_stacks_singular_vectors_see(shape, ranks):
    updates = factors(shape, ranks)
    U = torch.linalg.svd(torch.cat(updates.scaled(), 1), full_matrices=False).U
    Vh = torch.linalg.svd(torch.cat(updates.A), full_matrices=False).Vh
    seen = torch.stack([U.T @ D @ Vh.T for D in updates.deltas()])
    view = core(updates)
    assert view.X.shape == (len(ranks), min(shape[0], sum(ranks)), min(shape[1], sum(ranks)))
    assert view.layer.size == min(view.X.shape[1:]) and view.layer.space == "core"
    torch.testing.assert_close(view.X.abs(), seen.abs(), rtol=0, atol=1e-9)


def test_null_directions_hold_nothing():
    shared = random_vera(rank=6)
    view = core(shared)
    assert view.X.shape == (3, 18, 18) and view.layer.size == 18
    assert not view.X[:, :, 6:].any() and view.X[:, :, :6].any(1).all()
    update = view.lift(view.X.sum(0))
    assert update.A.shape == (6, 20)
    torch.testing.assert_close(update.B @ update.A, total(shared), rtol=0, atol=1e-10)
    twice = factors((30, 20), (4, 4, 4))
    twice = replace(twice, A=twice.A[:1] * 3, B=twice.B[:1] * 3)
    assert knots(twice).X.shape == (3, 4, 20)
    assert core(twice).X.shape == (3, 12, 12) and not core(twice).X[:, 4:, 4:].any()


def test_a_layer_without_any_update():
    updates = factors((30, 20), (4, 4, 4))
    updates = replace(updates, B=tuple(torch.zeros_like(b) for b in updates.B))
    for space in ("core", "knots"):
        assert torch.equal(merged(f"{space}-task-arithmetic", updates), torch.zeros(30, 20, dtype=torch.float64))


def turned(updates: Updates, seed: int) -> Updates:
    """The same updates with other orthogonal factors: (Q A, B Q')."""
    draw = torch.Generator().manual_seed(seed)
    turns = [torch.linalg.qr(torch.randn(r, r, generator=draw, dtype=torch.float64)).Q for r in updates.ranks]
    A = tuple(q @ a for q, a in zip(turns, updates.A, strict=True))
    return replace(updates, A=A, B=tuple(b @ q.T for q, b in zip(turns, updates.B, strict=True)))


@pytest.mark.parametrize("settings", [{}, {"elect": "normmass"}, {"preset": "peft"}, {"density": 1.0}], ids=str)
@pytest.mark.parametrize("method", ["knots-ties", "core-ties", "ctm-ties", "knots-dare-ties"])
def test_ties_does_not_depend_on_signs_of_singular_vectors(method, settings):
    updates = factors((30, 20), (4, 4, 4))
    want = merged(method, updates, **settings)
    for seed in (1, 2, 3):
        torch.testing.assert_close(merged(method, turned(updates, seed), **settings), want)


@pytest.mark.parametrize("settings", [{"preset": "nsc"}, {"elect": "count"}], ids=str)
@pytest.mark.parametrize("method", ["ties", "dare-ties"])
def test_an_election_that_would_depend_on_them_is_refused(method, settings):
    assert read_recipe(method, **settings).settings.rules.elect == "count"
    for space in ("core", "knots", "ctm"):
        with pytest.raises(NSCError, match=f"{space}-{method} cannot elect by count.*give elect mass, or {method}"):
            read_recipe(f"{space}-{method}", **settings)
    assert read_recipe(f"knots-{method}", preset="nsc", elect="mass").settings.rules.agg == "sum"
