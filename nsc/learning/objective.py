"""The null-space objective: how much of the merged model's activations each task's own adapter cannot see.

    Omega_k = mean over target layers of sum_rows w om_k        loss = sum_k p_k Omega_k, with p_k = 1/K

Rows of all tasks go through one forward; ``task`` says whose a row is and ``weight`` sums to one over each task's rows.
``Goal`` may say otherwise: other p_k, a quantile of a sample's rows for their mean, or a loss of the model's output,
for which the forward goes on to its end.

Source: arXiv 2603.26317, Eq. 3 and 6.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsc.adapters.stack import Stack
from nsc.bases.structure import blocks_before
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.errors import NSCError, TargetError
from nsc.learning.agreement import Agreement
from nsc.learning.entropy import Entropy
from nsc.learning.watch import Measure, Watch, run_again
from nsc.runtime.placement import input_device
from nsc_kernels import MergedLoRALinear, ratio_from_energy


@dataclass(frozen=True)
class Goal:
    """What the loss is.

    Attributes:
        tasks: p_k of each task, one in sum, 0 for one without data; None for all alike.
        unseen: tasks without data.
        quantile: quantile over each sample's rows, in place of their mean.
        output: what is added to the loss of the model's output: its entropy, times the number of tasks with data, or
            its distance from the experts'.
        ratios: whether the null-space ratios count.
    """

    tasks: tuple[float, ...] | None = None
    unseen: tuple[str, ...] = ()
    quantile: float | None = None
    output: Entropy | Agreement | None = None
    ratios: bool = True


def goal_of(tasks: Sequence[str], config: MergeConfig, output: Entropy | Agreement | None = None) -> Goal:
    """Return the loss that these settings ask for.

    Args:
        tasks: names of the tasks.
        config: objective, preferences, quantile, unseen.
        output: entropy or agreement, for the objectives that have one.

    Returns:
        The goal.

    Raises:
        NSCError: for a preference for a task that does not exist, if no task with data has one above 0, or without the
            output that the objective measures.
    """
    preferences = config.preferences or {}
    if strange := sorted(set(preferences) - set(tasks)):
        raise NSCError(f"preferences name {', '.join(strange)}; the tasks are {', '.join(tasks)}")
    weights = [0.0 if task in config.without_rows else float(preferences.get(task, 1)) for task in tasks]
    if not sum(weights):
        raise NSCError("no task with data has a preference above 0, so there is nothing to learn from")
    if (config.objective != "null-space") != (output is not None):
        raise NSCError(f"objective {config.objective} and the heads of tasks belong together: give both or neither")
    shares = tuple(weight / sum(weights) for weight in weights)
    return Goal(shares, config.without_rows, config.quantile, output, config.measures_ratios)


class Objective(Protocol):
    """What a step makes smaller.

    Attributes:
        model: the body.
        layers: name -> the layer that holds what is optimised.
    """

    model: nn.Module
    layers: dict[str, Any]

    def loss(self, batch: Batch) -> Tensor:
        """Return the objective of one batch.

        Args:
            batch: rows on the model's device.

        Returns:
            () in at least float32, differentiable in what is optimised.
        """


class OutputObjective:
    """The loss of a model by its output alone, whatever is in its layers; it implements ``Objective``.

    Args:
        model: the body.
        layers: name -> the layer that holds what is optimised.
        tasks: names.
        goal: its output and preferences.
        checkpointing: whether blocks before the last of these layers keep only their inputs for the backward.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, Any], tasks: Sequence[str], goal: Goal, checkpointing: bool = False
    ) -> None:
        assert goal.output is not None
        self.model, self.layers, self.output = model, layers, goal.output
        weights, seen = preferences_of(tasks, goal)
        self._preferences = (weights * seen.sum()).to(input_device(model))
        self._checkpointed = blocks_before(model, list(layers)[-1:]) if checkpointing else []

    def loss(self, batch: Batch) -> Tensor:
        """Return the objective of one batch.

        Args:
            batch: rows on the model's device.

        Returns:
            () in at least float32, differentiable in what is optimised.
        """
        with run_again(self._checkpointed):
            states = self.model(**batch.arguments(next(self.model.parameters()).dtype))[0]
        return self.output(states, batch, self._preferences.to(batch.weight))


def preferences_of(tasks: Sequence[str], goal: Goal) -> tuple[Tensor, Tensor]:
    """Return what each task counts.

    Args:
        tasks: names.
        goal: the goal.

    Returns:
        (K,) float64 p_k, and (K,) bool, whether it has data.
    """
    weights = torch.tensor(goal.tasks or [1 / len(tasks)] * len(tasks), dtype=torch.float64)
    return weights, torch.tensor([task not in goal.unseen for task in tasks])


