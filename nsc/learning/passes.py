"""A step's gradient in as few forwards and backwards as memory allows, and each rank's share of passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from nsc.adapters.surgery import set_coefficients
from nsc.batch import Batch
from nsc.errors import NSCError
from nsc.learning.objective import Objective
from nsc.runtime.cuda_graphs import Graphs
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.memory import kept_bytes
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import LostPass, Shards, shards_of, weightless
from nsc_kernels.modules import MergedLoRALinear, folded_once

SHARE = 0.4  # of free memory; the rest is for what a pass holds only for a moment, and for the graphs' own pool


def share_out(batches: Sequence[Batch], ranks: int) -> list[list[Batch]]:
    """Divide the rows of a step among ranks, with about as many tokens for each; the same in every process.

    Args:
        batches: batches of the step.
        ranks: how many processes there are.

    Returns:
        One share per rank, some of them empty where there are fewer rows than ranks.
    """
    parts = [part for batch in batches for part in batch.split(math.ceil(len(batch.task) / ranks))]
    shares: list[list[Batch]] = [[] for _ in range(ranks)]
    for part in sorted(parts, key=lambda part: -part.tokens):
        min(shares, key=lambda share: sum(batch.tokens for batch in share)).append(part)
    return shares


def own_share(batches: Sequence[Batch], team: Team, shards: Shards | None = None) -> list[Batch]:
    """Return this rank's share of a step.

    Args:
        batches: batches of the step.
        team: the processes.
        shards: shards of a sharded base, for which no share may be empty.

    Returns:
        Batches; of weight 0 where a sharded base has no row for this rank.
    """
    share = share_out(batches, team.size)[team.rank]
    return share if share or shards is None else [weightless(batches[0])]


def in_passes(batches: Sequence[Batch], tokens: int | None) -> list[Batch]:
    """Split batches into passes.

    Args:
        batches: batches of a step.
        tokens: the most that one pass may hold; None for a whole batch.

    Returns:
        The passes, in the order of the batches.
    """
    return [part for batch in batches for part in (batch.within(tokens) if tokens else [batch])]


def on_each(
    passes: Sequence[Batch],
    run: Callable[[Batch], tuple[Tensor, ...]],
    team: Team = ALONE,
    shards: Shards | None = None,
) -> list[tuple[Tensor, ...]]:
    """Run each pass on one of the ranks, and tell all of them what came of it.

    The passes are those of a single process, so however many ranks there are, the results have the same bits.

    Args:
        passes: the same on all ranks.
        run: pass -> what comes of it.
        team: the processes.
        shards: shards of a sharded base, for which all ranks run equally many passes.

    Returns:
        The result of each pass in their order, on the CPU where there are several ranks.

    Raises:
        RankError: if a rank is lost.
    """
    idle = -len(passes) % team.size if shards else 0
    mine = []
    for i in range(team.rank, len(passes) + idle, team.size):
        with shards.one_pass() if shards else nullcontext():
            mine.append(run(passes[i] if i < len(passes) else weightless(passes[0])))
    if team.size == 1:
        return mine
    shares = team.gather([tuple(x.cpu() for x in made) for made in mine])
    return [shares[i % team.size][i // team.size] for i in range(len(passes))]


class Passes:
    """The gradient of a step in as few passes as memory allows; the same gradient whatever their number.

    Args:
        objective: whose gradient.
        theta: what is optimised; its ``grad`` is where the gradient adds up.
        tokens: the most that one pass may hold; None for a whole batch. Where memory runs out it is halved for good.
        loss: () where the loss adds up; it stays where it is, since ``graphs`` write there.
        graphs: graphs that record passes; none by default.
        place: puts theta into the layers, differentiably; as their coefficients by default.
        folding: layers of plan "weights" that fold their weight once a step instead of in every pass.
    """

    def __init__(
        self,
        objective: Objective,
        theta: Tensor,
        tokens: int | None = None,
        loss: Tensor | None = None,
        graphs: Graphs | None = None,
        place: Callable[[Tensor], None] | None = None,
        folding: Sequence[MergedLoRALinear] = (),
    ) -> None:
        self.objective, self.folding = objective, folding
        self.theta = theta
        self.place = place or partial(set_coefficients, objective.layers)
        self.tokens = tokens
        self.loss = torch.zeros((), dtype=theta.dtype, device=theta.device) if loss is None else loss
        self.graphs = graphs or Graphs()
        if theta.grad is None:
            theta.grad = torch.zeros_like(theta)
        self.shards = shards_of(objective.model)

    def gradient(self, batches: Sequence[Batch]) -> Tensor:
        """Add the gradient of these batches to ``theta.grad`` and their loss to ``loss``, which are zero before.

        With a sharded base all ranks run equally many passes, so each must give a batch, of weight 0 if need be.

        Args:
            batches: this rank's share of the step.

        Returns:
            () the loss.

        Raises:
            NSCError: if not even one row of tokens fits into memory.
        """
        while True:
            try:
                passes = in_passes(batches, self.tokens)
                return self._gradient(self.shards.even(passes) if self.shards else passes)
            except torch.OutOfMemoryError as error:
                largest = max(min(b.tokens, self.tokens or b.tokens) for b in batches)
                narrowest = max(b.task.shape[1] for b in batches)
                if largest <= narrowest and not isinstance(error, LostPass):
                    raise NSCError(
                        f"memory does not hold even one pass of {narrowest} tokens; give a smaller max_length or dtype"
                    ) from error
            self.tokens = max(largest // 2, narrowest)
            self.graphs.clear()
            for total in (self.loss, self.theta.grad):
                total.zero_()  # type: ignore[union-attr]
            if self.theta.is_cuda:
                torch.cuda.empty_cache()

    def _gradient(self, passes: Sequence[Batch]) -> Tensor:
        with torch.no_grad():
            self.place(self.theta)
        with folded_once(self.folding):
            for batch in passes:
                with self.shards.one_pass() if self.shards else nullcontext():
                    self.graphs(self._pass, batch.pinned() if self.theta.is_cuda else batch)
        return self.loss

    def _pass(self, batch: Batch) -> None:
        assert self.theta.grad is not None
        self.place(self.theta)
        loss = self.objective.loss(batch.to(self.theta.device))
        (gradient,) = torch.autograd.grad(loss, self.theta)
        self.theta.grad += gradient
        self.loss += loss.detach()


def tokens_that_fit(objective: Objective, batch: Batch, free: int) -> int:
    """Measure how many tokens one pass may hold within ``SHARE`` of the free memory.

    One row and two are run forward: what both keep alike, such as folded weights, belongs to a pass, the rest to its
    tokens.

    Args:
        objective: the objective that is run; its layers hold what is optimised.
        batch: a batch of the first step.
        free: bytes.

    Returns:
        Tokens, at least one row of ``batch``.
    """
    width = batch.task.shape[1]
    try:
        kept = [_kept(objective, part) for part in (batch.split(1)[0], batch.split(2)[0])]
    except torch.OutOfMemoryError:
        return width
    rows = min(2, batch.task.shape[0])
    each = kept[1] - kept[0] if rows == 2 else kept[0]
    fixed = max(0, kept[0] - each)
    return max(width, int((free * SHARE - fixed) * width / max(1, each)))


def _kept(objective: Objective, batch: Batch) -> int:
    """Bytes kept for the backward of one pass."""
    device = input_device(objective.model)
    return kept_bytes(lambda: objective.loss(batch.to(device)), objective.model)
