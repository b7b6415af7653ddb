"""How many tokens a pass may hold, from what one row of them keeps for its backward and what memory is free.

And what a piece of work took beyond what was there before it.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from nsc.adapters.surgery import set_coefficients
from nsc.batch import Batch
from nsc.learning.objective import NullSpaceObjective

SHARE = 0.4  # of free memory; the rest is for what a pass holds only for a moment, and for the graphs' own pool


def tokens_that_fit(objective: NullSpaceObjective, lam: Tensor, batch: Batch, free: int) -> int:
    """The most tokens that a pass may hold within ``SHARE`` of ``free`` bytes, at least one row of ``batch``.

    One row and two are run forward: what both keep alike, such as folded weights, is of a pass, the rest of its tokens.
    """
    width = batch.task.shape[1]
    try:
        kept = [_kept(objective, lam, part) for part in (batch.split(1)[0], batch.split(2)[0])]
    except torch.OutOfMemoryError:
        return width
    rows = min(2, batch.task.shape[0])
    each = kept[1] - kept[0] if rows == 2 else kept[0]
    fixed = max(0, kept[0] - each)
    return max(width, int((free * SHARE - fixed) * width / max(1, each)))


def free_memory(device: torch.device) -> int | None:
    """Bytes that new tensors may take; None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else None


class PeakMemory:
    """What is held from now on, at most, beyond what is held now: by the GPU's allocator, or by this process on Linux.

    On Linux the kernel's own peak is reset (5 to /proc/self/clear_refs) once what was freed has been given back.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._begin()

    def growth(self) -> int | None:
        """Bytes; None where the system does not tell."""
        if self._before is None:
            return None
        cuda = self.device.type == "cuda"
        return (torch.cuda.max_memory_allocated(self.device) if cuda else _status("VmHWM")) - self._before

    def _begin(self) -> int | None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device)
        if self.device.type != "cpu" or sys.platform != "linux":
            return None
        with suppress(OSError, AttributeError):  # a C library other than glibc has no malloc_trim
            ctypes.CDLL(None).malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
        except OSError:
            return None


def _status(key: str) -> int:
    """Bytes of one line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def kept_bytes(work: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of all that autograd keeps for a backward while ``work`` runs, without the model's own tensors."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that its place is not given to another
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        work()
    return sum(storage.nbytes() for storage in kept.values())


def _kept(objective: NullSpaceObjective, lam: Tensor, batch: Batch) -> int:
    """Bytes kept for the backward of one pass."""
    set_coefficients(objective.layers, lam)
    return kept_bytes(lambda: objective.loss(batch.to(lam.device)), objective.model)
