"""Names of methods with what is learned in them, and learned coefficients as the weights of another method."""

import pytest
import torch

import nsc
from nsc.config import AUTO, LEARNED, MergeConfig
from nsc.errors import NSCError
from nsc.methods import METHODS
from nsc.recipes.combination import Combination
from nsc.recipes.spaces import SPACES
from nsc.recipes.spec import read_recipe, split_learned
from tests.merging_goldens import dense

SUMS = ["task-arithmetic", *(f"{space}-task-arithmetic" for space in SPACES if space != "full")]


def test_every_name_is_split_into_what_learns_and_what_takes():
    for recipe in [*METHODS, *SUMS]:
        assert split_learned(recipe) == (None, recipe)
        for learned in set(LEARNED) - {AUTO}:
            assert split_learned(f"{learned}+{recipe}") == (learned, recipe)
    for learned in LEARNED:
        assert split_learned(learned) == (learned, None)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("ncs", "there is no method ncs; did you mean nsc?"),
        ("adamergin", "did you mean adamerging?"),
        ("task-arithmetik", "did you mean task-arithmetic?"),
        ("nsc+task-arithmetik", "there is no method task-arithmetik; did you mean task-arithmetic?"),
        ("", "there is no method"),
        ("+", r"\+ must name a method that learns coefficients"),
        ("nsc+", r"nsc\+ must name a method that learns coefficients and one that takes them, such as nsc\+ties"),
        ("+task-arithmetic", "coefficients are learned by nsc, adamerging, adamerging-task"),
        ("task-arithmetic+nsc", "coefficients are learned by nsc"),
        ("nsc+adamerging", "must name a method that learns coefficients"),
        ("nsc+task-arithmetic+nsc", "must name a method that learns coefficients"),
    ],
)
def test_a_name_that_there_is_not_is_refused_with_the_nearest(method, message):
    with pytest.raises(NSCError, match=message):
        split_learned(method)


@pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
def test_what_is_learned_is_set_over_the_defaults(learned):
    assert learned.line and learned.source.startswith("https://")
    config = MergeConfig(**learned.settings)
    assert config.steps == 500 and MergeConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("name", [name for name in SUMS if not name.startswith("ctm-")])
def test_nsc_as_weights_of_task_arithmetic_is_the_merge_of_nsc(merged, name):
    """In every layer, with ranks and scales that differ and adapters that are not everywhere."""
    assert not merged.stack.present.all() and merged.coefficients.std(0).min() > 0
    combination = Combination(merged.stack, read_recipe(name), merged.coefficients)
    for row, layer in zip(merged.coefficients, merged.modules, strict=True):
        expected = merged.stack.modules[layer].delta(row)
        torch.testing.assert_close(dense(combination.update(layer)), expected, rtol=0, atol=1e-10)


def test_tasks_weigh_beside_what_is_learned(merged):
    weights = {task: float(k) for k, task in enumerate(merged.tasks)}
    both = Combination(merged.stack, read_recipe("task-arithmetic", weights=weights, scale=0.5), merged.coefficients)
    lam = merged.coefficients.double() * torch.tensor(list(weights.values()), dtype=torch.float64) / 2
    for row, layer in zip(lam, merged.modules, strict=True):
        expected = merged.stack.modules[layer].delta(row)
        torch.testing.assert_close(dense(both.update(layer)), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ties", dict(scale=float("nan")), "scale must be a finite number"),
        ("ties", dict(weights={"a": float("inf")}), "the weight of a must be a finite number"),
        ("knots-ties", dict(isotropize=True), "not go with knots-ties: it needs the core space; give core-ties, or"),
        ("linear", dict(isotropize=True), "it needs the core space; leave it out"),
        ("ctm-ties", dict(rank=0), "rank must be at least 1, not 0"),
        ("ctm-ties", dict(beta=1.5), "beta must be a fraction at least 0 and at most 1, not 1.5"),
        ("ties", dict(beta=0.5), "method ties has no setting beta"),
        ("core-ties", dict(rank=4), "method core-ties has no setting rank"),
        ("ties", dict(aim=1.5), "aim must be a fraction at least 0 and at most 1, not 1.5"),
        ("ties", dict(aim="much"), "aim must be"),
        ("emr", dict(isotropize=True), "it needs the core space; leave it out"),
        ("TIES", {}, "did you mean ties?"),
    ],
)
def test_what_no_recipe_can_say_is_refused_with_its_remedy(method, settings, message):
    with pytest.raises(NSCError, match=message):
        read_recipe(method, **settings)


def test_a_config_of_another_objective_is_no_adamerging():
    with pytest.raises(NSCError, match="adamerging needs the objective entropy, but config has null-space"):
        nsc.merge("base", {"a": "a"}, {"a": ["x"]}, nsc.MergeConfig(), method="adamerging")
