"""Memory: what is free, what a forward keeps for its backward, and how much was held at the most."""

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
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def free_memory(device: torch.device) -> int | None:
    """Return how much memory new tensors may take.

    Args:
        device: where they would be.

    Returns:
        Bytes, those in the cache of the GPU's allocator included; None where the system does not tell.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available if device.type == "cpu" else None


def kept_bytes(work: Callable[[], Any], model: nn.Module) -> int:
    """Return how much autograd keeps for a backward, without the model's own tensors.

    Args:
        work: the forward, which is run once.
        model: whose parameters and buffers do not count.

    Returns:
        Bytes, each storage counted once and whole.
    """
    own = {storage.data_ptr() for x in (*model.parameters(), *model.buffers()) for storage in _storages(x)}
    kept: dict[int, Any] = {}

    def keep(x: Tensor) -> Tensor:
        for storage in _storages(x):
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage  # held, so that no other storage gets its address
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        work()
    return sum(storage.nbytes() for storage in kept.values())


def _storages(x: Any) -> list[torch.UntypedStorage]:
    """The storages of a tensor; a quantised one of torchao has none of its own, but those of the tensors in it."""
    if not is_traceable_wrapper_subclass(x):
        return [x.untyped_storage()]
    return [storage for name in x.__tensor_flatten__()[0] for storage in _storages(getattr(x, name))]


def peak_memory(device: torch.device) -> int:
    """Return how much memory was held at the most since the start, or since the peak was last reset.

    Args:
        device: a GPU, or any other device for the memory of this process.

    Returns:
        Bytes: of the GPU's allocator, or resident ones of the whole process; 0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss of Linux starts at the peak of the process that started this one, VmHWM at zero.
    if sys.platform == "linux" and (peak := _proc_status("VmHWM")):
        return peak
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class PeakMemory:
    """The most memory that is held from now on beyond what is held now, on a GPU or by this process on Linux.

    The peak of before is reset: on Linux the kernel's, by writing 5 to /proc/self/clear_refs, once freed memory has
    been given back.

    Args:
        device: a GPU, or the CPU for the memory of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._begin()

    def growth(self) -> int | None:
        """Return the growth until now.

        Returns:
            Bytes; None where the system does not tell.
        """
        return None if self._before is None else peak_memory(self.device) - self._before

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
        except OSError:
            return None
        return _proc_status("VmRSS")


def _proc_status(key: str) -> int | None:
    """Return the bytes in one line of /proc/self/status, None where there is no such line."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
