"""Methods of factors against their originals' goldens, and their laws: task arithmetic, linear, LEGO, RobustMerge."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods import METHODS, Updates
from nsc.methods.robustmerge import trim
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import LAYERS, array, cases, dense, require_golden, updates


def translated(case: dict[str, Any]) -> tuple[str, dict[str, Any], list[float] | None]:
    """Method, settings and s_k that a case's ``hyper`` asks for; s_k None where all are 1."""
    hyper, name, settings = dict(case["hyper"]), case["case"], {}
    for key in ("lam", "lambda", "lambda_total", "scaling_coef", "scale"):
        settings |= {"scale": float(hyper[key])} if key in hyper else {}
    if "weights" in hyper:
        settings["weights"] = {f"task{k}": w for k, w in enumerate(hyper["weights"])}
    if name.startswith(("nsc_linear", "nsc_ta")):
        settings["agg"] = hyper.get("merging_type") or ("mean" if "_mean" in name else "sum")
    if name.startswith("nsc_lego"):
        settings |= {"clusters": hyper["K"], "iterations": hyper["kmeans_iters"]}
        settings["parameter_reweighting"] = hyper["use_param_reweighting"]
        settings["output_reweighting"] = hyper["use_output_reweighting"]
        settings["initial"] = initial(case)
        return "lego", settings, None
    if name == "robustmerge":
        settings = {
            "density": hyper["mask_ratio"],
            "gain_quantile": 1 - hyper["att_ratio"],
            "fuse": hyper["fuse_weight"],
        }
        return name, settings, None
    alpha = hyper.get("lora_alpha", "r")
    scales = None if alpha == "r" else [a / r for a, r in zip(alpha, case["ranks"], strict=True)]
    return ("linear" if "linear" in name else "task-arithmetic"), settings, scales


def initial(case: dict[str, Any]) -> dict[str, list[int]] | None:
    """The first units of the original's permutation, as many as it has clusters."""
    clusters = case["hyper"]["K"] or case["ranks"][0]
    if clusters >= sum(case["ranks"]):
        return None
    return {layer: array(f"{case['id']}/extra/randperm/{layer}").tolist()[:clusters] for layer in LAYERS}


@pytest.mark.parametrize(
    "case",
    cases("task_vectors_", "nsc_ta_", "nsc_linear_", "peft_linear_", "nsc_lego_", "robustmerge"),
    ids=lambda case: case["id"],
)
def test_goldens(case):
    method, settings, scales = translated(case)
    stack = stack_of({layer: updates(case, layer, tuple(scales) if scales else None) for layer in LAYERS})
    require_golden(case, Combination(stack, read_recipe(method, **settings)))


def of(input_set: str, layer: str, dtype: str = "f64") -> Updates:
    """The inputs of a set of goldens."""
    return updates({"input_set": input_set, "run_dtype": dtype}, layer)


def run(given: Updates, method: str, **settings: Any) -> Tensor:
    """(m, d)."""
    recipe = read_recipe(method, **settings)
    assert recipe.method.on_factors is not None
    return dense(recipe.method.on_factors(given, recipe.settings))


def reordered(given: Updates, order: list[int]) -> Updates:
    """The same tasks in another order."""
    parts = {name: tuple(getattr(given, name)[k] for k in order) for name in ("tasks", "A", "B", "scales", "weights")}
    return replace(given, **parts)


def with_absent(given: Updates, d: int, m: int) -> Updates:
    """With a fourth task that does not touch the layer."""
    empty = torch.empty(0, d, dtype=torch.float64), torch.empty(m, 0, dtype=torch.float64)
    return Updates(
        given.name,
        (*given.tasks, "none"),
        (*given.A, empty[0]),
        (*given.B, empty[1]),
        (*given.scales, 0.0),
        (*given.weights, 1.0),
    )


FACTORS = ["task-arithmetic", "linear", "lego", "robustmerge"]
SCALED = dict(scales=(2.0, 0.5, 3.0), weights=(0.7, -0.4, 1.1))


@pytest.mark.parametrize("method", FACTORS)
@pytest.mark.parametrize("input_set", ["homog", "wide", "int", "pair"])
def test_the_order_of_tasks_does_not_matter(method, input_set):
    given = of(input_set, "L0")
    K = len(given.tasks)
    given = replace(given, scales=SCALED["scales"][:K], weights=SCALED["weights"][:K])
    turned = reordered(given, list(range(K))[::-1])
    torch.testing.assert_close(run(turned, method), run(given, method), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["task-arithmetic", "linear", "lego"])
def test_one_task_of_weight_one_is_returned(method):
    given = replace(reordered(of("hetero", "L1"), [1]), scales=(3.0,))
    torch.testing.assert_close(run(given, method), given.deltas()[0], rtol=0, atol=1e-11)


def test_robustmerge_of_one_task_without_trimming_is_fuse_squared_times_it():
    given = replace(reordered(of("homog", "L1"), [1]), scales=(3.0,))
    torch.testing.assert_close(run(given, "robustmerge", density=1.0), 4 * given.deltas()[0])


