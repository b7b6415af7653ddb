"""Laws of the element-wise methods, DARE's masks, EMR and FR by their formulas, refusals."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nsc.errors import NSCError
from nsc.methods.dare import DareSettings, keep_mask
from nsc.methods.emr import emr_tasks
from nsc.methods.fr import FrSettings, band
from nsc.recipes.spec import read_recipe
from tests.entries import METHODS_HERE, both, every, layer_info, noise, run


@every
@both
def test_the_order_of_tasks_does_not_matter(name, dtype):
    method, settings = METHODS_HERE[name]
    X, order = noise(4, 13, 9, dtype=dtype), [2, 0, 3, 1]
    layer = layer_info(4, [1.0, 0.5, 2.0, -0.7])
    turned = layer._replace(tasks=tuple(layer.tasks[k] for k in order), weights=layer.weights[order])
    torch.testing.assert_close(run(method, X[order], turned, **settings), run(method, X, layer, **settings))


@every
def test_inputs_are_left_alone_and_biases_work(name):
    method, settings = METHODS_HERE[name]
    X = noise(3, 1, 20)
    before = X.clone()
    assert run(method, X, **settings).shape == (1, 20) and torch.equal(X, before)


@both
@pytest.mark.parametrize("name", [name for name in METHODS_HERE if not name.startswith("fr")])
def test_one_task_is_itself(name, dtype):
    method, settings = METHODS_HERE[name]
    fields = read_recipe(method).to_dict()
    settings |= {key: value for key, value in dict(density=1.0, drop=0.0).items() if key in fields}
    X = noise(1, 6, 5, dtype=dtype)
    assert torch.equal(run(method, X, **settings), X[0])


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_by_its_formula(rescale):
    X, layer = noise(3, 30, 20), layer_info(3, [1.0, 0.5, -2.0])
    keep = torch.stack([keep_mask(DareSettings(drop=0.7), "layer", task, (30, 20)) for task in layer.tasks])
    assert (keep.double().mean((1, 2)) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 600) ** 0.5
    assert (keep[0] ^ keep[1]).any()
    kept = X * keep
    factor = {"inverse": 1 / 0.3, "l1": X.abs().sum((1, 2)) / kept.abs().sum((1, 2)), "none": 1.0}[rescale]
    expected = (kept * (factor * layer.weights)[:, None, None]).sum(0)
    torch.testing.assert_close(run("dare", X, layer, drop=0.7, rescale=rescale), expected)
    given = layer._replace(keep=~keep)
    torch.testing.assert_close(
        run("dare", X, given, drop=0.3, rescale="none"), (X * ~keep * layer.weights[:, None, None]).sum(0)
    )


def test_masks_depend_on_seed_layer_and_task_alone():
    shapes = dict(shape=(8, 8))
    one = keep_mask(DareSettings(), "layer", "a", **shapes)
    assert torch.equal(one, keep_mask(DareSettings(), "layer", "a", **shapes))
    others = [
        keep_mask(DareSettings(seed=1), "layer", "a", **shapes),
        keep_mask(DareSettings(), "other", "a", **shapes),
        keep_mask(DareSettings(), "layer", "b", **shapes),
    ]
    assert not any(torch.equal(one, other) for other in others)
    state = torch.get_rng_state()
    keep_mask(DareSettings(), "layer", "a", **shapes)
    assert torch.equal(state, torch.get_rng_state())
    three, two = noise(3, 8, 8), [0.0, 1.0, 1.0]
    torch.testing.assert_close(
        run("dare", three, layer_info(3, two)),
        run("dare", three[1:], layer_info(3)._replace(tasks=("b", "c"), weights=torch.ones(2))),
    )


def test_masks_are_the_same_in_every_process():
    """Whatever the order of sets there."""
    code = (
        "from nsc.methods.dare import *\n"
        "for t in {'a', 'b', 'c'}: print(t, keep_mask(DareSettings(0.5, 3), 'l', t, (4, 9)).int().flatten().tolist())"
    )
    root = Path(__file__).parents[2]
    env = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=root)
    assert done.returncode == 0, done.stderr
    here = {t: keep_mask(DareSettings(0.5, 3), "l", t, (4, 9)).int().flatten().tolist() for t in "abc"}
    assert sorted(done.stdout.splitlines()) == [f"{task} {mask}" for task, mask in here.items()]


@both
@pytest.mark.parametrize("drop", [0.999999, 1 - 1e-12])
@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_nothing_becomes_nan_when_almost_all_is_dropped(rescale, drop, dtype):
    X = noise(3, 8, 5, dtype=dtype)
    X[1] = 0
    for method in ("dare", "dare-ties"):
        assert run(method, X, drop=drop, rescale=rescale).isfinite().all()


@every
def test_absent_adapters_and_empty_rows(name):
    method, settings = METHODS_HERE[name]
    X = noise(3, 8, 6)
    X[1], X[:, 3] = 0, 0
    merged = run(method, X, **settings)
    assert merged.isfinite().all() and (name.startswith("fr") or not merged[3].any())
    assert run(method, torch.zeros(3, 8, 6), **settings).eq(0).all()


def test_emr_recovers_tasks_that_agree_and_survives_those_without_update():
    base = noise(1, 7, 5).abs()
    X = torch.cat([base, 3 * base, torch.zeros_like(base)])
    layers = [(layer_info(3, name=n), X if n == "p" else 2 * X) for n in "pq"]
    of_tasks = dict(emr_tasks(lambda: iter(layers)))
    for layer, updates in layers:
        torch.testing.assert_close(of_tasks[layer.name], updates)


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9), (7, 15), (24, 40), (2, 3), (1, 6)])
@pytest.mark.parametrize("settings", [dict(), dict(ratio=0.3), dict(align=True), dict(side="max", ratio=0.6)], ids=str)
def test_fr_is_the_filter_of_its_code(shape, settings):
    X, layer = noise(3, *shape), layer_info(3, [1.0, 0.5, 2.0])
    H, W = shape
    side = (max if settings.get("side") == "max" else min)(shape)
    low, high = min(shape) // 10, settings.get("ratio", 0.7) * side
    d = torch.tensor([[((u - H // 2) ** 2 + (v - W // 2) ** 2) ** 0.5 for v in range(W)] for u in range(H)])
    w = (d <= low).double() + ((low <= d) & (d <= high)).double()
    parts = torch.fft.ifft2(torch.fft.fft2(X) * w).real
    if settings.get("align"):
        means = parts.abs().mean((1, 2))
        parts = parts * (means.max() / means)[:, None, None]
    torch.testing.assert_close(run("fr", X, layer, **settings), (parts * layer.weights[:, None, None]).sum(0))


def test_what_fr_removes():
    """The figures of its docstring, for even sides, where the two halves are alike; and the mean of an update."""
    for (H, W), share in {(768, 768): 113 / 768**2, (1024, 4096): 0.68}.items():
        gone = band(H, W, FrSettings()) == 0
        both_halves = gone.sum() + gone[:, 1:-1].sum()
        assert both_halves.item() / (H * W) == pytest.approx(share, rel=5e-3)
    assert run("fr", torch.ones(1, 16, 16).double()).abs().max() < 1e-12


REFUSED = {
    "density must be a fraction above 0 and at most 1, not 20.0": ("ties", dict(density=20)),
    "drop must be .*, not 90.0; percent is not taken: give 0.2 for 20 %": ("dare", dict(drop=90)),
    "density": ("ties", dict(density=0.0)),
    "drop must be a fraction at least 0 and below 1": ("dare-ties", dict(drop=1.0)),
    "preset must be one of default": ("ties", dict(preset="Ties")),
    "scope must be one of matrix, model, not layer": ("ties", dict(scope="layer")),
    "elect must be one of mass, normmass, count, none, not sign": ("ties", dict(elect="sign")),
    "agg must be one of mean, sum, max, not median": ("ties", dict(agg="median")),
    "no sign for agg max": ("ties", dict(elect="none", agg="max")),
    "rescale must be one of inverse, l1, none, not l2": ("dare", dict(rescale="l2")),
    "dropping replaces trimming": ("dare-ties", dict(preset="peft", density=0.2)),
    "ratio must be a fraction above 0 and at most 1": ("fr", dict(ratio=0)),
    "side must be one of min, max, not mean": ("fr", dict(side="mean")),
    "has no setting floors": ("ties", dict(floors=[1.0])),
    "has no setting density": ("emr", dict(density=0.2)),
}


@pytest.mark.parametrize("words", REFUSED)
def test_refusals(words):
    method, settings = REFUSED[words]
    with pytest.raises(NSCError, match=words):
        read_recipe(method, **settings)


def test_a_mask_of_another_shape_is_refused():
    keep = torch.ones(3, 4, 5, dtype=torch.bool)
    with pytest.raises(NSCError, match=r"mask of layer must have shape \(3, 5, 4\), not \(3, 4, 5\)"):
        run("dare", noise(3, 5, 4), layer_info(3, keep=keep))


@every
def test_recipes_are_plain_values(name):
    method, settings = METHODS_HERE[name]
    recipe = read_recipe(method, **settings)
    assert read_recipe(**yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
