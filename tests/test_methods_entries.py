"""Element-wise methods: TIES, DARE, DARE-TIES, EMR, FR. Goldens of the originals, plain formulas, laws, refusals."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from merging import LAYERS, array, cases, combination, dense, manifest, require_golden
from torch import Tensor

from nsc.combination import Combination
from nsc.errors import NSCError
from nsc.methods import METHODS, Place
from nsc.methods.dare import DareSettings, keep_mask
from nsc.methods.emr import emr_rescalers, emr_tasks
from nsc.methods.fr import FrSettings, band
from nsc.methods.ties import PRESETS
from nsc.recipes import read_recipe
from nsc.selection import kth_largest
from nsc.spaces import SPACES

SIZE = 24 * 40 + 32 * 32 + 48 * 16  # entries of the goldens' model


def masks(case: dict) -> dict[str, Tensor]:
    """layer -> (K, p, q) bool, kept, whatever way the case recorded what was drawn."""
    found: dict[str, list] = {}
    for key in sorted(case.get("extra_keys", [])):
        kind, _, rest = key.split("/extra/")[1].partition("/")
        layer = rest.partition("/")[0]
        if kind in ("keep", "drop", "bernoulli"):
            found.setdefault(layer, []).append(array(key).bool() ^ (kind == "drop"))
    whole = {layer: parts[0] if len(parts) == 1 else torch.stack(parts) for layer, parts in found.items()}
    shapes = {layer: tuple(manifest()["conventions"]["layers"][layer]) for layer in whole}
    return {layer: mask.view(len(mask), *shapes[layer]) if mask.dim() == 2 else mask for layer, mask in whole.items()}


def fraction(percent: float) -> float:
    """As the TIES family reads a top K."""
    return percent / 100 if percent > 1 else float(percent)


def by_task(weights: list[float]) -> dict[str, float]:
    return {f"task{k}": weight for k, weight in enumerate(weights)}


def original(case: dict, hyper: dict) -> tuple[str, dict]:
    """ties-merging."""
    density = 1.0 if hyper["reset_type"] == "none" else fraction(hyper["reset_thresh"])
    agg, elect = hyper["merge_func"].split("-")[-1], hyper["resolve_method"]
    return "ties", dict(preset="original", density=density, agg=agg, elect=elect)


def knots(case: dict, hyper: dict) -> tuple[str, dict]:
    """KnOTS and Core Space: vectors of the whole model, or matrices where there is a merge_space."""
    way = hyper["merge_method"]
    space = hyper.get("merge_space", "knots" if "SVDMerger" in case["call"] else "full")
    settings = dict(density=fraction(hyper.get("topK", 100)), scope="matrix" if "merge_space" in hyper else "model")
    if hyper.get("sign_resolve_mode") == "sum_of_signs":
        settings["elect"] = "count"
    if way == "tv":
        settings |= dict(elect="none", agg="sum")
    elif "merging_type" in hyper:
        settings["agg"] = hyper["merging_type"]
    coefficients = hyper["scaling_coeffs"]
    coefficients = coefficients if isinstance(coefficients, list) else [coefficients]
    if len(coefficients) == 1:
        settings["scale"] = coefficients[0]
    else:
        settings["weights"] = by_task(coefficients)
    name = "ties"
    if hyper.get("dare") or "dare" in way:
        name, settings["drop"] = "dare-ties", hyper["dare_pruning_coeffs"]
    return (name if space == "full" else f"{space}-{name}"), settings


def mergelm(case: dict, hyper: dict) -> tuple[str, dict]:
    """MergeLM: the k-th smallest is kept with all that are larger, k = int(d rate) of the whole model's d."""
    scale = dict(scale=hyper["scaling_coefficient"])
    dare = dict(drop=hyper["weight_mask_rate"]) if "weight_mask_rate" in hyper else {}
    if dare and not hyper.get("use_weight_rescale", True):
        dare["rescale"] = "none"
    if "param_value_mask_rate" not in hyper:
        return "dare", dare | scale
    kept = SIZE - int(SIZE * hyper["param_value_mask_rate"])
    settings = dict(preset="original", density=(kept + 0.5) / SIZE)
    return ("dare-ties" if dare else "ties"), settings | dare | scale


