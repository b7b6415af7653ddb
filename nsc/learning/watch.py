"""One forward of a model that carries adapters, watched at its target layers, and ended where the last one reads.

The forward ends at the last target's input: nothing behind it can change the loss, nor can what reads the same tensor.
With activation checkpointing, blocks before the last target's keep only their inputs and run again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nsc.bases.structure import blocks_before
from nsc.batch import Batch
from nsc.errors import TargetError
from nsc_kernels import MergedLoRALinear

Measure = Callable[[int, Tensor, Tensor], Tensor]  # number of the target, u (n, R), energy (n,) -> anything


class LastTargetSeen(Exception):
    """Ends a forward from within, once the last target has been seen."""


class Watch:
    """The target layers of a model in which ``merged_layers`` is in place.

    Args:
        model: the body.
        layers: name -> the layer that carries adapters.
        targets: names of the layers that are watched.
        checkpointing: whether blocks before the last target's keep only their inputs for the backward, which must come
            before ``merged_layers`` ends.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, MergedLoRALinear],
        targets: Sequence[str],
        checkpointing: bool = False,
    ) -> None:
        self.model, self.layers, self.targets = model, layers, list(targets)
        self._dtype = next(model.parameters()).dtype
        self._siblings = {x.siblings for x in layers.values() if x.siblings is not None}
        self._checkpointed = blocks_before(model, self._reading_last()) if checkpointing else []

    def up_to_last(self, batch: Batch, measure: Measure, for_backward: bool = True) -> list[Tensor]:
        """Run one forward up to the last target.

        Args:
            batch: rows on the model's device.
            measure: what is computed at each target.
            for_backward: whether a backward follows, for which checkpointed blocks run again.

        Returns:
            What ``measure`` returned, in the order of the targets.

        Raises:
            TargetError: for a target that does not run, or sees other rows than the batch's.
        """
        return self._forward(batch, measure, self.targets, self._checkpointed if for_backward else [], ends=True)[1]

    def to_end(self, batch: Batch, measure: Measure | None) -> tuple[Tensor, list[Tensor]]:
        """Run the whole forward, for a backward.

        Args:
            batch: rows on the model's device.
            measure: what is computed at each target; None if the targets are not watched.

        Returns:
            The body's last hidden states (b, L, d), and what ``measure`` returned, in the order of the targets.

        Raises:
            TargetError: for a target that does not run, or sees other rows than the batch's.
        """
        if measure is None:
            return self._forward(batch, lambda *rows: rows[1], [], self._checkpointed, ends=False)
        return self._forward(batch, measure, self.targets, self._checkpointed, ends=False)

    def _forward(
        self, batch: Batch, measure: Measure, targets: Sequence[str], checkpointed: Sequence[nn.Module], ends: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """ends: whether at the last target."""
        seen: dict[str, Tensor] = {}
        running, rows, states = True, batch.task.numel(), torch.empty(0)

        def watch(name: str, u: Tensor, energy: Tensor) -> None:
            u, energy = u.flatten(0, -2).to(batch.task.device), energy.flatten().to(batch.task.device)
            if len(energy) != rows:
                raise TargetError(f"{name} saw {len(energy)} rows of a batch of {rows}: it cannot be a target")
            term = measure(self.targets.index(name), u, energy)
            if running:  # else a block runs again for the backward, which needs what this saved and no more
                seen[name] = term
                if ends and len(seen) == len(targets):
                    raise LastTargetSeen
                if ends:
                    self._look_ahead(seen)

        watched = partial(self._watched_by, watch, targets)
        with watched(), run_again(checkpointed, watched), suppress(LastTargetSeen):
            try:
                if ends:
                    self._look_ahead(seen)
                states = self.model(**batch.arguments(self._dtype))[0]
            finally:
                running = False
                for siblings in self._siblings:
                    siblings.ends = False
        if missing := [name for name in targets if name not in seen]:
            raise TargetError(f"target {', '.join(missing)} never ran in this model's forward")
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
def run_again(
    blocks: Sequence[nn.Module], inside: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """Have blocks that are called here keep only their inputs for the backward, in which they run again.

    Args:
        blocks: blocks of a model.
        inside: what surrounds a block, both times.

    Yields:
        Nothing; the blocks are as before afterwards.
    """

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
