"""Rows of tokens of all tasks: what one forward takes, whose each token is and how much it weighs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """A rectangle of tokens.

    inputs: what the model's forward takes.  task: (b, L) int64, whose each token is.  weight: (b, L) float, zero on
    padding, one in sum over each task's tokens in all batches of a step.  segment: (b, L) int64, the sample that a
    token belongs to, -1 for padding, where several samples share a row; None where none do.
    """

    inputs: dict[str, Any]
    task: Tensor
    weight: Tensor
    segment: Tensor | None = None

    @property
    def tokens(self) -> int:
        """How many are computed, padding included."""
        return self.task.numel()

    def samples(self) -> Tensor:
        """(b L,) int64: which sample each token is of, numbered from 0 along the batch, padding as one of its own."""
        rows = torch.arange(self.task.shape[0], device=self.task.device)[:, None].expand_as(self.task)
        own = (rows if self.segment is None else self.segment).flatten()
        return torch.cat([torch.zeros_like(own[:1]), (own[1:] != own[:-1]).to(own.dtype)]).cumsum(0)

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; copies do not block."""
        return self._map(partial(torch.Tensor.to, device=device, non_blocking=True))

    def pinned(self) -> Batch:
        """The same batch, where it is on the CPU in memory that a GPU copies from while the host goes on."""
        return self._map(lambda x: x.pin_memory() if x.device.type == "cpu" else x)

    def split(self, rows: int) -> list[Batch]:
        """Parts of at most ``rows`` rows each; their losses and ratios add up to the whole batch's."""
        cuts = [slice(start, start + rows) for start in range(0, self.task.shape[0], rows)]
        return [self._map(lambda x, cut=cut: x[cut]) for cut in cuts]  # type: ignore[misc]

    def within(self, tokens: int) -> list[Batch]:
        """Parts of at most ``tokens`` tokens each, but of one row at least."""
        return self.split(max(tokens // self.task.shape[1], 1))

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """``inputs``, and where samples share rows the attention mask that keeps them apart, in the model's dtype."""
        if self.segment is None:
            return self.inputs
        return {**self.inputs, "attention_mask": attention_mask(self.segment, dtype)}

    def _map(self, change: Any) -> Batch:
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        inputs = {name: change(value) for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, **{name: change(value) for name, value in tensors.items()})


def attention_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """(b, L) sample of each token -> (b, 1, L, L) to add to scores: 0 in the past of the same sample."""
    same = segment[:, None, :, None] == segment[:, None, None, :]
    past = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    scores = torch.zeros(same.shape, dtype=dtype, device=segment.device)
    return scores.masked_fill(~(same & past), torch.finfo(dtype).min)
