"""TIES: one layer and whole models against the authors' formula, thresholds against a sort, presets against PEFT."""

import weakref

import numpy as np
import pytest
import torch

from nsc.methods import METHODS
from nsc.methods.emr import emr_rescalers
from nsc.methods.kth_largest import kth_largest
from nsc.methods.ties import PRESETS
from nsc.recipes.spec import read_recipe
from tests.entries import both, layer_info, layers_of, noise, plain_ties, presets, run, run_all


@both
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("kind", ["noise", "integers", "zeros"])
def test_streamed_ties_of_a_model_is_the_flattened_one(kind, density, agg, dtype):
    layers = layers_of(kind, dtype)
    flat = torch.cat([X.flatten(1) for X in layers], 1)
    merged = torch.cat([D.flatten() for D in run_all("ties", layers, preset="original", density=density, agg=agg)])
    torch.testing.assert_close(merged, plain_ties(flat, density, agg))
    assert merged.dtype == dtype


@pytest.mark.parametrize("kind", ["noise", "integers"])
def test_ties_is_by_matrix_unless_told_or_in_knots(kind):
    layers = layers_of(kind, torch.float64)
    apart = [plain_ties(X.flatten(1), 0.3).view_as(X[0]) for X in layers]
    joint = run_all("ties", layers, preset="original", density=0.3)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(apart, joint, strict=True))
    torch.testing.assert_close(run_all("ties", layers, density=0.3), apart)
    torch.testing.assert_close(run_all("ties", layers, density=0.3, scope="model"), joint)
    torch.testing.assert_close(run_all("ties", layers, "knots", density=0.3), joint)
    torch.testing.assert_close(run_all("ties", layers, "knots", density=0.3, scope="matrix"), apart)