class NullSpaceObjective:
    """The loss of a model in which ``merged_layers`` is in place.

    ``share_inputs`` comes before, where layers are to share what they read.

    Args:
        model: the body.
        layers: name -> the layer that carries adapters.
        stack: the very one in the model, whitened or not.
        targets: names of the measured layers.
        checkpointing: whether blocks keep only their inputs for the backward, as ``Watch`` has it.
        goal: what the loss is.

    Raises:
        TargetError: naming the tasks with data whose adapter touches none of the targets.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MergedLoRALinear],
        stack: Stack,
        targets: Sequence[str],
        checkpointing: bool = False,
        goal: Goal = Goal(),
    ) -> None:
        self.model, self.layers, self.goal = model, layers, goal
        self.targets, self.tasks = list(targets), stack.tasks
        device = input_device(model)
        present = torch.tensor([stack.modules[name].present for name in targets])
        weights, seen = preferences_of(stack.tasks, goal)
        self.share = _shares(present, stack.tasks, seen, goal.ratios).to(device)  # (T, K)
        self._weights = self.share * weights.to(device)  # (T, K) of each task's mean ratio in the loss
        self._preferences = (weights * seen.sum()).to(device)  # (K,) of its output
        self._grams = [g.to(device) if (g := stack.modules[n].gram_inverse) is not None else None for n in targets]
        self._offsets = [layers[name].offsets.to(device) for name in targets]
        self._watch = Watch(model, layers, targets, checkpointing)

    def loss(self, batch: Batch) -> Tensor:
        """Return the objective of one batch.

        Args:
            batch: rows on the model's device.

        Returns:
            () in at least float32, differentiable in the coefficients.
        """
        if self.goal.output is None:
            return torch.stack(self._watch.up_to_last(batch, self._term(batch))).sum()
        states, terms = self._watch.to_end(batch, self._term(batch) if self.goal.ratios else None)
        return self.goal.output(states, batch, self._preferences.to(batch.weight)) + sum(terms)

    @torch.no_grad()
    def ratios(self, batch: Batch) -> Tensor:
        """Return the weighted mean ratio of each task's rows at each target.

        Args:
            batch: rows on the model's device.

        Returns:
            (T, K); NaN where the adapter is absent or has no data.
        """
        task, weight = batch.task.flatten(), batch.weight.flatten()

        def per_task(index: int, u: Tensor, energy: Tensor) -> Tensor:
            counted = torch.where(weight > 0, self._ratio(index, u, energy, task) * weight, 0)
            return counted.new_zeros(len(self.tasks)).index_add(0, task, counted)

        table = torch.stack(self._watch.up_to_last(batch, per_task, for_backward=False))
        return table.masked_fill(self.share == 0, float("nan"))

    def _term(self, batch: Batch) -> Measure:
        """What takes the rows of a target to its term of the loss."""
        task, weight = batch.task.flatten(), batch.weight.flatten()
        weights = self._weights.to(weight)[:, task] * weight  # (T, n)
        if self.goal.quantile is None:
            return lambda index, u, energy: self._ratio(index, u, energy, task, weights[index])
        sample, q = batch.samples(), self.goal.quantile

        def of_quantiles(index: int, u: Tensor, energy: Tensor) -> Tensor:
            ratios = self._ratio(index, u, energy.masked_fill(weight == 0, 0), task)
            whole = torch.zeros_like(weight).index_add(0, sample, weights[index])
            return (whole * sample_quantiles(ratios, sample, weight > 0, q)).sum()

        return of_quantiles

    def _ratio(self, index: int, u: Tensor, energy: Tensor, task: Tensor, weight: Tensor | None = None) -> Tensor:
        """(n,) ratios of the rows of a target, or their weighted sum ()."""
        gram, offsets = self._grams[index], self._offsets[index]
        return ratio_from_energy(energy, u, gram, adapter=task, offsets=offsets, weight=weight)


def sample_quantiles(values: Tensor, sample: Tensor, counted: Tensor, q: float) -> Tensor:
    """Return the q-quantile of the counted values of each sample, as ``torch.quantile`` defines it.

    Args:
        values: (n,).
        sample: (n,) int64, which sample each value is of, from 0.
        counted: (n,) bool, which values count.
        q: from 0 to 1.

    Returns:
        (n,): at i the quantile of sample i; 0 where it has no value. Nothing leaves the device.
    """
    n = len(values)
    group = torch.where(counted, sample, n)
    order = values.detach().argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    counts = torch.zeros(n + 1, dtype=sample.dtype, device=sample.device).index_add(0, group, torch.ones_like(group))[
        :n
    ]
    place = q * (counts - 1).clamp_min(0).to(values.dtype)
    first, low = counts.cumsum(0) - counts, place.floor()
    below, above = (values[order[(first + step.long()).clamp_max(n - 1)]] for step in (low, place.ceil()))
    return torch.where(counts > 0, torch.lerp(below, above, place - low), 0)


def _shares(present: Tensor, tasks: Sequence[str], seen: Tensor, needed: bool) -> Tensor:
    """(T, K): 1/|targets of k| where adapter k is present at the target and has data, else 0; needed: for the loss."""
    counts = present.sum(0)
    orphans = [task for k, task in enumerate(tasks) if seen[k] and not counts[k]]
    if orphans and needed:
        raise TargetError(
            f"adapter {', '.join(orphans)} touches none of the target layers, so nothing can be learned from its rows;"
            " choose target_modules and target_blocks that every adapter shares"
        )
    return (present & seen).double() / counts.clamp_min(1)
