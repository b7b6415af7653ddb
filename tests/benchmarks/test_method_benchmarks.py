"""The benchmarks of merging methods: dense formulations give what nsc gives, and what is measured, recorded, shown."""

import sys
from pathlib import Path

import pytest
import torch

from tests.merging_goldens import dense

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import dense_methods  # noqa: E402
import merges  # noqa: E402
import table  # noqa: E402

from nsc.methods import Updates  # noqa: E402
from nsc.recipes.combination import Combination, stack_of  # noqa: E402
from nsc.recipes.spec import method_of, names, read_recipe  # noqa: E402

SHAPE, RANK, TASKS = (26, 40), 3, tuple("abc")
DROPS = {"dare": dense_methods.dare, "dare-ties": dense_methods.dare_ties}
PARTS = {"ties": dense_methods.ties, **DROPS}
NEVER_DENSE = {"linear", "lego", "robustmerge", "zero-interference"}
FROM_ROWS = {name for name in names() if method_of(name).inputs}  # a forward of the base takes most of their time


@pytest.fixture(scope="module")
def layer() -> Updates:
    """Float64, scales that differ."""
    generator = torch.Generator().manual_seed(3)
    A, B = (
        tuple(torch.randn(*shape, generator=generator).double() for _ in TASKS)
        for shape in ((RANK, SHAPE[1]), (SHAPE[0], RANK))
    )
    return Updates("layer", TASKS, A, B, (2.0, 1.0, 0.5), (1.0,) * 3)


def merged(layer: Updates, name: str, keep: torch.Tensor | None = None, **settings) -> torch.Tensor:
    masks = None if keep is None else {"layer": keep}
    return dense(Combination(stack_of({"layer": layer}), read_recipe(name, **settings), masks=masks).update("layer"))


def here(*wanted: str) -> list[str]:
    return [name for name in wanted if name in names()]


def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


@pytest.mark.parametrize("name", here(*(n for n in merges.FORMULATIONS if n not in ("knots", "svd", *DROPS))))
def test_dense_formulations_are_nsc_s(layer, name):
    D = dense_methods.dense_updates(layer.A, layer.B, layer.scales)
    agree(merged(layer, name), merges.FORMULATIONS[name](D))


@pytest.mark.parametrize("name", here("svd"))
def test_truncation(layer, name):
    D = dense_methods.dense_updates(layer.A, layer.B, layer.scales)
    agree(merged(layer, name), dense_methods.truncated_svd(D, RANK))


@pytest.mark.parametrize("name", here(*DROPS))
def test_entries_dropped_by_the_same_mask(layer, name):
    keep = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    D = dense_methods.dense_updates(layer.A, layer.B, layer.scales)
    agree(merged(layer, name, keep, drop=0.5), DROPS[name](D, 0.5, keep))


@pytest.mark.parametrize("name", here("knots-task-arithmetic", "knots-ties"))
def test_the_dense_svd_of_knots(layer, name):
    D = dense_methods.dense_updates(layer.A, layer.B, layer.scales)
    merge = PARTS.get(name.removeprefix("knots-"), dense_methods.task_arithmetic)
    agree(merged(layer, name), dense_methods.knots(D, merge))


@pytest.mark.parametrize("name", here("core-tsv"))
def test_core_space_has_the_same_full_space_counterpart(layer, name):
    D = dense_methods.dense_updates(layer.A, layer.B, layer.scales)
    agree(merged(layer, name), merges.FORMULATIONS[merges.formulation(name)](D))


def test_ties_by_hand():
    D = torch.tensor([[[4.0, -1, 2, 0.5]], [[-1.0, -3, 2, 1]]])
    assert dense_methods.ties(D, 0.5).tolist() == [[4, -2, 2, 1]]  # of four, int(4/2) + 1 = 3 are kept, and ties


@pytest.mark.parametrize("name", names())
def test_every_method_is_compared_or_never_dense(name):
    assert (merges.formulation(name) in merges.FORMULATIONS) != (name in NEVER_DENSE | FROM_ROWS)


def test_shapes_are_those_of_the_issue():
    assert (merges.BLOCKS, merges.TASKS, merges.RANK) == (32, 6, 16)
    assert sorted(merges.SHAPES.values()) == [(1024, 4096), (4096, 4096)]


@pytest.mark.parametrize(("side", "name"), [("nsc", "task-arithmetic"), ("dense", "knots")])
def test_a_measurement(side, name):
    found = merges.measure(side, name, {"q": (200, 300)}, 4, 3)
    assert found["block"] > 0 and found["clock_block"] > 0 and (found["whole"] is None) == (side == "dense")
    assert found["layers"] == (3 if side == "nsc" else 1)
    assert found["factor_bytes"] == found["layers"] * 6 * 4 * 500 * 4


def test_peak_memory_is_counted():
    peak = merges.peak_counter()
    if peak() is None:
        pytest.skip("this system does not count it")
    torch.ones(50_000_000)
    assert 199e6 <= peak() < 230e6


def entry(side: str, method: str, block: float, **info) -> dict:
    made = {"device": "CPU x", "threads": 1, "commit": "abc", "date": "2026-01-01", "torch": "2", "triton": "3"}
    usual = {"kind": "method", "side": side, "method": method, "block": block, "whole": None, "peak_bytes": 3 * 10**6}
    return {"fullname": side + method, "extra_info": {**usual, **info}, "stats": {}, "made": made}


def test_the_table_sets_each_method_beside_its_formulation():
    entries = [
        entry("dense", "knots", 100.0, peak_bytes=2 * 10**9),
        entry("nsc", "knots-ties", 0.5, against="knots", whole=9.0),
        entry("nsc", "tsv", 0.25, against="tsv", peak_bytes=None),
        entry("nsc", "lego", 0.25, against=None),
    ]
    shown = table.TABLES["methods"]({"cpu": entries})
    assert "| `knots-ties` | 9.00 s | 500 ms | 3 MB | knots, 100 s | 200x | 2000 MB |" in shown
    assert "| `tsv` |  | 250 ms |  |  |  |  |" in shown and "| `lego` |  | 250 ms | 3 MB |  |  |  |" in shown
    assert shown.count("**CPU x**") == 1
