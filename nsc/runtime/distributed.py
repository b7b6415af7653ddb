"""The processes that ``torchrun`` or ``accelerate launch`` started, which learn one set of coefficients together.

Every rank holds the base (or its slice of it, see ``nsc.runtime.sharding``), the adapters and the same state. The rows
of a step are divided among the ranks, one all-reduce adds up the gradients, and all ranks take the same optimizer step,
so their coefficients are equal bit for bit.
"""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nsc.errors import NSCError, first_line

TIMEOUT = timedelta(minutes=10)  # until a rank that hangs counts as lost; gloo notices at once that one has ended
SETTLE_SECONDS = 0.1


class RankError(NSCError):
    """The ranks did not find one another, lost one, or were not started alike."""


@dataclass(frozen=True)
class Team:
    """The processes of one run, as one of them sees it; all of them must call the same methods in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: how many processes there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def add_up(self, *tensors: Tensor, flag: bool = False) -> bool:
        """Replace every tensor by its sum over all ranks, with one all-reduce, and wait for it.

        Args:
            tensors: at least one, of one dtype and on one device, with the same shapes on all ranks; changed in place.
            flag: any news of this rank.

        Returns:
            Whether any rank set the flag.

        Raises:
            RankError: if a rank is lost.
        """
        if self.size == 1:
            return flag
        flat = torch.cat([*(t.detach().flatten() for t in tensors), tensors[0].new_tensor([float(flag)])])
        with self._in_touch():
            dist.all_reduce(flat)
            flag = bool(flat[-1])
        for tensor, total in zip(tensors, flat[:-1].split([t.numel() for t in tensors]), strict=True):
            tensor.detach().copy_(total.view_as(tensor))
        return flag

    def most(self, value: int) -> int:
        """Return the largest value of any rank.

        Args:
            value: this rank's.

        Returns:
            The maximum, the same on all ranks.

        Raises:
            RankError: if a rank is lost.
        """
        if self.size == 1:
            return value
        box = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        with self._in_touch():
            dist.all_reduce(box, dist.ReduceOp.MAX)
            return int(box)

    def join_slices(self, mine: Tensor) -> Tensor:
        """Concatenate the slices of all ranks.

        Args:
            mine: (n,) this rank's slice; n and the dtype are the same on all ranks.

        Returns:
            (size * n,) in the order of the ranks.

        Raises:
            RankError: if a rank is lost.
        """
        whole = mine.new_empty(self.size * len(mine))
        with self._in_touch():
            dist.all_gather_into_tensor(whole.view(torch.uint8), mine.view(torch.uint8))
        return whole

    def from_first(self, make: Callable[[], Any]) -> Any:
        """Call a function on the first rank, and give its result to all of them.

        Args:
            make: called on rank 0 alone; its result can be pickled.

        Returns:
            What ``make`` returned, on every rank.

        Raises:
            NSCError: on every rank, if ``make`` raises one.
            RankError: if a rank is lost.
        """
        box: list[Any] = [None]
        if self.first:
            try:
                box = [make()]
            except NSCError as error:
                box = [error]
        if self.size > 1:
            with self._in_touch():
                dist.broadcast_object_list(box)
        if isinstance(box[0], NSCError):
            raise box[0]
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Give the value of every rank to all of them.

        Args:
            value: this rank's; it can be pickled, and its tensors are on the CPU.

        Returns:
            All values, in the order of the ranks.

        Raises:
            RankError: if a rank is lost.
        """
        values: list[Any] = [value] * self.size
        if self.size > 1:
            with self._in_touch():
                dist.all_gather_object(values, value)
        return values

    def require_same(self, value: Any, what: str) -> None:
        """Refuse ranks that were not started alike.

        Args:
            value: what should be equal on all ranks; it can be pickled.
            what: the plural words for it in the error's text.

        Raises:
            RankError: on every rank, naming the ranks whose value differs from that of rank 0; or if a rank is lost.
        """
        values = self.gather(value)
        if different := [str(rank) for rank, other in enumerate(values) if other != values[0]]:
            raise RankError(f"{what} of rank {', '.join(different)} differ from those of rank 0; start all ranks alike")

    def wait(self) -> None:
        """Wait until all ranks have called this.

        Raises:
            RankError: if a rank is lost.
        """
        if self.size > 1:
            with self._in_touch():
                dist.barrier()

    @contextmanager
    def _in_touch(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of {self.size} lost the others: one of them ended or hangs, see its own message;"
                f" start them again, as many as you like, and resume from the checkpoint ({first_line(error)})"
            ) from error


ALONE = Team()


def join(device: str = "auto") -> Team:
    """Join the processes that this one was started with.

    The caller's torch.distributed group is used where there is one. Otherwise one is made from the environment
    variables that torchrun sets, for as long as the process lives: NCCL with the GPU of ``LOCAL_RANK``, or gloo.

    Args:
        device: where the base should be: "auto", "cpu", "cuda"...

    Returns:
        The team, or ``ALONE`` where there are no other processes.

    Raises:
        RankError: if the others do not come, or for a device that the processes of a machine cannot share.
    """
    if not dist.is_available():
        return ALONE
    if not dist.is_initialized():
        if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
            return ALONE
        _make_group(device)
    return Team(dist.get_rank(), dist.get_world_size())


def _make_group(device: str) -> None:
    on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if on_gpu:
        torch.cuda.set_device(_own_gpu(device))
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not find the others ({first_line(error)});"
            " start all of them by torchrun or accelerate launch"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    """Close the group shortly after its last operation.

    With torch 2.6, gloo hung in 3 of 40 exits that closed just after an all-reduce, and aborted in 1 of 40 that did not
    close at all.
    """
    if dist.is_initialized():
        time.sleep(SETTLE_SECONDS)
        dist.destroy_process_group()


def _own_gpu(device: str) -> int:
    """Return the number of the GPU that no other process of this machine takes."""
    own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if ":" in device:
        raise RankError(f"several processes cannot share {device}; give cuda, and each takes its own GPU")
    if own >= there:
        raise RankError(f"there are {there} GPUs for {own + 1} or more processes of this machine; start one for each")
    return own
