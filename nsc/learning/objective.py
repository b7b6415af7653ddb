"""The null-space objective: how much of the merged model's activations each task's own adapter cannot see.

    Omega_k = mean over target layers of sum_rows w om_k        loss = sum_k p_k Omega_k, with p_k = 1/K

Rows of all tasks go through one forward; ``task`` says whose a row is and ``weight`` sums to one over each task's rows.
The forward ends at the last target's input: nothing behind it can change the loss, nor can what reads the same tensor.
``Goal`` says otherwise: other p_k, a quantile of a sample's rows for their mean, or an entropy, for which the forward
goes on to its end.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsc.adapters.stack import Stack
from nsc.bases.structure import blocks_before
from nsc.batch import Batch
from nsc.errors import TargetError
from nsc.learning.entropy import Entropy
from nsc.runtime.placement import input_device
from nsc_kernels import MergedLoRALinear, ratio_from_energy


@dataclass(frozen=True)
class Goal:
    """What the loss is.

    tasks: p_k of each, one in sum, 0 for one without data; None for all alike.  unseen: those without data.  quantile:
    of each sample's rows, for their mean.  entropy: added, times the number of tasks with data.  ratios: whether the
    null-space ratios count.
    """

    tasks: tuple[float, ...] | None = None
    unseen: tuple[str, ...] = ()
    quantile: float | None = None
    entropy: Entropy | None = None
    ratios: bool = True


class _Stop(Exception):
    """Raised inside the forward once the last target has been seen."""


class NullSpaceObjective:
    """Watches the target layers of a model in which ``merged_layers`` is in place.

    stack: the very one in the model (whitened or not).  targets: names of the watched modules.  checkpointing: whether
    blocks before the last target's keep only their inputs for the backward, and are run again in it, which must come
    before ``merged_layers`` ends.  goal: what the loss is. Every adapter with data must have at least one target of its
    own, or TargetError is raised, naming the tasks that have none. ``share_inputs`` comes before, where layers are to
    share.
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
        self.model = model
        self.goal = goal
        self.layers = layers
        self.targets = list(targets)
        device = input_device(model)
        present = torch.tensor([stack.modules[name].present for name in targets])
        seen = torch.tensor([task not in goal.unseen for task in stack.tasks])
        weights = torch.tensor(goal.tasks or [1 / len(seen)] * len(seen), dtype=torch.float64)
        self.share = _shares(present, stack.tasks, seen).to(device)  # (T, K)
        self.tasks = stack.tasks
        self._weights = self.share * weights.to(device)  # (T, K) of each task's mean ratio in the loss
        self._preferences = (weights * seen.sum()).to(device)  # (K,) of its entropy
        self._dtype = next(model.parameters()).dtype
        self._grams = {n: g.to(device) if (g := stack.modules[n].gram_inverse) is not None else None for n in targets}
        self._offsets = {name: layers[name].offsets.to(device) for name in targets}
        self._siblings = {x.siblings for x in layers.values() if x.siblings is not None}
        self._checkpointed = blocks_before(model, self._reading_last()) if checkpointing else []

    def loss(self, batch: Batch) -> Tensor:
        """() the objective of one batch, in float32 at least, differentiable in the coefficients."""
        if self.goal.entropy is None:
            return torch.stack(self._watch(batch, self._measure(batch), self._checkpointed)).sum()
        states, terms = self._run_through(batch)
        return self.goal.entropy(states, batch, self._preferences.to(batch.weight)) + sum(terms)

    def _measure(self, batch: Batch) -> Callable[..., Tensor]:
        """What takes the rows of a target to its term of the loss."""
        weight = batch.weight.flatten()
        weights = self._weights.to(weight)[:, batch.task.flatten()] * weight  # (T, n)
        if self.goal.quantile is None:
            return lambda index, **rows: ratio_from_energy(**rows, weight=weights[index])
        sample, q = batch.samples(), self.goal.quantile

        def of_quantiles(index: int, energy: Tensor, **rows: Any) -> Tensor:
            ratios = ratio_from_energy(energy.masked_fill(weight == 0, 0), **rows)
            whole = torch.zeros_like(weight).index_add(0, sample, weights[index])
            return (whole * sample_quantiles(ratios, sample, weight > 0, q)).sum()

        return of_quantiles

    @torch.no_grad()
    def ratios(self, batch: Batch) -> Tensor:
        """(T, K) weighted mean ratio of each task's rows at each target; NaN without the adapter, or without data."""
        task, weight = batch.task.flatten(), batch.weight.flatten()

        def per_task(index: int, **rows: Any) -> Tensor:
            counted = torch.where(weight > 0, ratio_from_energy(**rows) * weight, 0)
            return counted.new_zeros(len(self.tasks)).index_add(0, task, counted)

        table = torch.stack(self._watch(batch, per_task))
        return table.masked_fill(self.share == 0, float("nan"))

    def _watch(
        self, batch: Batch, measure: Callable[..., Tensor], checkpointed: Sequence[nn.Module] = ()
    ) -> list[Tensor]:
        """One forward up to the last target; what ``measure`` returned at each, in the order of the targets."""
        return self._forward(batch, measure, checkpointed, ends=True)[1]

    def _run_through(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """The body's last hidden states (b, L, d), and the terms of the targets where ratios count."""
        return self._forward(batch, self._measure(batch), self._checkpointed, ends=False)

    def _forward(
        self, batch: Batch, measure: Callable[..., Tensor], checkpointed: Sequence[nn.Module], ends: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """ends: whether at the last target; else all is run, and the targets are watched only where ratios count."""
        seen: dict[str, Tensor] = {}
        task, running = batch.task.flatten(), True
        targets, states = self.targets if ends or self.goal.ratios else [], torch.empty(0)

        def watch(name: str, u: Tensor, energy: Tensor) -> None:
            u, energy = u.flatten(0, -2).to(task.device), energy.flatten().to(task.device)
            if len(energy) != task.numel():
                raise TargetError(f"{name} saw {len(energy)} rows of a batch of {task.numel()}: it cannot be a target")
            rows = {"gram_inverse": self._grams[name], "adapter": task, "offsets": self._offsets[name]}
            term = measure(self.targets.index(name), energy=energy, u=u, **rows)
            if running:  # else a block runs again for the backward, which needs what this saved and no more
                seen[name] = term
                if ends and len(seen) == len(targets):
                    raise _Stop
                if ends:
                    self._look_ahead(seen)

        watched = partial(self._watched_by, watch, targets)
        with watched(), _run_again(checkpointed, watched), suppress(_Stop):
            try:
                if ends:
                    self._look_ahead(seen)
                states = self.model(**batch.arguments(self._dtype))[0]
            finally:
                running = False
                for siblings in self._siblings:
                    siblings.ends = False
        if missing := [name for name in targets if name not in seen]:
            raise TargetError(f"target {', '.join(missing)} never ran in the forward of this model")
        return states, [seen[name] for name in targets]

    def _look_ahead(self, seen: Collection[str]) -> None:
        """Where all targets that are left read one tensor, the forward ends when it is read."""
        left = {self.layers[name].siblings for name in self.targets if name not in seen}
        last = left.pop()
        if last is not None and not left:
            last.ends = True

    @contextmanager
    def _watched_by(self, watch: Callable[[str, Tensor, Tensor], None], targets: Sequence[str]) -> Iterator[None]:
        """Calls ``watch`` with the name of each target that runs inside; no layer holds on to what it read."""
        before = {name: self.layers[name].watch for name in targets}
        try:
            for name in targets:
                self.layers[name].watch = partial(watch, name)
            yield
        finally:
            for name in targets:
                self.layers[name].watch = before[name]
            for siblings in self._siblings:
                siblings.clear()

    def _reading_last(self) -> list[str]:
        """The last target, and the layers that read the same tensor."""
        last = self.targets[-1]
        siblings = self.layers[last].siblings
        return [name for name, x in self.layers.items() if name == last or (siblings and x.siblings is siblings)]


@contextmanager
def _run_again(blocks: Sequence[nn.Module], inside: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """``blocks`` called here keep their inputs for the backward, in which they run again; both times ``inside``."""

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with inside():
            return forward(*args, **kwargs)

    before = [block.__dict__.get("forward") for block in blocks]  # such as a hook that loads weights
    try:
        for block in blocks:
            again = partial(run, block.forward)
            block.forward = partial(checkpoint, again, use_reentrant=False, preserve_rng_state=False)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def sample_quantiles(values: Tensor, sample: Tensor, counted: Tensor, q: float) -> Tensor:
    """(n,): at i the q-quantile, as ``torch.quantile``'s, of sample i's counted values; 0 where it has none.

    values: (n,).  sample: (n,) whose each is, from 0.  counted: (n,) bool. All stays on the device.
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


def _shares(present: Tensor, tasks: Sequence[str], seen: Tensor) -> Tensor:
    """(T, K): 1/|targets of k| where adapter k is present at the target and has data, else 0."""
    counts = present.sum(0)
    orphans = [task for k, task in enumerate(tasks) if seen[k] and not counts[k]]
    if orphans:
        raise TargetError(
            f"adapter {', '.join(orphans)} touches none of the target layers, so nothing can be learned from its rows;"
            " choose target_modules and target_blocks that every adapter shares"
        )
    return (present & seen).double() / counts.clamp_min(1)
