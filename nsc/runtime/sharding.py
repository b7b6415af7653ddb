"""A base that no device holds: every rank keeps an equal slice of each linear's frozen weight.

The ranks gather a weight where it is used, in the forward and again in the backward, and let it go at once. A gather
needs all ranks, so all of them run the same layers in the same order: the same number of passes, whatever rows they
have, and where memory runs out on one rank it still takes part in what is left of the pass. No module has a hook for
this, so a forward may end inside the model, by an exception, as the objective's does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.errors import NSCError
from nsc.runtime.distributed import Team
from nsc.runtime.placement import fetched_linear, is_plain


class LostPass(torch.OutOfMemoryError):
    """Memory ran out on another rank, in the same pass."""


class Shards:
    """The sharded linears of one model on all ranks, and which of them the pass that runs has gathered."""

    def __init__(self, team: Team) -> None:
        self.team = team
        self._order: list[ShardedLinear] = []  # of a whole pass
        self._gathered: list[ShardedLinear] = []

    def gather(self, linear: ShardedLinear) -> Tensor:
        """The flat weight and what pads it, from the slices of all ranks. All of them must call it, in one order."""
        flat = self.team.join_slices(linear.shard)
        self._gathered.append(linear)
        return flat

    def even(self, passes: Sequence[Batch]) -> list[Batch]:
        """As many passes as any rank has, at least one given here; those added weigh nothing."""
        most = self.team.most(len(passes))
        return [*passes, *[weightless(passes[0])] * (most - len(passes))]

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """A forward and backward that all ranks run. Where memory runs out on one, all of them raise OutOfMemoryError.

        The first one must not run out of it: that is how the order of the gathers is learned.
        """
        self._gathered, failed = [], None
        try:
            yield
        except torch.OutOfMemoryError as error:
            failed = error
        if failed is None:
            self._order = self._gathered
        elif len(self._gathered) > len(self._order):
            raise failed
        else:
            failed.__traceback__ = None  # it would keep the activations of the pass
            for linear in self._order[len(self._gathered) :]:
                self.gather(linear)
        someone = self.team.add_up(torch.zeros(1, device=self._order[0].shard.device), flag=failed is not None)
        if failed is not None:
            raise failed
        if someone:
            raise LostPass("memory ran out on another rank")


class ShardedLinear(nn.Module):
    """A frozen linear (m, d) of which this rank holds one slice: ``shard`` (ceil(m d / ranks),)."""

    def __init__(self, linear: nn.Linear, shards: Shards, device: str) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        flat, bias = linear.weight.detach().flatten(), linear.bias
        size = -(-len(flat) // shards.team.size)
        mine = flat.new_zeros(size)
        part = flat[shards.team.rank * size :][:size]
        mine[: len(part)] = part
        self.shard = nn.Parameter(mine.to(device), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().to(device), requires_grad=False)
        self.shards = shards

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d) -> (..., m). All ranks must run it, and its backward, in one order of such layers."""
        return fetched_linear(z, self.bias, self._weight)

    def _weight(self) -> Tensor:
        m, d = self.out_features, self.in_features
        return self.shards.gather(self)[: m * d].view(m, d)


def shard_linears(model: nn.Module, team: Team, device: str) -> nn.Module:
    """The same frozen base, changed in place: every linear cut to this rank's slice, one by one, and all on ``device``.

    It lies on the CPU before, so that no GPU ever holds it whole.

    Raises NSCError for a single process, and for experts, of which each rank would run others.
    """
    if team.size == 1:
        raise NSCError("shard splits the base over several processes; start them by torchrun or accelerate launch")
    shards = Shards(team)
    for name, module in list(model.named_modules()):
        if not is_plain(module):
            continue
        if "expert" in name:
            raise NSCError(f"{name} runs for some tokens only, so ranks would wait for one another; do not shard")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, ShardedLinear(module, shards, device))
    return model.to(device)


def shards_of(model: nn.Module) -> Shards | None:
    """What the sharded linears of a model share, None where it has none."""
    return next((module.shards for module in model.modules() if isinstance(module, ShardedLinear)), None)


def weightless(batch: Batch) -> Batch:
    """The first row of a batch, counting nothing: for a rank without rows to keep step with the others."""
    row = batch.split(1)[0]
    return replace(row, weight=torch.zeros_like(row.weight))
