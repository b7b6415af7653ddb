"""What `nsc inspect` says, with values that are known by construction."""

import time

import pytest
import torch

from nsc.adapters.inspection import format_inspection, inspect
from nsc.errors import AdapterError
from tests.tiny import random_factors, write_adapter

Q, V = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"


def rows(*indices: int, d: int = 32) -> torch.Tensor:
    return torch.eye(d)[list(indices)]


def one(path, A, name=Q, **config):
    """An adapter with one module, whose row space is that of ``A``."""
    return write_adapter(path, {name: (A, torch.ones(8, len(A)))}, r=len(A), **config)


def test_report_of_a_mixed_adapter(tmp_path):
    factors = random_factors([Q, "layers.1.self_attn.q_proj"], r=4) | random_factors([V], r=8)
    path = write_adapter(
        tmp_path / "mnli",
        factors,
        r=4,
        alpha=8,
        rank_pattern={"v_proj": 8},
        saved={"score.weight": torch.ones(2, 32).half()},
    )
    (report,) = inspect([path])
    assert [(t.kind, t.blocks, t.ranks, t.scales) for t in report.targets] == [
        ("q_proj", 2, (4, 4), (2.0,)),
        ("v_proj", 1, (8, 8), (1.0,)),
    ]
    assert (report.name, report.base, report.problems) == ("mnli", "tiny", ())
    assert (report.dtypes, report.saved) == (("float16", "float32"), ("score.weight",))
    assert report.size == (path / "adapter_model.safetensors").stat().st_size
    assert report.deficient == report.zero == report.overlaps == ()
    text = format_inspection([report])
    assert all(word in text for word in ("mnli", "tiny", "q_proj x 2: rank 4, scale 2", "v_proj x 1", "score.weight"))
    assert "CANNOT" not in text


def test_condition_rank_and_zero_modules(tmp_path):
    scaled = rows(0, 1, 2, 3) * torch.tensor([[1.0], [2.0], [4.0], [100.0]])
    twice = rows(5, 5, 6, 7)
    path = write_adapter(tmp_path / "a", {Q: (scaled, torch.ones(8, 4)), V: (twice, torch.zeros(8, 4))})
    (report,) = inspect([path])
    assert report.worst_condition == pytest.approx(100) and report.worst_module == Q
    assert report.deficient == (V,) and report.zero == (V,)
    assert f"rank-deficient A: {V}" in format_inspection([report])


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (rows(0, 1), rows(2, 3), 0.0),
        (rows(0, 1), rows(1, 2), 0.5),
        (rows(0, 1), rows(0, 1) * 7, 1.0),
        (rows(0, 1), torch.tensor([[1.0, 2.0], [3.0, 1.0]]) @ rows(0, 1), 1.0),  # mixed rows, the same space
        (rows(0, 1), rows(0, 1, 2, 3, 4), 1.0),  # contained
        (rows(0, 1), rows(0, 0, 5), 0.5),  # a doubled row counts once
    ],
)
def test_overlap(tmp_path, first, second, expected):
    report, last = inspect([one(tmp_path / "a", first), one(tmp_path / "b", second)])
    (overlap,) = report.overlaps
    assert overlap.mean == pytest.approx(expected, abs=1e-6)
    assert (overlap.other, overlap.shared, overlap.worst_module, last.overlaps) == ("b", 1, Q, ())


def test_overlap_across_wrappers_and_worst_module(tmp_path):
    a = write_adapter(tmp_path / "a", {Q: (rows(0, 1), torch.ones(8, 2)), V: (rows(0, 1), torch.ones(8, 2))}, r=2)
    wrapped = {f"model.{Q}": (rows(2, 3), torch.ones(8, 2)), f"model.{V}": (rows(0, 1), torch.ones(8, 2))}
    b = write_adapter(tmp_path / "b", wrapped | {"model.other": (rows(0, 1), torch.ones(8, 2))}, r=2)
    (overlap,) = inspect({"first": a, "second": b})[0].overlaps
    assert (overlap.other, overlap.shared, overlap.worst_module) == ("second", 2, V)
    assert (overlap.mean, overlap.worst, overlap.chance) == pytest.approx((0.5, 1.0, 2 / 32))
    assert "first x second: mean 0.500" in format_inspection(inspect({"first": a, "second": b}))


def test_no_shared_module_is_no_overlap(tmp_path):
    other_width = one(tmp_path / "c", rows(0, 1, d=16))
    reports = inspect([one(tmp_path / "a", rows(0)), one(tmp_path / "b", rows(0), name=V), other_width])
    assert [report.overlaps for report in reports] == [(), (), ()]


def test_unsupported_adapters_are_reported(tmp_path):
    dora = one(tmp_path / "dora", rows(0, 1), use_dora=True, bias="all")
    (report,) = inspect([dora])
    assert len(report.problems) == 2 and "DoRA" in report.problems[0] and report.targets[0].ranks == (2, 2)
    assert "CANNOT BE MERGED: DoRA" in format_inspection([report])


def test_damaged_and_untrained_adapters_are_reported(tmp_path):
    nan = one(tmp_path / "nan", rows(0, 1) * torch.nan)
    zero = write_adapter(tmp_path / "zero", {Q: (rows(0, 1), torch.zeros(8, 2))}, r=2)
    conv = write_adapter(tmp_path / "conv", {Q: (torch.ones(4, 3, 2, 2), torch.ones(8, 4, 1, 1))})
    problems = [report.problems for report in inspect([nan, zero, conv, one(tmp_path / "good", rows(0))])]
    assert "NaN" in problems[0][0] and "untrained" in problems[1][0] and "4-D" in problems[2][0] and problems[3] == ()


def test_nothing_to_read_raises(tmp_path):
    assert inspect([]) == [] and format_inspection([]) == ""
    with pytest.raises(AdapterError, match="does not exist"):
        inspect([tmp_path / "nowhere"])


def test_seven_adapters_take_seconds(tmp_path):
    names = [f"model.layers.{i}.self_attn.{kind}" for i in range(30) for kind in ("q_proj", "v_proj")]
    paths = [write_adapter(tmp_path / str(k), random_factors(names, r=16, d=256, seed=k), r=16) for k in range(7)]
    start = time.perf_counter()
    reports = inspect(paths)
    assert time.perf_counter() - start < 10
    assert sum(len(report.overlaps) for report in reports) == 21
    assert all(abs(o.mean - o.chance) < 0.02 for report in reports for o in report.overlaps)
