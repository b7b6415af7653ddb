"""The null-space objective: how much of the merged model's activations each task's own adapter cannot see.

    Omega_k = mean over target layers of sum_rows w om_k        loss = (1/K) sum_k Omega_k

Rows of all tasks go through one forward; ``task`` says whose a row is and ``weight`` sums to one over each task's rows.
The forward ends at the last target's input: nothing behind it can change the loss, nor can what reads the same tensor.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 and 6.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsc.batch import Batch
from nsc.errors import TargetError
from nsc.families import blocks_before
from nsc.places import input_device
from nsc.stack import Stack
from nsc_kernels import MergedLoRALinear, ratio_from_energy


class _Stop(Exception):
    """Raised inside the forward once the last target has been seen."""


class NullSpaceObjective:
    """Watches the target layers of a model in which ``merged_layers`` is in place.

    stack: the very one in the model (whitened or not).  targets: names of the watched modules.  checkpointing: whether
    blocks before the last target's keep only their inputs for the backward, and are run again in it, which must come
    before ``merged_layers`` ends. Every adapter must have at least one target of its own, or TargetError is raised,
    naming the tasks that have none. ``share_inputs`` comes before, where layers are to share.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MergedLoRALinear],
        stack: Stack,
        targets: Sequence[str],
        checkpointing: bool = False,
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
        self._siblings = {x.siblings for x in layers.values() if x.siblings is not None}
        self._checkpointed = blocks_before(model, self._reading_last()) if checkpointing else []

    def loss(self, batch: Batch) -> Tensor:
        """() the objective of one batch, in float32 at least, differentiable in the coefficients."""
        weight = batch.weight.flatten()
        weights = (self.share.to(weight) / len(self.tasks))[:, batch.task.flatten()] * weight  # (T, n)

        def weighted(index: int, **rows: Any) -> Tensor:
            return ratio_from_energy(**rows, weight=weights[index])

        return torch.stack(self._watch(batch, weighted, self._checkpointed)).sum()

    @torch.no_grad()
    def ratios(self, batch: Batch) -> Tensor:
        """(T, K) weighted mean ratio of each task's rows at each target; NaN where the adapter is absent."""
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
        seen: dict[str, Tensor] = {}
        task, running = batch.task.flatten(), True

        def watch(name: str, u: Tensor, energy: Tensor) -> None:
            u, energy = u.flatten(0, -2).to(task.device), energy.flatten().to(task.device)
            if len(energy) != task.numel():
                raise TargetError(f"{name} saw {len(energy)} rows of a batch of {task.numel()}: it cannot be a target")
            rows = {"gram_inverse": self._grams[name], "adapter": task, "offsets": self._offsets[name]}
            term = measure(self.targets.index(name), energy=energy, u=u, **rows)
            if running:  # else a block runs again for the backward, which needs what this saved and no more
                seen[name] = term
                if len(seen) == len(self.targets):
                    raise _Stop
                self._look_ahead(seen)

        with self._watched_by(watch), _run_again(checkpointed, partial(self._watched_by, watch)):
            try:
                self._look_ahead(seen)
                self.model(**batch.arguments(self._dtype))
            except _Stop:
                return [seen[name] for name in self.targets]
            finally:
                running = False
                for siblings in self._siblings:
                    siblings.ends = False
        missing = [name for name in self.targets if name not in seen]
        raise TargetError(f"target {', '.join(missing)} never ran in the forward of this model")

    def _look_ahead(self, seen: Collection[str]) -> None:
        """Where all targets that are left read one tensor, the forward ends when it is read."""
        left = {self.layers[name].siblings for name in self.targets if name not in seen}
        last = left.pop()
        if last is not None and not left:
            last.ends = True

    @contextmanager
    def _watched_by(self, watch: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Calls ``watch`` with the name of each target that runs inside; no layer holds on to what it read."""
        before = {name: self.layers[name].watch for name in self.targets}
        try:
            for name in self.targets:
                self.layers[name].watch = partial(watch, name)
            yield
        finally:
            for name in self.targets:
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