def nsc(case: dict, hyper: dict) -> tuple[str, dict]:
    """nsc_merging."""
    common = dict(preset="nsc", density=float(hyper["topK"]), agg=hyper["merging_type"], scale=hyper["scaling_factor"])
    return ("dare-ties", common | dict(drop=hyper["drop_p"])) if hyper.get("drop_p") else ("ties", common)


def peft(case: dict, hyper: dict) -> tuple[str, dict]:
    """PEFT's functions, on whole updates."""
    weights, density = dict(weights=by_task(hyper["weights"])), float(hyper["density"])
    elect = dict(elect="count") if hyper.get("majority_sign_method") == "frequency" else {}
    if "dare_linear" in case["case"]:
        return "dare", dict(drop=1 - density) | weights
    if "dare_ties" in case["case"]:
        return "dare-ties", dict(preset="peft", drop=1 - density) | elect | weights
    if "magnitude" in case["case"]:
        elect = dict(elect="none", agg="sum")
    return "ties", dict(preset="peft", density=density) | elect | weights


def mergekit(case: dict, hyper: dict) -> tuple[str, dict]:
    """mergekit: its tables of defaults are the presets'."""
    settings: dict = dict(weights=by_task(hyper["weight"]), scale=hyper.get("lambda", 1.0))
    if "dare" not in case["case"]:
        agg = "mean" if hyper.get("normalize", True) else "sum"
        return "ties", settings | dict(preset="mergekit", density=hyper["density"], agg=agg)
    settings |= dict(drop=1 - hyper["density"], rescale="l1" if hyper.get("rescale", True) else "none")
    if "linear" in case["case"]:
        settings["scale"] /= sum(hyper["weight"]) if hyper.get("normalize") else 1
        return "dare", settings
    return "dare-ties", settings | dict(preset="mergekit", agg="mean" if hyper.get("normalize") else "sum")


def frequencies(case: dict, hyper: dict) -> tuple[str, dict]:
    """FREE-Merging's three copies, and the fourth, which takes the longer side."""
    name = case["case"]
    side = "max" if "find_low_high_fft" in manifest()["sources"][case["source"]]["symbol"] else "min"
    scale = hyper.get("scaling_coef", hyper.get("lambda", 1.0))
    align = bool(hyper.get("with_align", "align" in name))
    return "fr", dict(ratio=hyper.get("filter_ratio", 0.7), align=align, side=side, scale=scale)


TRANSLATORS = {
    "ties_": original, "core_": knots, "knots_": knots, "mergelm_": mergelm, "nsc_": nsc, "peftfn_": peft,
    "mk_": mergekit, "fr_": frequencies, "emr_": lambda case, hyper: ("emr", {}),
}  # fmt: skip


def mine(case: dict) -> bool:
    """MergeLM's and KnOTS' plain sums are task arithmetic's."""
    way = case["hyper"].get("merge_method")
    plain = way == "tv" and not case["hyper"].get("dare") and case["hyper"].get("topK", 100) in (1, 100)
    return not plain and not case["case"].startswith("mergelm_task")


CASES = cases(
    "ties_", "core_full_ties", "core_full_dare", "core_core_ties", "core_core_dare", "knots_", "mergelm_", "nsc_ties",
    "nsc_dareties", "peftfn_ties", "peftfn_dare", "peftfn_magnitude", "mk_ties", "mk_dare", "emr_", "fr_",
)  # fmt: skip
CASES = [case for case in CASES if mine(case)]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden(case):
    prefix = case["case"].partition("_")[0] + "_"
    method, settings = TRANSLATORS[prefix](case, case["hyper"])
    if method.split("-")[0] in ("core", "knots") and method.split("-")[0] not in SPACES:
        pytest.skip(f"no space for {method} yet")
    found = combination(case, method, masks(case), **settings)
    if case["case"].startswith("emr_task"):
        require_task(case, found, int(case["case"][len("emr_task") :]))
    else:
        require_golden(case, found)


