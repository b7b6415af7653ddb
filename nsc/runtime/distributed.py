"""The processes that ``torchrun`` or ``accelerate launch`` started, learning one set of coefficients together.

Every rank holds the base (or its slice of it, see ``nsc.sharding``), the adapters and the same state. The rows of a
step are shared out, one all-reduce adds up the gradients, and all ranks take the same optimiser step, so their
coefficients are equal bit for bit.
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

from nsc.errors import NSCError

TIMEOUT = timedelta(minutes=10)  # before a rank that hangs is given up; gloo notices at once one that ended
SETTLE_SECONDS = 0.1


class RankError(NSCError):
    """The ranks do not find one another, lost one, or were not started alike."""


@dataclass(frozen=True)
class Team:
    """rank: of this process.  size: how many there are; every method must be called by all of them, in one order."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one process that prints and writes."""
        return self.rank == 0

    def add_up(self, *tensors: Tensor, flag: bool = False) -> bool:
        """Make every tensor the sum of all ranks', by one all-reduce; whether any rank gave the flag.

        The tensors are of one dtype and device. The answer is waited for. Raises RankError if a rank is lost.
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
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        box = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
        with self._in_touch():
            dist.all_reduce(box, dist.ReduceOp.MAX)
            return int(box)

    def join_slices(self, mine: Tensor) -> Tensor:
        """(size * n,) the slices (n,) of all ranks, of one dtype, in the order of the ranks."""
        whole = mine.new_empty(self.size * len(mine))
        with self._in_touch():
            dist.all_gather_into_tensor(whole.view(torch.uint8), mine.view(torch.uint8))
        return whole

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What ``make`` returns on the first rank, on all of them; where it raises NSCError, all of them raise that."""
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

    def require_same(self, value: Any, what: str) -> None:
        """Raise RankError on all ranks, naming those whose ``value`` is not the first one's."""
        if self.size == 1:
            return
        values: list[Any] = [None] * self.size
        with self._in_touch():
            dist.all_gather_object(values, value)
        if strange := [str(rank) for rank, other in enumerate(values) if other != values[0]]:
            raise RankError(f"{what} of rank {', '.join(strange)} differ from those of rank 0; start all ranks alike")

    def wait(self) -> None:
        """Until all ranks are here. Raises RankError if one is lost."""
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
                f" start them again, as many as you like, and resume from the checkpoint ({_first_line(error)})"
            ) from error


ALONE = Team()


def join(device: str = "auto") -> Team:
    """This process among those it was started with; ``ALONE`` where there are none.

    The torch.distributed group that the caller made is used where there is one. Otherwise one is made from the
    variables that torchrun sets, for as long as the process lives: NCCL with the GPU of ``LOCAL_RANK``, or gloo.
    Raises RankError if the others do not come, or for a device that the processes of a machine cannot share.
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
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} does not find the others ({_first_line(error)});"
            " start all of them by torchrun or accelerate launch"
        ) from error
    atexit.register(_leave)


def _leave() -> None:
    """Gloo of torch 2.6 hangs in 3 of 40 exits that close just after an all-reduce, aborts in 1 of 40 that do not."""
    if dist.is_initialized():
        time.sleep(SETTLE_SECONDS)
        dist.destroy_process_group()


def _own_gpu(device: str) -> int:
    """The number of the GPU that no other process of this machine takes."""
    own, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if ":" in device:
        raise RankError(f"several processes cannot share {device}; give cuda, and each takes a GPU of its own")
    if own >= there:
        raise RankError(f"there are {there} GPUs for {own + 1} or more processes of this machine; start one for each")
    return own


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
