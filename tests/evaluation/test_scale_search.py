"""The scale of a merge: grids that find a planted minimum, and curves that are those of merging anew at every scale."""

import math
from dataclasses import replace

import pytest
import torch

from nsc.adapters.lora import read_adapters
from nsc.adapters.matching import match_to_base
from nsc.adapters.stack import whitened
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.data.labelled import Labelled
from nsc.data.modalities import feed_of
from nsc.errors import NSCError, TargetError
from nsc.evaluation.scale_search import Grid, LabelledLoss, grid_of, search, search_scale
from nsc.evaluation.scoring import exams_of
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.preparation import targets_of
from nsc.learning.ratios import NullSpaceRatio
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.spec import read_recipe, with_scale
from tests.tiny import linears

COARSE = Grid(0.2, 1.0, (0.4, 0.2))


@pytest.fixture(scope="module")
def bench(base, adapters, texts):
    """Model, adapters on it, targets, and a batch of all tasks' rows, in float64."""
    read = read_adapters(adapters)
    model = loading.load_body(Base(str(base)), "float64", "cpu")
    config = MergeConfig(target_modules=("v_proj", "q_proj"), target_blocks=(2, 3))
    home = Base(str(base), model)
    matched = match_to_base(home, read)
    modules = {
        n: replace(m, A_blocks=[A.double() for A in m.A_blocks], B_blocks=[B.double() for B in m.B_blocks])
        for n, m in matched.stack.modules.items()
    }
    matched = matched._replace(stack=replace(matched.stack, modules=modules))
    targets = targets_of(home, matched.stack, config.target_modules, config.target_blocks)
    rows = [row.to(torch.device("cpu")) for row in feed_of(home).batches(home, targets, texts, config)[1]]
    return model, matched, targets, rows


@pytest.fixture(scope="module")
def answers(base, bench, texts):
    """Three rows a task: classes where the adapter has a head, else words to say."""
    model, matched, _, _ = bench
    rows = {
        task: Labelled(list(texts[task][:3]), [0, 1, 1] if adapter.saved else ["word1 word2", "word3", "word4"])
        for task, adapter in matched.adapters.items()
    }
    return exams_of(Base(str(base), model), matched.adapters, rows, 64)


def test_a_planted_minimum_is_found_and_everything_tried_is_told():
    tried = []

    def value(scale):
        tried.append(scale)
        return (scale - 0.37) ** 2

    found = search(value)
    assert found.scale == 0.37 and not found.edge
    assert sorted(tried) == list(found.curve) and len(set(tried)) == len(tried)  # each once
    coarse, fine = [round(0.1 * i, 10) for i in range(1, 16)], [round(0.31 + 0.01 * i, 10) for i in range(19)]
    assert list(found.curve) == sorted({*coarse, *fine})
    assert found.curve == {scale: (scale - 0.37) ** 2 for scale in found.curve}


@pytest.mark.parametrize("best, scale, last", [(0.0, 0.1, 1.5), (9.0, 1.5, 1.5)])
def test_the_range_is_kept_and_its_edge_told(best, scale, last):
    found = search(lambda s: abs(s - best), Grid(most=1.5))
    assert found.scale == scale and found.edge
    assert min(found.curve) == 0.1 and max(found.curve) == last


def test_the_first_grid_goes_on_while_its_last_scale_is_the_best():
    found = search(lambda s: abs(s - 2.34), grid_of("labels"))
    assert found.scale == 2.34 and not found.edge and max(found.curve) == 2.4
    assert set(found.curve) >= {round(0.1 * i, 10) for i in range(1, 25)}
    found = search(lambda s: -s, Grid(most=2.0))
    assert found.scale == 2.0 and found.edge
    assert max(search(lambda s: abs(s - 1.4), grid_of("labels")).curve) == 1.5


def test_scales_that_are_given_and_ratios_are_not_searched_beyond():
    for grid in (grid_of("labels", (0.1, 1.5)), grid_of("null-space"), Grid()):
        assert max(search(lambda s: -s, grid).curve) == 1.5


def test_what_is_not_finite_is_never_the_best():
    assert search(lambda s: math.nan if s < 0.5 else s, Grid(0.1, 1.0, (0.1,))).scale == 0.5
    with pytest.raises(NSCError, match=r"no scale from 0\.1 to 1\.5"):
        search(lambda s: math.inf)


def test_of_equals_the_smallest_scale_wins():
    assert search(lambda s: 1.0, COARSE).scale == 0.2


@pytest.mark.parametrize("grid", [dict(low=0.0), dict(low=2.0), dict(steps=()), dict(steps=(0.01, 0.1))])
def test_grids_that_cannot_be(grid):
    with pytest.raises(NSCError, match=r"scales|steps"):
        Grid(**grid)