def require_task(case: dict, found: Combination, k: int) -> None:
    for layer, updates in emr_tasks(found._matrices):
        expected = array(f"{case['id']}/{layer}").double()
        tolerance = case["suggested_max_abs_tol_relative_to_max"] * expected.abs().max().item()
        torch.testing.assert_close(updates[k].double(), expected, rtol=0, atol=max(tolerance, 1e-7))


@pytest.mark.parametrize("case", cases("emr_unified"), ids=lambda case: case["id"])
def test_masks_and_rescalers_of_the_original_emr(case):
    found = combination(case, "emr")
    rescalers = emr_rescalers(found._matrices)
    torch.testing.assert_close(rescalers.float(), array(f"{case['id']}/extra/rescalers"), rtol=1e-6, atol=0)
    for layer, updates in emr_tasks(found._matrices):
        tau = dense(found.update(layer))
        for k, update in enumerate(updates):
            agree = array(f"{case['id']}/extra/mask/{layer}/task{k}").bool()
            torch.testing.assert_close(update, rescalers[k].to(tau) * torch.where(agree, tau, 0))


@pytest.mark.parametrize("case", cases("fr_vit"), ids=lambda case: case["id"])
def test_each_task_is_filtered_as_in_the_original_fr(case):
    own = {f"task{k}": 0.0 for k in range(3)}
    for k in range(3):
        if f"{case['id']}/extra/filtered/L0/task{k}" in case["extra_keys"]:
            method, settings = frequencies(case, case["hyper"])
            one = combination(case, method, weights=own | {f"task{k}": 1.0}, **settings)
            for layer in LAYERS:
                expected = array(f"{case['id']}/extra/filtered/{layer}/task{k}")
                torch.testing.assert_close(one.update(layer), expected, rtol=0, atol=1e-7 * expected.abs().max().item())


NSC_KNOTS = [case for case in manifest()["cases"] if case["case"].startswith("nsc_knots")]


@pytest.mark.parametrize("case", NSC_KNOTS, ids=lambda case: case["id"])
def test_knots_of_nsc_given_its_svd(case):
    """Its election depends on the signs of singular vectors, so it is comparable on its own SVD alone."""
    name, settings = nsc(case, case["hyper"])
    recipe = read_recipe(name, **settings)
    for layer in LAYERS:
        U, S, Vh = (array(f"{case['id']}/extra/svd_{part}/{layer}") for part in ("U", "S", "Vh"))
        kept = case["hyper"]["svd_tol"] < S
        X = torch.stack((S[kept, None] * Vh[kept]).chunk(3, 1)).float()
        place = Place(
            layer, ("task0", "task1", "task2"), torch.ones(3), min(X.shape[1:]), "knots", masks(case).get(layer)
        )
        found = U[:, kept].float() @ recipe.method.on_matrices(X, recipe.settings, place) * recipe.scale
        expected = array(f"{case['id']}/{layer}")
        torch.testing.assert_close(found, expected.float(), rtol=0, atol=1e-5 * expected.abs().max().item())


METHODS_HERE = {
    **{f"ties {preset}": ("ties", dict(preset=preset, density=0.3)) for preset in PRESETS},
    "ties max": ("ties", dict(agg="max")),
    "dare": ("dare", dict(drop=0.6)),
    "dare l1": ("dare", dict(drop=0.6, rescale="l1")),
    **{f"dare-ties {preset}": ("dare-ties", dict(preset=preset, drop=0.6)) for preset in PRESETS},
    "dare-ties nsc trims": ("dare-ties", dict(preset="nsc", drop=0.6, density=0.4)),
    "dare-ties trims": ("dare-ties", dict(drop=0.2, density=0.4)),
    "emr": ("emr", {}),
    "fr": ("fr", {}),
    "fr aligned": ("fr", dict(align=True)),
}
every = pytest.mark.parametrize("name", METHODS_HERE)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
presets = pytest.mark.parametrize("preset", PRESETS)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def place_of(K: int, weights: list[float] | None = None, name: str = "layer", **more) -> Place:
    tasks = tuple("abcdefgh"[:K])
    return Place(name, tasks, torch.tensor(weights or [1.0] * K, dtype=torch.float64), 4, **more)