@pytest.mark.parametrize("method", FACTORS)
def test_scales_and_weights_count_once_and_alike(method):
    given = of("homog", "L2")
    scaled = replace(given, scales=SCALED["scales"], weights=SCALED["weights"])
    both = tuple(s * w for s, w in zip(*SCALED.values(), strict=True))
    torch.testing.assert_close(run(scaled, method), run(replace(given, weights=both), method))
    assert (run(scaled, method) - run(given, method)).abs().max() > 0.01


MEAN = {"agg": "mean"}


@pytest.mark.parametrize(
    ("method", "settings"), [*((m, {}) for m in FACTORS), ("task-arithmetic", MEAN), ("linear", MEAN)]
)
def test_an_absent_adapter_is_left_out_but_counts_in_a_mean(method, settings):
    given = of("homog", "L0")
    share = 3 / 4 if settings else 1
    merged = run(with_absent(given, 40, 24), method, **settings)
    torch.testing.assert_close(merged, share * run(given, method, **settings), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", FACTORS)
def test_the_factoring_of_an_update_matters_to_all_but_sums(method):
    """Rows of one A enlarged and columns of its B made smaller: the same updates."""
    given = of("wide", "L1")
    gauge = torch.ones(12, dtype=torch.float64)
    gauge[3] = 10
    A, B = (gauge[:, None] * given.A[0], *given.A[1:]), (given.B[0] / gauge, *given.B[1:])
    turned = replace(given, A=A, B=B)
    torch.testing.assert_close(turned.deltas(), given.deltas())
    change = (run(turned, method) - run(given, method)).norm() / run(given, method).norm()
    assert change < 1e-12 if method == "task-arithmetic" else change > 0.01


@pytest.mark.parametrize("method", ["linear", "robustmerge"])
def test_unequal_ranks_are_refused(method):
    with pytest.raises(NSCError, match=rf"{method}.*ranks must be equal.*L0.*task0 2, task1 4, task2 6.*core-ties"):
        run(of("hetero", "L0"), method)


def test_linear_has_cross_terms_with_the_sign_on_one_side():
    given = replace(of("pair", "L0"), scales=(2.0, 0.5), weights=(1.0, -4.0))
    (A0, A1), (B0, B1) = given.A, given.B
    expected = 2 * B0 @ A0 - 2 * B1 @ A1 + 2 * (B1 @ A0 - B0 @ A1)  # |w s| = 2, 2
    torch.testing.assert_close(run(given, "linear"), expected)


def test_lego_with_every_unit_a_cluster_is_task_arithmetic():
    for input_set in ("hetero", "int"):
        given = replace(of(input_set, "L1"), scales=SCALED["scales"])
        merged = run(given, "lego", clusters=12, output_reweighting=False)
        torch.testing.assert_close(merged, run(given, "task-arithmetic"), rtol=0, atol=1e-10)


def test_lego_takes_all_units_of_unequal_ranks():
    given = of("hetero", "L0")
    one = run(given, "lego", clusters=1, parameter_reweighting=False)
    A, B = torch.cat(given.A).mean(0), torch.cat(given.B, 1).mean(1)
    torch.testing.assert_close(one, 6**0.5 * torch.outer(B, A))
    assert torch.linalg.matrix_rank(run(given, "lego")) == 6


def test_lego_takes_the_callers_units_by_layer_and_else_its_seed():
    given = of("homog", "L0")
    seeded = run(given, "lego", clusters=6)
    torch.testing.assert_close(run(given, "lego", clusters=6, initial={"L1": [0]}), seeded, rtol=0, atol=0)
    others = [run(given, "lego", clusters=6, seed=seed) for seed in range(1, 5)]
    assert any((other - seeded).abs().max() > 0.01 for other in others)
    for wrong in ([0, 1], [0, 1, 2, 3, 4, 12]):
        with pytest.raises(NSCError, match=r"initial of L0 must be 6 of its units 0 to 11, not \["):
            run(given, "lego", clusters=6, initial={"L0": wrong})


def test_robustmerge_stays_finite_where_trimming_empties_a_row():
    """The original's 0/0 makes all of layer L2 of the set ``wide`` NaN; other layers of it are as in the original."""
    given = of("wide", "L2")
    left = trim(torch.stack(given.A), 0.2).abs().sum(2)
    assert (left == 0).any() and all(trim(torch.stack(of("wide", n).A), 0.2).any(2).all() for n in ("L0", "L1"))
    merged = run(given, "robustmerge")
    assert merged.isfinite().all() and merged.abs().max() > 0.1
    row = int((left == 0).any(0).nonzero()[0])
    alone = replace(given, A=tuple(a.index_fill(0, torch.tensor(row), 0) for a in given.A))
    assert run(alone, "robustmerge").isfinite().all()  # no adapter has a gain there


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("linear", dict(agg="max"), "agg must be one of sum, mean, not max"),
        ("lego", dict(clusters=0), "clusters must be 1 or more"),
        ("lego", dict(iterations=0), "iterations must be 1 or more"),
        (
            "robustmerge",
            dict(density=20),
            "density must be a fraction above 0 and at most 1, not 20.0; percent is not taken",
        ),
        ("robustmerge", dict(gain_quantile=1.0), "gain_quantile must be a fraction at least 0 and below 1, not 1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(method, settings, said):
    with pytest.raises(NSCError, match=said):
        read_recipe(method, **settings)


def test_every_method_names_itself_and_its_source():
    assert all(METHODS[name].line and METHODS[name].source.startswith("https://") for name in FACTORS)
