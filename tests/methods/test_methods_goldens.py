"""That no golden is forgotten: each well-posed case is compared in some test file, others here in their own way."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nsc.methods import METHODS, LayerInfo
from tests.merging_goldens import LAYERS, array, manifest

# Cases that cannot be compared as they are, and why.
ILL_POSED = {
    "nsc_knots_ties_sum_top0.2": "its election counts signs of singular vectors, which are arbitrary; U S V' is given",
}
KNOTS = [case for case in manifest()["cases"] if case["case"].startswith("nsc_knots_ties")]


def compared() -> set[str]:
    """The ids of the cases that tests are parametrized by, in every test file that reads the goldens."""
    root = Path(__file__).parents[2]
    reads = "from tests.merging_goldens import"
    files = [path for path in root.glob("tests/*/test_*.py") if reads in path.read_text()]
    modules = [".".join(path.relative_to(root).with_suffix("").parts) for path in files]
    tests = [test for module in modules for test in vars(importlib.import_module(module)).values()]
    marks = [mark for test in tests for mark in getattr(test, "pytestmark", ()) if mark.name == "parametrize"]
    given = [value for mark in marks for values in mark.args[1] for value in (values, *as_tuple(values))]
    return {value["id"] for value in given if isinstance(value, dict) and "id" in value}


def as_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (tuple, list)) else ()


def test_every_well_posed_case_is_compared_somewhere():
    forgotten = {case["id"] for case in manifest()["cases"] if case.get("well_posed", True)} - compared()
    assert not forgotten, f"no test is parametrized by {', '.join(sorted(forgotten))}"


def test_cases_are_ill_posed_for_a_reason():
    ill = {case["case"]: case["why_not_portable"] for case in manifest()["cases"] if not case.get("well_posed", True)}
    assert set(ill) == set(ILL_POSED) and all(ill.values())


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", KNOTS, ids=lambda case: case["id"])
def test_knots_by_the_signs_of_the_recorded_svd(case, layer):
    """NSC's TIES of S V'_k, given its own U S V': what is left is the method; other signs give another merge."""
    U, S, Vh = (array(f"{case['id']}/extra/svd_{part}/{layer}") for part in ("U", "S", "Vh"))
    hyper = case["hyper"]
    kept = hyper["svd_tol"] < S
    expected = array(f"{case['id']}/{layer}").double() / hyper["scaling_factor"]
    K = Vh.shape[1] // expected.shape[1]
    method = METHODS["ties"]
    settings = method.settings(preset="nsc", density=hyper["topK"], agg=hyper["merging_type"])
    info = LayerInfo(layer, tuple("abc"[:K]), torch.ones(K, dtype=torch.float64), int(kept.sum()), "knots")

    def merged(signs: torch.Tensor) -> torch.Tensor:
        parts = (signs * S[kept])[:, None] * Vh[kept]
        X = parts.float().reshape(len(signs), K, -1).transpose(0, 1)
        return (U[:, kept] * signs) @ method.on_matrices(X, settings, info).double()

    ones = torch.ones(int(kept.sum()), dtype=torch.float64)
    tolerance = case["suggested_max_abs_tol_relative_to_max"] * expected.abs().max().item()
    torch.testing.assert_close(merged(ones), expected, rtol=0, atol=tolerance)
    assert (merged(-ones) - expected).abs().max() > 0.1 * expected.abs().max()