def run(method: str, X: Tensor, place: Place | None = None, **settings) -> Tensor:
    """One layer alone."""
    recipe = read_recipe(method, **settings)
    place = place or place_of(len(X))
    known = (
        recipe.method.survey(lambda: iter([(place, X)]), recipe.settings) if recipe.method.survey else recipe.settings
    )
    return recipe.method.on_matrices(X, known, place)


def run_all(method: str, layers: list[Tensor], space: str = "full", **settings) -> list[Tensor]:
    """Layers that may know of each other."""
    recipe = read_recipe(method, **settings)
    places = [place_of(len(X), name=f"l{i}", space=space) for i, X in enumerate(layers)]
    known = recipe.method.survey(lambda: zip(places, layers, strict=True), recipe.settings)
    return [recipe.method.on_matrices(X, known, place) for place, X in zip(places, layers, strict=True)]


def plain_ties(flat: Tensor, density: float, agg: str = "mean") -> Tensor:
    """As its authors wrote it: (K, d) -> (d,)."""
    d = flat.shape[1]
    if density < 1:
        smallest = flat.abs().sort(1).values[:, [d - int(d * density) - 1]]
        flat = flat * (flat.abs() >= smallest)
    sign = flat.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    chosen = flat * torch.where(sign > 0, flat > 0, flat < 0)
    total = {"sum": chosen.sum(0), "mean": chosen.sum(0), "max": chosen.abs().amax(0) * sign}[agg]
    return total / (chosen != 0).sum(0).clamp(min=1) if agg == "mean" else total


