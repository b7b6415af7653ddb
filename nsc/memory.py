"""How many tokens a pass may hold, from what one row of them keeps for its backward and what memory is free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.objective import NullSpaceObjective
from nsc.surgery import set_coefficients

SHARE = 0.4  # of free memory; the rest is for what a pass holds only for a moment, and for the graphs' own pool
MEMINFO = Path("/proc/meminfo")


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
    if device.type != "cpu" or not MEMINFO.is_file():
        return None
    told = dict(line.split(":") for line in MEMINFO.read_text().splitlines() if ":" in line)
    return 1024 * int(told["MemAvailable"].split()[0]) if "MemAvailable" in told else None


@contextmanager
def counting_kept(model: nn.Module) -> Iterator[Mapping[int, int]]:
    """Storage -> bytes of whatever autograd keeps for a backward, but for the model's own parameters and buffers."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        yield kept


def _kept(objective: NullSpaceObjective, lam: Tensor, batch: Batch) -> int:
    """Bytes kept for the backward of one pass."""
    set_coefficients(objective.layers, lam)
    with counting_kept(objective.model) as kept:
        loss = objective.loss(batch.to(lam.device))
    del loss
    return sum(kept.values())
