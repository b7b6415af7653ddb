"""The goldens of the other methods: inputs, expected values and masks of the original implementations, by case.

From the public implementations named in ``golden/merging/manifest.json``, each at its commit.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nsc.methods import LowRank, Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe

FOLDER = Path(__file__).parent / "golden/merging"
LAYERS = ("L0", "L1", "L2")
DTYPES = {"f32": torch.float32, "f64": torch.float64}


@cache
def manifest() -> dict[str, Any]:
    """As it lies on disk."""
    return json.loads((FOLDER / "manifest.json").read_text())


def cases(*prefixes: str) -> list[dict[str, Any]]:
    """The well-posed cases whose name begins with one of these."""
    return [c for c in manifest()["cases"] if c["case"].startswith(prefixes) and c.get("well_posed", True)]


@cache
def arrays(file: str) -> Any:
    """inputs, inputs_ada or expected."""
    return np.load(FOLDER / f"{file}.npz")


def array(name: str, file: str = "expected") -> Tensor:
    """One array, such as ``<id>/L0`` or ``<id>/extra/keep/L0``."""
    return torch.from_numpy(arrays(file)[name])


def updates(case: dict[str, Any], layer: str, scales: tuple[float, ...] | None = None) -> Updates:
    """The layer's K updates in the case's dtype; scale 1 unless others are given."""
    dtype, input_set = DTYPES[case["run_dtype"]], case["input_set"]
    K = sum(f"{input_set}/{layer}/task{k}/A" in arrays("inputs") for k in range(9))
    A, B = ([array(f"{input_set}/{layer}/task{k}/{side}", "inputs").to(dtype) for k in range(K)] for side in "AB")
    return Updates(layer, tuple(f"task{k}" for k in range(K)), tuple(A), tuple(B), scales or (1.0,) * K, (1.0,) * K)


def combination(
    case: dict[str, Any], method: str, masks: dict[str, Tensor] | None = None, **settings: Any
) -> Combination:
    """``method`` on the case's inputs."""
    stack = stack_of({layer: updates(case, layer) for layer in LAYERS})
    return Combination(stack, read_recipe(method, **settings), masks=masks)


def dense(update: LowRank | Tensor) -> Tensor:
    """(m, d)."""
    return update.B @ update.A if isinstance(update, LowRank) else update


def require_golden(case: dict[str, Any], merge: Combination) -> None:
    """Every layer is the original's, to the manifest's tolerance relative to the largest entry; integers exactly so."""
    for layer in LAYERS:
        expected = array(f"{case['id']}/{layer}").double()
        tolerance = case["suggested_max_abs_tol_relative_to_max"] * expected.abs().max().item()
        torch.testing.assert_close(dense(merge.update(layer)).double(), expected, rtol=0, atol=tolerance)
