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


def peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or else of the whole process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