def layers_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Three layers, the last a bias, of unlike magnitudes; or integers full of ties and zero sums; or mostly zeros."""
    found = [10.0**-i * noise(4, *shape, seed=i) for i, shape in enumerate([(9, 7), (5, 12), (1, 11)])]
    if kind != "noise":
        found = [(3 * 10.0**i * X).round().clamp(-2, 2) for i, X in enumerate(found)]
    if kind == "zeros":
        found = [X * (noise(*X.shape, seed=9) > 1.5) for X in found]
    return [X.to(dtype) for X in found]


@both
@pytest.mark.parametrize("agg", ["mean", "sum", "max"])
@pytest.mark.parametrize("density", [1.0, 0.5, 0.2, 0.01])
@pytest.mark.parametrize("kind", ["noise", "integers", "zeros"])
def test_streamed_ties_of_a_model_is_the_flattened_one(kind, density, agg, dtype):
    layers = layers_of(kind, dtype)
    flat = torch.cat([X.flatten(1) for X in layers], 1)
    found = torch.cat([D.flatten() for D in run_all("ties", layers, preset="original", density=density, agg=agg)])
    torch.testing.assert_close(found, plain_ties(flat, density, agg))
    assert found.dtype == dtype


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


def test_a_model_of_two_dtypes_is_trimmed_exactly():
    layers = layers_of("noise", torch.float64)
    layers[1] = layers[1].float()
    flat = torch.cat([X.flatten(1) for X in layers], 1)
    found = torch.cat([D.flatten() for D in run_all("ties", layers, preset="original", density=0.3)])
    torch.testing.assert_close(found, plain_ties(flat, 0.3), rtol=1e-6, atol=0)


@both
@pytest.mark.parametrize("k", [0, 1, 2, 100, 1199, 1200, 1201])
def test_kth_largest_is_that_of_a_sort(k, dtype):
    rows = torch.stack([
        noise(1200), noise(1200).round(), noise(1200) * (noise(1200, seed=1) > 1), torch.zeros(1200).double(),
        torch.full((1200,), -0.3).double(), noise(1200) * 1e-42, noise(1200).exp() ** 20, 1 + noise(1200) * 1e-13,
    ]).to(dtype)  # fmt: skip
    sizes = []
    found = kth_largest(lambda: rows.split([1, 700, 499], 1), lambda d: sizes.append(d) or k)
    expected = rows.abs().sort(1, descending=True).values
    infinite = torch.full((len(rows), 1), torch.inf, dtype=dtype)
    expected = torch.cat([infinite, expected, torch.zeros_like(infinite)], 1)[:, k]
    assert sizes == [1200] and torch.equal(found, expected) and found.dtype == dtype


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
            yield place_of(3, name=f"l{i}"), X
            del X

    if method == "emr":
        emr_rescalers(matrices)
    else:
        settings = read_recipe(method, preset="original", density=0.2).settings
        METHODS[method].survey(matrices, settings)
    assert len(alive) >= 3


@every
@both
def test_the_order_of_tasks_does_not_matter(name, dtype):
    method, settings = METHODS_HERE[name]
    X, order = noise(4, 13, 9, dtype=dtype), [2, 0, 3, 1]
    place = place_of(4, [1.0, 0.5, 2.0, -0.7])
    turned = place._replace(tasks=tuple(place.tasks[k] for k in order), weights=place.weights[order])
    torch.testing.assert_close(run(method, X[order], turned, **settings), run(method, X, place, **settings))


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
    place = place_of(3, weights)
    expected = merge_utils.ties(list(X), w, 0.3, elect)
    torch.testing.assert_close(run("ties", X, place, **own, density=0.3), expected)
    expected = merge_utils.magnitude_prune(list(X), w, 0.3)
    torch.testing.assert_close(run("ties", X, place, preset="peft", density=0.3, elect="none", agg="sum"), expected)
    torch.manual_seed(0)
    keep = torch.stack([torch.bernoulli(torch.full_like(x, 0.4)).bool() for x in X])
    for mine, theirs in (("dare-ties", "dare_ties"), ("dare", "dare_linear")):
        torch.manual_seed(0)
        expected = getattr(merge_utils, theirs)(list(X), w, 0.4, *([elect] if mine == "dare-ties" else []))
        given = own if mine == "dare-ties" else {}
        torch.testing.assert_close(run(mine, X, place._replace(keep=keep), drop=0.6, **given), expected)


def test_where_weights_stand():
    """mergekit divides by them, peft votes without them, the others vote with them and count heads."""
    X = torch.tensor([[[3.0]], [[-1.0]], [[1.0]]], dtype=torch.float64)
    place = place_of(3, [0.1, 1.0, 0.5])
    found = {preset: run("ties", X, place, preset=preset, density=1.0).item() for preset in PRESETS}
    expected = {"default": -1.0, "original": -1.0, "nsc": 0.8, "peft": 0.4, "mergekit": -1.0}
    assert found == pytest.approx(expected)
    assert run("ties", X[[0, 2]], place_of(2, [0.1, 0.5]), preset="mergekit", density=1.0).item() == pytest.approx(
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


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_by_its_formula(rescale):
    X, place = noise(3, 30, 20), place_of(3, [1.0, 0.5, -2.0])
    keep = torch.stack([keep_mask(DareSettings(drop=0.7), "layer", task, (30, 20)) for task in place.tasks])
    assert (keep.double().mean((1, 2)) - 0.3).abs().max() < 5 * (0.3 * 0.7 / 600) ** 0.5
    assert (keep[0] ^ keep[1]).any()
    kept = X * keep
    factor = {"inverse": 1 / 0.3, "l1": X.abs().sum((1, 2)) / kept.abs().sum((1, 2)), "none": 1.0}[rescale]
    expected = (kept * (factor * place.weights)[:, None, None]).sum(0)
    torch.testing.assert_close(run("dare", X, place, drop=0.7, rescale=rescale), expected)
    given = place._replace(keep=~keep)
    torch.testing.assert_close(
        run("dare", X, given, drop=0.3, rescale="none"), (X * ~keep * place.weights[:, None, None]).sum(0)
    )


def test_masks_depend_on_seed_layer_and_task_alone():
    shapes = dict(shape=(8, 8))
    one = keep_mask(DareSettings(), "layer", "a", **shapes)
    assert torch.equal(one, keep_mask(DareSettings(), "layer", "a", **shapes))
    others = [
        keep_mask(DareSettings(seed=1), "layer", "a", **shapes), keep_mask(DareSettings(), "other", "a", **shapes),
        keep_mask(DareSettings(), "layer", "b", **shapes),
    ]  # fmt: skip
    assert not any(torch.equal(one, other) for other in others)
    state = torch.get_rng_state()
    keep_mask(DareSettings(), "layer", "a", **shapes)
    assert torch.equal(state, torch.get_rng_state())
    three, two = noise(3, 8, 8), [0.0, 1.0, 1.0]
    torch.testing.assert_close(
        run("dare", three, place_of(3, two)),
        run("dare", three[1:], place_of(3)._replace(tasks=("b", "c"), weights=torch.ones(2))),
    )


def test_masks_are_the_same_in_every_process():
    """Whatever the order of sets there."""
    code = (
        "from nsc.methods.dare import *\n"
        "for t in {'a', 'b', 'c'}: print(t, keep_mask(DareSettings(0.5, 3), 'l', t, (4, 9)).int().flatten().tolist())"
    )
    root = Path(__file__).parent.parent
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
    found = run(method, X, **settings)
    assert found.isfinite().all() and (name.startswith("fr") or not found[3].any())
    assert run(method, torch.zeros(3, 8, 6), **settings).eq(0).all()


def test_emr_recovers_tasks_that_agree_and_survives_those_without_update():
    base = noise(1, 7, 5).abs()
    X = torch.cat([base, 3 * base, torch.zeros_like(base)])
    layers = [(place_of(3, name=n), X if n == "p" else 2 * X) for n in "pq"]
    found = dict(emr_tasks(lambda: iter(layers)))
    for place, updates in layers:
        torch.testing.assert_close(found[place.name], updates)


@pytest.mark.parametrize("shape", [(8, 8), (9, 8), (8, 9), (7, 15), (24, 40), (2, 3), (1, 6)])
@pytest.mark.parametrize("settings", [dict(), dict(ratio=0.3), dict(align=True), dict(side="max", ratio=0.6)], ids=str)
def test_fr_is_the_filter_of_its_code(shape, settings):
    X, place = noise(3, *shape), place_of(3, [1.0, 0.5, 2.0])
    H, W = shape
    side = (max if settings.get("side") == "max" else min)(shape)
    low, high = side // 10, settings.get("ratio", 0.7) * side
    d = torch.tensor([[((u - H // 2) ** 2 + (v - W // 2) ** 2) ** 0.5 for v in range(W)] for u in range(H)])
    w = (d <= low).double() + ((low <= d) & (d <= high)).double()
    parts = torch.fft.ifft2(torch.fft.fft2(X) * w).real
    if settings.get("align"):
        means = parts.abs().mean((1, 2))
        parts = parts * (means.max() / means)[:, None, None]
    torch.testing.assert_close(run("fr", X, place, **settings), (parts * place.weights[:, None, None]).sum(0))


def test_what_fr_removes():
    """The figures of its docstring, for even sides, where the two halves are alike; and the mean of an update."""
    for (H, W), share in {(768, 768): 113 / 768**2, (1024, 4096): 0.68}.items():
        gone = band(H, W, FrSettings()) == 0
        both_halves = gone.sum() + gone[:, 1:-1].sum()
        assert both_halves.item() / (H * W) == pytest.approx(share, rel=5e-3)
    assert run("fr", torch.ones(1, 16, 16).double()).abs().max() < 1e-12


REFUSED = {
    "density is a fraction above 0": ("ties", dict(density=20)),
    "percent is not taken": ("dare", dict(drop=90)),
    "density": ("ties", dict(density=0.0)),
    "drop is a fraction at least 0 and below 1": ("dare-ties", dict(drop=1.0)),
    "preset must be default": ("ties", dict(preset="Ties")),
    "scope must be matrix or model": ("ties", dict(scope="layer")),
    "elect must be mass, count or none": ("ties", dict(elect="sign")),
    "agg must be mean, sum or max": ("ties", dict(agg="median")),
    "no sign for agg max": ("ties", dict(elect="none", agg="max")),
    "rescale must be inverse, l1 or none": ("dare", dict(rescale="l2")),
    "dropping replaces trimming": ("dare-ties", dict(preset="peft", density=0.2)),
    "ratio is a fraction": ("fr", dict(ratio=0)),
    "side must be min or max": ("fr", dict(side="mean")),
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
        run("dare", noise(3, 5, 4), place_of(3, keep=keep))


@every
def test_recipes_are_plain_values(name):
    method, settings = METHODS_HERE[name]
    recipe = read_recipe(method, **settings)
    assert read_recipe(**yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
