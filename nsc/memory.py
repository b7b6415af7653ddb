"""How many tokens a pass may hold, from what one row of them keeps for its backward and what memory is free."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.objective import NullSpaceObjective
from nsc.surgery import set_coefficients

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
