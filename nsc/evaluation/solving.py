"""A method that needs rows, on a base in memory: the moments of its layers' inputs collected, every layer solved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.fused_layers import refuse_experts
from nsc.adapters.stack import Stack
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.learning.moments import count_tokens, fit, mean_magnitudes
from nsc.learning.preparation import all_rows
from nsc.methods import LowRank
from nsc.methods.inputs import InputMoments, SpanMoments
from nsc.recipes.combination import Combination
from nsc.runtime.distributed import ALONE, Team


@dataclass
class Findings:
    """What is told of a regression, put together while its layers are solved.

    Attributes:
        combination: the method on the adapters.
        conditions: layer -> condition number of its equations.
        fits: layer -> (T, 3), as ``nsc.methods.reconstruction.reconstruction`` has it.
        rows: task -> how many there were.
        tokens: task -> how many of their tokens counted.
    """

    combination: Combination
    conditions: dict[str, float] = field(default_factory=dict)
    fits: dict[str, Tensor] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def solve(self, name: str, moments: SpanMoments | InputMoments) -> LowRank:
        """Solve one layer, and keep what is told of it.

        Args:
            name: of the layer.
            moments: what is known of its inputs.

        Returns:
            Its update at scale 1.
        """
        update, solution, self.fits[name] = self.combination.solution(name, moments)
        self.conditions[name] = solution.condition
        return update

    def errors(self, scale: float) -> dict[str, float]:
        """Return how far the merge is from the experts' own updates on their rows, as a mean over layers.

        Args:
            scale: of the merge.

        Returns:
            Task -> E |D x - D_k x|^2 / E |D_k x|^2, over the layers that its adapter touches; of "all tasks" together
            where only their sum is known.
        """
        table, tasks = torch.stack([fit.cpu() for fit in self.fits.values()]), self.combination.stack.tasks  # (M, T, 3)
        merged, both, own = table.unbind(-1)
        errors = ((scale**2 * merged - 2 * scale * both + own) / own).masked_fill(own <= 0, float("nan")).nanmean(0)
        return dict(zip(tasks if len(errors) == len(tasks) else ("all tasks",), errors.tolist(), strict=True))

    def to_dict(self, scale: float) -> dict[str, Any]:
        """Return what is told, for the report.

        Args:
            scale: of the merge.

        Returns:
            Plain values.
        """
        return {
            "rows": self.rows,
            "tokens": self.tokens,
            "conditions": self.conditions,
            "errors": self.errors(scale),
        }


def found_on(
    base: Base, findings: Findings, samples: Mapping[str, Sequence[Any]], config: MergeConfig, team: Team = ALONE
) -> dict[str, LowRank]:
    """Find the updates of a method on a base in memory.

    Args:
        base: with weights.
        findings: the method on the adapters; what is told of it is added.
        samples: task -> what its feed read.
        config: settings of the rows.
        team: the processes that share the rows; all find the same.

    Returns:
        Layer -> its update at scale 1.

    Raises:
        NSCError: a subclass, as ``nsc.learning.moments.fit`` does.
    """
    recipe, stack = findings.combination.recipe, findings.combination.stack
    assert recipe.method.inputs is not None
    refuse_experts(base.model, stack.names, recipe.full_name)
    rows = all_rows(base, stack, samples, config)
    findings.rows = {task: len(samples[task]) for task in stack.tasks}
    findings.tokens = count_tokens(rows)
    team.require_same((stack.tasks, stack.names, findings.tokens), "base, adapters or data")
    rounds = recipe.settings.rounds if recipe.method.inputs.run == "merge" else 1
    tokens = sum(findings.tokens.values())
    return fit(base.model, stack, rows, recipe.method.inputs, findings.solve, rounds, tokens, team=team)


def completed_on(
    base: Base, combination: Combination, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> Combination:
    """Give a combination what it needs to know of rows, on a base in memory.

    Args:
        base: with weights.
        combination: a method on the adapters.
        samples: task -> what its feed read.
        config: settings of the rows.

    Returns:
        The combination with the updates of a regression and the magnitudes of AIM; as it was where it needs neither.

    Raises:
        NSCError: a subclass, as ``found_on`` and ``magnitudes_on`` do.
    """
    if combination.recipe.method.inputs:
        combination = combination.with_found(found_on(base, Findings(combination), samples, config))
    if combination.recipe.aim is not None:
        combination = combination.with_magnitudes(magnitudes_on(base, combination.stack, samples, config))
    return combination


def magnitudes_on(
    base: Base, stack: Stack, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> dict[str, Tensor]:
    """Measure what AIM must know of each layer's inputs, on a base in memory.

    Args:
        base: with weights.
        stack: the adapters on it.
        samples: task -> what its feed read.
        config: settings of the rows.

    Returns:
        Layer -> (d,) E|x_i|, as ``nsc.learning.moments.mean_magnitudes`` has it.

    Raises:
        NSCError: a subclass, as ``mean_magnitudes`` does.
    """
    refuse_experts(base.model, stack.names, "aim")
    return mean_magnitudes(base.model, stack, all_rows(base, stack, samples, config))
