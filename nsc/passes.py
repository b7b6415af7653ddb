"""A step's gradient in as few forwards and backwards as memory allows, and each rank's share of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nsc.batch import Batch
from nsc.errors import NSCError
from nsc.graphs import Graphs
from nsc.objective import NullSpaceObjective
from nsc.surgery import set_coefficients


def share_out(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """The rows of these batches, each once, as a share for each rank of about as many tokens.

    The same in every process. Where there are fewer rows than ranks, some shares are empty.
    """
    parts = [part for batch in batches for part in batch.split(math.ceil(len(batch.task) / ranks))]
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    for part in sorted(parts, key=lambda part: -part.tokens):
        min(shares, key=lambda share: sum(batch.tokens for batch in share)).append(part)
    return shares


class Passes:
    """The gradient of a step in as few passes as memory allows; the same gradient whatever their number.

    tokens: the most that one pass may hold, None for a whole batch. Where memory runs out it is halved, for good.
    loss: () where the loss adds up, as the gradient does in ``lam.grad``; both stay where they are, since ``graphs``
    write there.
    """

    def __init__(
        self, objective: NullSpaceObjective, lam: Tensor, tokens: int | None = None, loss: Tensor | None = None,
        graphs: Graphs | None = None,
    ) -> None:  # fmt: skip
        self.objective = objective
        self.lam = lam
        self.tokens = tokens
        self.loss = torch.zeros((), dtype=lam.dtype, device=lam.device) if loss is None else loss
        self.graphs = graphs or Graphs()
        if lam.grad is None:
            lam.grad = torch.zeros_like(lam)

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        """() the loss of these batches, added to ``loss``; its gradient is added to ``lam.grad``. Both are zero before.

        Raises NSCError where not even one row of tokens fits.
        """
        while True:
            try:
                return self._gradient([p for b in batches for p in (b.within(self.tokens) if self.tokens else [b])])
            except torch.OutOfMemoryError as error:
                largest = max(min(b.tokens, self.tokens or b.tokens) for b in batches)
                narrowest = max(b.task.shape[1] for b in batches)
                if largest <= narrowest:
                    raise NSCError(
                        f"memory does not even hold one pass of {narrowest} tokens; give a smaller max_length or dtype"
                    ) from error
            self.tokens = max(largest // 2, narrowest)
            self.graphs.clear()
            for total in (self.loss, self.lam.grad):
                total.zero_()  # type: ignore[union-attr]
            if self.lam.is_cuda:
                torch.cuda.empty_cache()

    def _gradient(self, passes: Sequence[Batch]) -> Tensor:
        for batch in passes:
            self.graphs(self._pass, batch.pinned() if self.lam.is_cuda else batch)
        return self.loss

    def _pass(self, batch: Batch) -> None:
        assert self.lam.grad is not None
        set_coefficients(self.objective.layers, self.lam)
        loss = self.objective.loss(batch.to(self.lam.device))
        (gradient,) = torch.autograd.grad(loss, self.lam)
        self.lam.grad += gradient
        self.loss += loss.detach()