def plain_normmass(flat: torch.Tensor, density: float) -> torch.Tensor:
    """As KnOTS has it: (K, d) -> (d,)."""
    d = flat.shape[1]
    kept = flat * (flat.abs() >= flat.abs().sort(1).values[:, [d - int(d * density) - 1]])
    shares = kept**2 / kept.norm(dim=1, keepdim=True) ** 2
    sign = (kept.sign() * shares).sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = torch.where(sign > 0, kept > 0, kept < 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def test_the_election_by_shares_of_squared_norms():
    """In each matrix, and in a whole model, whose norms are of all layers; it is another election than by mass."""
    sizes = torch.tensor([1.0, 5.0, 0.2, 2.0]).double()[:, None, None]
    layers = [X * sizes for X in layers_of("noise", torch.float64)]
    flat = torch.cat([X.flatten(1) for X in layers], 1)
    exactly = dict(rtol=1e-12, atol=1e-12)
    joint = torch.cat([D.flatten() for D in run_all("ties", layers, scope="model", elect="normmass", density=0.6)])
    torch.testing.assert_close(joint, plain_normmass(flat, 0.6), **exactly)
    apart = run_all("ties", layers, elect="normmass", density=0.6)
    for D, X in zip(apart, layers, strict=True):
        torch.testing.assert_close(D.flatten(), plain_normmass(X.flatten(1), 0.6), **exactly)
    assert any((D - M).abs().max() > 0.1 for D, M in zip(apart, run_all("ties", layers, density=0.6), strict=True))


@pytest.mark.parametrize("method", ["ties", "dare-ties"])
def test_shares_do_not_depend_on_the_size_of_a_task(method):
    X, sizes = noise(3, 30, 40), torch.tensor([1.0, 50.0, 1e-3]).double()[:, None, None]
    signs = [run(method, Y, elect="normmass", density=1.0, agg="max", preset="peft").sign() for Y in (X, X * sizes)]
    assert torch.equal(*signs) and signs[0].any()
    silent = run(method, X, layer_info(3, [1.0, 0.0, 1.0]), elect="normmass", agg="sum", density=1.0)
    torch.testing.assert_close(silent, run_without_second(method, X))


def run_without_second(method: str, X: torch.Tensor) -> torch.Tensor:
    layer = layer_info(3)._replace(tasks=("a", "c"), weights=torch.ones(2).double())
    return run(method, X[[0, 2]], layer, elect="normmass", agg="sum", density=1.0)


def test_a_model_of_two_dtypes_is_trimmed_exactly():
    layers = layers_of("noise", torch.float64)
    layers[1] = layers[1].float()
    flat = torch.cat([X.flatten(1) for X in layers], 1)
    merged = torch.cat([D.flatten() for D in run_all("ties", layers, preset="original", density=0.3)])
    torch.testing.assert_close(merged, plain_ties(flat, 0.3), rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("k", [0, 1, 2, 100, 1199, 1200, 1201])
def test_kth_largest_is_that_of_a_sort(k, dtype):
    rows = torch.stack(
        [
            noise(1200),
            noise(1200).round(),
            noise(1200) * (noise(1200, seed=1) > 1),
            torch.zeros(1200).double(),
            torch.full((1200,), -0.3).double(),
            noise(1200) * 1e-42,
            noise(1200).exp() ** 20,
            1 + noise(1200) * 1e-13,
        ]
    ).to(dtype)
    sizes = []
    largest = kth_largest(lambda: rows.split([1, 700, 499], 1), lambda d: sizes.append(d) or k)
    expected = rows.abs().sort(1, descending=True).values
    infinite = torch.full((len(rows), 1), torch.inf, dtype=dtype)
    expected = torch.cat([infinite, expected, torch.zeros_like(infinite)], 1)[:, k]
    assert sizes == [1200] and torch.equal(largest, expected) and largest.dtype == dtype


@pytest.mark.parametrize("method", ["ties", "dare-ties", "emr"])
def test_no_layer_is_held_while_the_next_is_made(method):
    alive: list[weakref.ref] = []

    def matrices():
        for i in range(3):
            assert not [ref for ref in alive if ref() is not None]
            memory = np.random.default_rng(i).standard_normal((3, 40, 50))
            alive.append(weakref.ref(memory))
            X = torch.from_numpy(memory)
            del memory
            yield layer_info(3, name=f"l{i}"), X
            del X

    if method == "emr":
        emr_rescalers(matrices)
    else:
        settings = read_recipe(method, preset="original", density=0.2).settings
        METHODS[method].survey(matrices, settings)
    assert len(alive) >= 3


@presets
def test_dropping_nothing_is_ties(preset):
    X = noise(3, 12, 9)
    density = 1.0 if preset in ("peft", "mergekit") else 0.3
    agg = PRESETS[preset].agg
    expected = run("ties", X, preset=preset, density=density)
    assert torch.equal(run("dare-ties", X, preset=preset, density=density, drop=0.0, agg=agg), expected)


@both
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.5, 0.0, -0.7]])
@pytest.mark.parametrize("elect", ["total", "frequency"])
def test_the_preset_peft_is_peft(elect, weights, dtype):
    merge_utils = pytest.importorskip("peft.utils.merge_utils")
    X, w = noise(3, 11, 9, dtype=dtype), torch.tensor(weights, dtype=dtype)
    own = dict(preset="peft", elect={"total": "mass", "frequency": "count"}[elect])
    layer = layer_info(3, weights)
    expected = merge_utils.ties(list(X), w, 0.3, elect)
    torch.testing.assert_close(run("ties", X, layer, **own, density=0.3), expected)
    expected = merge_utils.magnitude_prune(list(X), w, 0.3)
    torch.testing.assert_close(run("ties", X, layer, preset="peft", density=0.3, elect="none", agg="sum"), expected)
    rescaled = merge_utils.random_pruning(torch.ones(99), 0.4, True).max() > 1  # 0.15 throws its quotient away
    torch.manual_seed(0)
    keep = torch.stack([torch.bernoulli(torch.full_like(x, 0.4)).bool() for x in X])
    for mine, theirs in (("dare-ties", "dare_ties"), ("dare", "dare_linear")):
        torch.manual_seed(0)
        expected = getattr(merge_utils, theirs)(list(X), w, 0.4, *([elect] if mine == "dare-ties" else []))
        given = dict(rescale="inverse" if rescaled else "none") | (own if mine == "dare-ties" else {})
        torch.testing.assert_close(run(mine, X, layer._replace(keep=keep), drop=0.6, **given), expected)


def test_where_weights_stand():
    """mergekit divides by them, peft votes without them, the others vote with them and count heads."""
    X = torch.tensor([[[3.0]], [[-1.0]], [[1.0]]], dtype=torch.float64)
    layer = layer_info(3, [0.1, 1.0, 0.5])
    merged = {preset: run("ties", X, layer, preset=preset, density=1.0).item() for preset in PRESETS}
    expected = {"default": -1.0, "original": -1.0, "nsc": 0.8, "peft": 0.4, "mergekit": -1.0}
    assert merged == pytest.approx(expected)
    assert run("ties", X[[0, 2]], layer_info(2, [0.1, 0.5]), preset="mergekit", density=1.0).item() == pytest.approx(
        0.8 / 0.6
    )


def test_zero_sums():
    """Two tasks that cancel in half of the entries: the sign of most elections, + or, where those cancel too, -."""
    cancel = torch.tensor([[[1.0, -1.0, 2.0]], [[-1.0, 1.0, -5.0]]])
    assert run("ties", cancel, density=1.0).tolist() == [[-1.0, -1.0, -5.0]]
    assert run("ties", cancel, density=1.0, preset="peft").tolist() == [[1.0, 1.0, -5.0]]
    even = cancel[..., :2]
    assert run("ties", even, density=1.0).tolist() == [[-1.0, -1.0]]
    up = torch.tensor([[[3.0]], [[1.0]]])
    assert run_all("ties", [even, up], preset="original", density=1.0)[0].tolist() == [[1.0, 1.0]]
