"""A base that fits on no single device: every rank keeps an equal slice of each linear's frozen weight.

The ranks gather a weight where it is used, in the forward and again in the backward, and free it at once. A gather
needs all ranks, so all of them run the same layers in the same order: they run equally many passes, however few rows
they have, and a rank that runs out of memory still takes part in the remaining gathers of the pass. No module has a
hook for this, so a forward may end early inside the model, by an exception, as the objective's does.
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
    """What the sharded linears of one model share: the team, and the order in which a pass gathers their weights.

    Args:
        team: the ranks among which the base is divided.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self._order: list[ShardedLinear] = []  # the gathers of a whole pass
        self._gathered: list[ShardedLinear] = []  # those of the pass that is running

    def gather(self, linear: ShardedLinear) -> Tensor:
        """Gather a weight from the slices of all ranks, which must all call this in the same order.

        Args:
            linear: one of the sharded linears.

        Returns:
            (ranks * ceil(m d / ranks),) the flat weight, padded with zeros.

        Raises:
            RankError: if a rank is lost.
        """
        flat = self.team.join_slices(linear.shard)
        self._gathered.append(linear)
        return flat

    def even(self, passes: Sequence[Batch]) -> list[Batch]:
        """Pad this rank's passes to as many as any rank has, with batches of weight zero.

        Args:
            passes: the batches of this rank, at least one.

        Returns:
            The same batches, and those added.

        Raises:
            RankError: if a rank is lost.
        """
        most = self.team.most(len(passes))
        return [*passes, *[weightless(passes[0])] * (most - len(passes))]

    @contextmanager
    def one_pass(self) -> Iterator[None]:
        """Keep the ranks in step through a forward and backward that all of them run.

        The first pass that completes teaches the order of the gathers; memory must not run out before that.

        Yields:
            Nothing; the forward and backward run inside the ``with``.

        Raises:
            torch.OutOfMemoryError: on all ranks, if memory runs out on one; a ``LostPass`` on the others.
            RankError: if a rank is lost.
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
            failed.__traceback__ = None  # it would keep the activations of the pass in memory
            for linear in self._order[len(self._gathered) :]:
                self.gather(linear)
        any_failed = self.team.add_up(torch.zeros(1, device=self._order[0].shard.device), flag=failed is not None)
        if failed is not None:
            raise failed
        if any_failed:
            raise LostPass("memory ran out on another rank")


class ShardedLinear(nn.Module):
    """A frozen linear (m, d) of which this rank holds one slice, ``shard`` (ceil(m d / ranks),).

    Args:
        linear: the whole linear.
        shards: what it shares with the model's other sharded linears.
        device: where the slice and the bias should be.
    """

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
        """Apply the linear; all ranks must run the same such layers, and their backwards, in the same order.

        Args:
            z: (..., d) this rank's inputs.

        Returns:
            (..., m), as of the whole linear.
        """
        return fetched_linear(z, self.bias, self._weight)

    def _weight(self) -> Tensor:
        m, d = self.out_features, self.in_features
        return self.shards.gather(self)[: m * d].view(m, d)


def shard_linears(model: nn.Module, team: Team, device: str) -> nn.Module:
    """Cut every linear of a frozen base to this rank's slice, one by one, and move all to a device.

    Args:
        model: the base, on the CPU so that no GPU ever holds it whole; changed in place.
        team: the ranks among which it is divided.
        device: where this rank's part should be.

    Returns:
        The same model.

    Raises:
        NSCError: for a single process; or for a mixture of experts, since the ranks would run different ones.
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
    """Find what the sharded linears of a model share.

    Args:
        model: any base.

    Returns:
        The ``Shards`` of its first sharded linear, or None where it has none.
    """
    return next((module.shards for module in model.modules() if isinstance(module, ShardedLinear)), None)


def weightless(batch: Batch) -> Batch:
    """Return the first row of a batch with weight zero, by which a rank without rows keeps step with the others.

    Args:
        batch: any batch of the step.

    Returns:
        A batch of one row, which adds nothing to loss or gradient.
    """
    row = batch.split(1)[0]
    expected = row.expected and row.expected._replace(weight=torch.zeros_like(row.expected.weight))
    return replace(row, weight=torch.zeros_like(row.weight), expected=expected)
