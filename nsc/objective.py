"""The null-space objective: how much of the merged model's activations each task's own adapter cannot see.

    Omega_k = mean over target layers of sum_rows w om_k        loss = (1/K) sum_k Omega_k

Rows of all tasks go through one forward; ``task`` says whose a row is and ``weight`` sums to one over each task's rows.
The forward ends at the last target's input: nothing behind it can change the loss.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.errors import TargetError
from nsc.places import input_device
from nsc.stack import Stack
from nsc_kernels import MergedLoRALinear, ratio_from_energy


class _Stop(Exception):
    """Raised inside the forward once the last target has been seen."""


class NullSpaceObjective:
    """Watches the target layers of a model in which ``merged_layers`` is in place.

    stack: the very one in the model (whitened or not).  targets: names of the watched modules. Every adapter must have
    at least one target of its own, or TargetError is raised, naming the tasks that have none.
    """

    def __init__(
        self, model: nn.Module, layers: dict[str, MergedLoRALinear], stack: Stack, targets: Sequence[str]
    ) -> None:
        self.model = model
        self.layers = layers
        self.targets = list(targets)
        device = input_device(model)
        present = torch.tensor([stack.modules[name].present for name in targets])
        self.share = _shares(present, stack.tasks).to(device)  # (T, K)
        self.tasks = stack.tasks
        self._dtype = next(model.parameters()).dtype
        self._grams = {n: g.to(device) if (g := stack.modules[n].gram_inverse) is not None else None for n in targets}
        self._offsets = {name: layers[name].offsets.to(device) for name in targets}

    def loss(self, batch: Batch) -> Tensor:
        """() the objective of one batch, in float32 at least, differentiable in the coefficients."""
        weight = batch.weight.flatten()
        weights = (self.share.to(weight.dtype) / len(self.tasks))[:, batch.task.flatten()] * weight  # (T, n)
        terms = self._watch(batch, lambda index, task, **rows: ratio_from_energy(**rows, weight=weights[index]))
        return torch.stack(terms).sum()

    @torch.no_grad()
    def ratios(self, batch: Batch) -> Tensor:
        """(T, K) weighted mean ratio of each task's rows at each target; NaN where the adapter is absent."""
        weight = batch.weight.flatten()

        def per_task(index: int, task: Tensor, **rows: Any) -> Tensor:
            counted = torch.where(weight > 0, ratio_from_energy(**rows) * weight, 0)
            return counted.new_zeros(len(self.tasks)).index_add(0, task, counted)

        table = torch.stack(self._watch(batch, per_task))
        return table.masked_fill(self.share == 0, float("nan"))

    def _watch(self, batch: Batch, measure: Callable[..., Tensor]) -> list[Tensor]:
        """One forward up to the last target; what ``measure`` returned at each, in the order of the targets."""
        seen: dict[str, Tensor] = {}
        task = batch.task.flatten()

        def watch(name: str, u: Tensor, energy: Tensor) -> None:
            u, energy = u.flatten(0, -2).to(task.device), energy.flatten().to(task.device)
            if len(energy) != task.numel():
                raise TargetError(f"{name} saw {len(energy)} rows of a batch of {task.numel()}: it cannot be a target")
            rows = {"gram_inverse": self._grams[name], "adapter": task, "offsets": self._offsets[name]}
            seen[name] = measure(self.targets.index(name), task, energy=energy, u=u, **rows)
            if len(seen) == len(self.targets):
                raise _Stop

        for name in self.targets:
            self.layers[name].watch = partial(watch, name)
        try:
            self.model(**batch.arguments(self._dtype))
        except _Stop:
            return [seen[name] for name in self.targets]
        finally:
            for name in self.targets:
                self.layers[name].watch = None
        missing = [name for name in self.targets if name not in seen]
        raise TargetError(f"target {', '.join(missing)} never ran in the forward of this model")


def _shares(present: Tensor, tasks: Sequence[str]) -> Tensor:
    """(T, K): 1/|targets of k| where adapter k is present at the target, else 0."""
    counts = present.sum(0)
    orphans = [task for task, count in zip(tasks, counts.tolist(), strict=True) if not count]
    if orphans:
        raise TargetError(
            f"adapter {', '.join(orphans)} touches none of the target layers, so nothing can be learned from its rows;"
            " choose target_modules and target_blocks that every adapter shares"
        )
    return present.double() / counts