@pytest.mark.parametrize("method", ["task-arithmetic", "ties", "core-ties"])
def test_the_curve_is_that_of_merging_anew_and_the_merge_is_made_once(bench, answers, monkeypatch, method):
    model, matched, targets, rows = bench
    recipe = read_recipe(method)
    values = {
        "labels": LabelledLoss(model, answers),
        "null space": NullSpaceRatio(matched.stack, targets, rows, torch.device("cpu")),
    }
    calls, update = [], Combination.update
    monkeypatch.setattr(Combination, "update", lambda self, name: calls.append(name) or update(self, name))
    merged = as_one(Combination(matched.stack, recipe))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    for value in values.values():
        found = search_scale(model, merged, value, COARSE)
        assert calls == merged.names
        for scale, told in found.curve.items():
            anew = as_one(Combination(matched.stack, with_scale(recipe, scale)))
            with merged_layers(model, anew, torch.ones(len(anew.names), 1)):
                assert value(model) == pytest.approx(told, abs=1e-10)
        assert len({round(told, 6) for told in found.curve.values()}) == len(found.curve)  # the scale matters
        del calls[len(merged.names) :]
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(x, after[name]) for name, x in before.items())


def test_ratios_are_those_of_the_objective(bench):
    """A plain sum, as NSC's own objective sees it with all coefficients at that scale."""
    model, matched, targets, rows = bench
    ours = NullSpaceRatio(matched.stack, targets, rows, torch.device("cpu"))
    merged = as_one(Combination(matched.stack, read_recipe("task-arithmetic")))
    found = search_scale(model, merged, ours, COARSE)
    stack = whitened(matched.stack)
    for scale, told in found.curve.items():
        with merged_layers(model, stack, torch.full(stack.owned.shape, scale, dtype=torch.float64)) as layers:
            objective = NullSpaceObjective(model, layers, stack, targets)
            assert sum(objective.loss(row).item() for row in rows) == pytest.approx(told, abs=1e-10)


def test_the_forward_ends_at_the_last_target(bench):
    model, matched, targets, rows = bench
    ran, last = [], model.norm
    hook = last.register_forward_hook(lambda *_: ran.append(1))
    try:
        NullSpaceRatio(matched.stack, targets, rows, torch.device("cpu"))(model)
        assert not ran
        model(**rows[0].arguments(torch.float64))
        assert ran
    finally:
        hook.remove()
    assert not any(model.get_submodule(name)._forward_pre_hooks for name in linears(model))


def test_an_adapter_without_a_target_is_named(bench):
    _, matched, targets, rows = bench
    only = [name for name in targets if name.endswith("q_proj")]
    with pytest.raises(TargetError, match="rslora"):
        NullSpaceRatio(matched.stack, only, rows, torch.device("cpu"))


def test_losses_are_relative_to_the_bare_base(bench, answers):
    model, matched, _, _ = bench
    value = LabelledLoss(model, answers)
    assert value(model) == pytest.approx(1, abs=1e-12)
    one = next(iter(answers))
    with merged_layers(model, matched.stack, torch.full(matched.stack.owned.shape, 0.3, dtype=torch.float64)):
        shares = {task: exam.loss(model) / value.bare[task] for task, exam in answers.items()}
        assert value(model) == pytest.approx(sum(shares.values()) / 4, abs=1e-12)
        assert abs(shares[one] - 1) > 1e-3


@pytest.mark.parametrize("lowest", [0.04, 0.13, 0.19, 0.33, 0.9, 1.47, 2.71])
def test_a_smooth_value_is_searched_by_parabolas(lowest):
    """A few evaluations find the lowest point to 0.01 of a parabola, and to 0.02 of something like one."""
    for value, near in ((lambda s: (s - lowest) ** 2 + 0.3, 0.01), (lambda s: (math.log(s / lowest)) ** 2 + 0.3, 0.06)):
        tried: list[float] = []
        found = search(lambda s, value=value, tried=tried: tried.append(s) or value(s), grid_of("match"))
        assert abs(found.scale - lowest) <= near and len(tried) == len(set(tried)) <= 11 + 6 * max(0, lowest - 1.5)


def test_parabolas_end_at_an_edge_and_at_what_is_not_finite():
    assert search(lambda s: s, Grid(0.2, 1.0, (0.2,), parabolas=2)).scale == 0.2
    assert search(lambda s: 1.0, Grid(0.2, 1.0, (0.2,), parabolas=2)).scale == 0.2
    assert search(lambda s: s, grid_of("match", (0.2, 1.0))).scale == 0.2
    assert search(lambda s: s, grid_of("match")).edge
    found = search(lambda s: math.nan if s > 0.7 else 1 / s, Grid(0.2, 1.0, (0.2,), parabolas=2))
    assert found.scale == 0.6
