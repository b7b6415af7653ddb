"""That no golden is forgotten: each well-posed case is compared in some test file, others here in their own way."""

import ast
from pathlib import Path

import pytest
import torch
from merging import LAYERS, array, manifest

from nsc.methods import METHODS, Place

# Cases that cannot be compared as they are, and why.
ILL_POSED = {
    "nsc_knots_ties_sum_top0.2": "its election counts signs of singular vectors, which are arbitrary; U S V' is given",
}
KNOTS = [case for case in manifest()["cases"] if case["case"].startswith("nsc_knots_ties")]


def claimed(path: Path) -> set[str]:
    """The beginnings of case names that a test file gives to ``merging.cases``, as literals."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    names = [call for call in calls if getattr(call.func, "id", getattr(call.func, "attr", "")) == "cases"]
    return {word.value for call in names for word in call.args if isinstance(word, ast.Constant)}


def test_every_well_posed_case_is_compared_somewhere():
    claims = tuple(set().union(*map(claimed, Path(__file__).parent.glob("test_*.py"))))
    forgotten = [c["id"] for c in manifest()["cases"] if c.get("well_posed", True) and not c["case"].startswith(claims)]
    assert not forgotten, f"no test file asks merging.cases for {', '.join(forgotten)}"


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
    place = Place(layer, tuple("abc"[:K]), torch.ones(K, dtype=torch.float64), int(kept.sum()), "knots")

    def merged(signs: torch.Tensor) -> torch.Tensor:
        parts = (signs * S[kept])[:, None] * Vh[kept]
        X = parts.float().reshape(len(signs), K, -1).transpose(0, 1)
        return (U[:, kept] * signs) @ method.on_matrices(X, settings, place).double()

    ones = torch.ones(int(kept.sum()), dtype=torch.float64)
    tolerance = case["suggested_max_abs_tol_relative_to_max"] * expected.abs().max().item()
    torch.testing.assert_close(merged(ones), expected, rtol=0, atol=tolerance)
    assert (merged(-ones) - expected).abs().max() > 0.1 * expected.abs().max()
