"""Null-space ratios of a merged model without any gradient."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsc.adapters.stack import Stack, whitened
from nsc.adapters.surgery import merged_layers
from nsc.batch import Batch
from nsc.errors import NonFiniteError, TargetError
from nsc.learning.objective import Goal, NullSpaceObjective
from nsc.learning.watch import LastTargetSeen
from nsc.runtime.distributed import Team
from nsc.runtime.placement import input_device
from nsc_kernels import null_space_ratio


def require_finite_ratios(objective: NullSpaceObjective, table: Tensor) -> None:
    """Refuse ratios that are not finite where an adapter with data has a target.

    Args:
        objective: the objective that measured them.
        table: (T, K) ratios.

    Raises:
        NonFiniteError: naming targets and tasks.
    """
    broken = ~torch.isfinite(table) & (objective.share > 0)
    places = [f"{objective.targets[t]} (task {objective.tasks[k]})" for t, k in broken.nonzero().tolist()[:3]]
    if places:
        raise NonFiniteError(
            f"NaN or infinite activations enter {', '.join(places)}; check the base's weights and dtype (float16"
            " overflows: use bfloat16)"
        )


def mean_ratios(
    model: nn.Module,
    stack: Stack,
    targets: list[str],
    batches: Sequence[Batch],
    lam: Tensor,
    team: Team,
    goal: Goal,
) -> Tensor:
    """Return the mean null-space ratios over the batches of all ranks.

    Args:
        model: body of the base.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        batches: this rank's share of the rows.
        lam: (M, C) coefficients.
        team: the processes.
        goal: which tasks have data.

    Returns:
        (T, K) on the CPU; NaN where an adapter is absent or has no data.

    Raises:
        NonFiniteError: naming targets and tasks where a ratio is not finite.
    """
    device = input_device(model)
    with merged_layers(model, stack, lam.to(device)) as layers:
        objective = NullSpaceObjective(model, layers, stack, targets, goal=goal)
        table = torch.zeros_like(objective.share)
        for batch in batches:
            table += objective.ratios(batch.to(device))
        team.add_up(table)
        require_finite_ratios(objective, table)
        return table.cpu()


class NullSpaceRatio:
    """The mean null-space ratio of unlabeled rows in a merged model, over tasks with rows and each task's targets.

    Args:
        stack: the adapters themselves.
        targets: names of the measured modules.
        batches: rows of all tasks, weighted as by ``nsc.data.packing.pack``.
        device: device of the model.

    Raises:
        TargetError: naming adapters with rows that have none of the targets.
    """

    def __init__(self, stack: Stack, targets: Sequence[str], batches: Sequence[Batch], device: torch.device) -> None:
        self.targets, self.batches = list(targets), [batch.to(device) for batch in batches]
        rows = torch.cat([batch.task[batch.weight > 0].cpu() for batch in batches])
        counted = rows.bincount(minlength=len(stack.tasks)) > 0  # (K,)
        present = torch.tensor([stack.modules[name].present for name in targets]).double() * counted
        if orphans := [t for t, n, seen in zip(stack.tasks, present.sum(0), counted, strict=True) if seen and not n]:
            raise TargetError(f"adapter {', '.join(orphans)} has none of the targets; choose others by target_modules")
        self.share = (present / present.sum(0).clamp_min(1) / counted.sum()).to(device)  # (T, K)
        modules = whitened(stack).modules
        self.A = {name: modules[name].A.to(device) for name in targets}
        self.offsets = {n: torch.tensor([0, *modules[n].ranks], device=device).cumsum(0) for n in targets}

    def __call__(self, model: nn.Module) -> float:
        """Return the mean ratio in a model.

        Args:
            model: body of the base, carrying a merge.

        Returns:
            From 0 to 1.
        """
        return float((self.table(model).nan_to_num() * self.share.cpu()).sum())

    @torch.no_grad()
    def table(self, model: nn.Module) -> Tensor:
        """Return the mean ratio of each task's rows at each target, in a model.

        Args:
            model: body of the base, carrying a merge, or whatever else.

        Returns:
            (T, K) on the CPU; NaN where the adapter is absent or has no data.
        """
        total = sum((self._of_batch(model, batch) for batch in self.batches), torch.zeros_like(self.share))
        return total.masked_fill(self.share == 0, float("nan")).cpu()

    def _of_batch(self, model: nn.Module, batch: Batch) -> Tensor:
        """One forward, up to the input of the last target: (T, K)."""
        seen: dict[str, Tensor] = {}

        def watch(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[name] = self._ratio(name, args[0], batch)
            if len(seen) == len(self.targets):
                raise LastTargetSeen

        hooks = [model.get_submodule(n).register_forward_pre_hook(partial(watch, n)) for n in self.targets]
        try:
            model(**batch.arguments(next(model.parameters()).dtype))
        except LastTargetSeen:
            return torch.stack([seen[name] for name in self.targets]).to(self.share)
        finally:
            for hook in hooks:
                hook.remove()
        raise TargetError(f"target {', '.join(set(self.targets) - set(seen))} never ran in this model's forward")

    def _ratio(self, name: str, z: Tensor, batch: Batch) -> Tensor:
        """(K,) this batch's part of the mean ratios of one target."""
        z, task, weight = z.flatten(0, -2), batch.task.flatten(), batch.weight.flatten()
        u = z @ self.A[name].to(z).T
        ratios = null_space_ratio(z, u, adapter=task, offsets=self.offsets[name])
        counted = torch.where(weight > 0, ratios * weight, 0)
        return counted.new_zeros(self.share.shape[1]).index_add(0, task, counted)
