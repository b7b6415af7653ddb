"""TIES, DARE, DARE-TIES, EMR and FR against the original implementations, each case by its own settings."""

import pytest
import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods import LayerInfo
from nsc.methods.emr import emr_rescalers, emr_tasks
from nsc.recipes.combination import Combination
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import LAYERS, array, cases, combination, dense, manifest, require_golden

SHAPES = manifest()["conventions"]["layers"]
SIZE = sum(m * d for m, d in SHAPES.values())


def masks(case: dict) -> dict[str, Tensor]:
    """layer -> (K, p, q) bool, kept, whatever way the case recorded what was drawn."""
    drawn: dict[str, list] = {}
    for key in sorted(case.get("extra_keys", [])):
        kind, _, rest = key.split("/extra/")[1].partition("/")
        layer = rest.partition("/")[0]
        if kind in ("keep", "drop", "bernoulli"):
            drawn.setdefault(layer, []).append(array(key).bool() ^ (kind == "drop"))
    whole = {layer: parts[0] if len(parts) == 1 else torch.stack(parts) for layer, parts in drawn.items()}
    return {
        layer: mask.view(len(mask), -1, SHAPES[layer][1]) if mask.dim() == 2 else mask for layer, mask in whole.items()
    }


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
    if hyper.get("isotropize"):
        settings["isotropize"] = True
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
    "ties_": original,
    "core_": knots,
    "knots_": knots,
    "mergelm_": mergelm,
    "nsc_": nsc,
    "peftfn_": peft,
    "mk_": mergekit,
    "fr_": frequencies,
    "emr_": lambda case, hyper: ("emr", {}),
}


def mine(case: dict) -> bool:
    """MergeLM's and KnOTS' plain sums are task arithmetic's."""
    way = case["hyper"].get("merge_method")
    plain = way == "tv" and not case["hyper"].get("dare") and case["hyper"].get("topK", 100) in (1, 100)
    return not plain and not case["case"].startswith("mergelm_task")


CASES = cases(
    "ties_",
    "core_full_ties",
    "core_full_dare",
    "core_core_ties",
    "core_core_dare",
    "knots_",
    "mergelm_",
    "nsc_ties",
    "nsc_dareties",
    "peftfn_ties",
    "peftfn_dare",
    "peftfn_magnitude",
    "mk_ties",
    "mk_dare",
    "emr_",
    "fr_",
)
CASES = [case for case in CASES if mine(case)]


@pytest.mark.parametrize("case", CASES, ids=[case["id"] for case in CASES])
def test_golden(case):
    prefix = case["case"].partition("_")[0] + "_"
    method, settings = TRANSLATORS[prefix](case, case["hyper"])
    merge = combination(case, method, masks(case), **settings)
    if case["case"].startswith("emr_task"):
        require_task(case, merge, int(case["case"][len("emr_task") :]))
    else:
        require_golden(case, merge)


def require_task(case: dict, merge: Combination, k: int) -> None:
    for layer, updates in emr_tasks(merge.matrices):
        expected = array(f"{case['id']}/{layer}").double()
        tolerance = case["suggested_max_abs_tol_relative_to_max"] * expected.abs().max().item()
        torch.testing.assert_close(updates[k].double(), expected, rtol=0, atol=max(tolerance, 1e-7))


@pytest.mark.parametrize("case", cases("emr_unified"), ids=lambda case: case["id"])
def test_masks_and_rescalers_of_the_original_emr(case):
    merge = combination(case, "emr")
    rescalers = emr_rescalers(merge.matrices)
    torch.testing.assert_close(rescalers.float(), array(f"{case['id']}/extra/rescalers"), rtol=1e-6, atol=0)
    for layer, updates in emr_tasks(merge.matrices):
        tau = dense(merge.update(layer))
        for k, update in enumerate(updates):
            agree = array(f"{case['id']}/extra/mask/{layer}/task{k}").bool()
            torch.testing.assert_close(update, rescalers[k].to(tau) * torch.where(agree, tau, 0))
            own = combination(case, "emr", task=f"task{k}")
            torch.testing.assert_close(dense(own.update(layer)), update)


def test_emr_of_a_task_that_there_is_not_is_refused():
    with pytest.raises(NSCError, match="the task of emr must be one of task0, task1, task2, not other"):
        combination(cases("emr_unified")[0], "emr", task="other").update("L0")


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
        X = torch.stack((S[kept, None] * Vh[kept]).split(SHAPES[layer][1], 1)).float()
        tasks = tuple(f"task{k}" for k in range(len(X)))
        info = LayerInfo(layer, tasks, torch.ones(len(X)), min(X.shape[1:]), "knots", masks(case).get(layer))
        merged = U[:, kept].float() @ recipe.method.on_matrices(X, recipe.settings, info) * recipe.scale
        expected = array(f"{case['id']}/{layer}")
        torch.testing.assert_close(merged, expected.float(), rtol=0, atol=1e-5 * expected.abs().max().item())
