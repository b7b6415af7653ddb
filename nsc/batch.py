"""A batch: the rows of tokens that one forward takes, with the task and the weight of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What the experts say at the places of a batch that heads read: P for each of its b rows.

    Attributes:
        start: (b, P) int64, the first token that is read there.
        stop: (b, P) int64, the token after the last one.
        task: (b, P) int64, the task whose head reads there.
        weight: (b, P) float: the share of each place in the mean over its task's samples; 0 where a row has fewer.
        values: (b, P, C) in at least float32: the expert's output.
        ids: (b, P, C) int64: which outputs of the head ``values`` are; None for all of them, in order.
    """

    start: Tensor
    stop: Tensor
    task: Tensor
    weight: Tensor
    values: Tensor
    ids: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """A rectangle of b rows with L tokens each, of one or several tasks.

    Attributes:
        inputs: tensors (b, ...) by the names of the arguments of the model's forward.
        task: (b, L) int64: the index of the task that each token belongs to.
        weight: (b, L) float: the share of each token in the loss; zero on padding, and summing to one over the tokens
            of each task in all batches of a step.
        segment: (b, L) int64: the sample that each token belongs to, -1 on padding; None where no row holds more than
            one sample.
        expected: what the experts say, where the loss compares with it.
    """

    inputs: dict[str, Any]
    task: Tensor
    weight: Tensor
    segment: Tensor | None = None
    expected: Expected | None = None

    @property
    def tokens(self) -> int:
        """The number of tokens that a forward computes, padding included."""
        return self.task.numel()

    def samples(self) -> Tensor:
        """Number the samples of the batch.

        Returns:
            (b L,) int64: the sample of each token, counted from 0 along the batch. Where samples share rows, a run of
            padding counts as one more.
        """
        rows = torch.arange(self.task.shape[0], device=self.task.device)[:, None].expand_as(self.task)
        own = (rows if self.segment is None else self.segment).flatten()
        return torch.cat([torch.zeros_like(own[:1]), (own[1:] != own[:-1]).to(own.dtype)]).cumsum(0)

    def to(self, device: torch.device) -> Batch:
        """Copy the batch to a device, without blocking the host.

        Args:
            device: where all of its tensors should be.

        Returns:
            The same batch there.
        """
        return self.map(partial(torch.Tensor.to, device=device, non_blocking=True))

    def pinned(self) -> Batch:
        """Pin the tensors that are on the CPU, so that a GPU copies them while the host goes on.

        Returns:
            The same batch in page-locked memory.
        """
        return self.map(lambda x: x.pin_memory() if x.device.type == "cpu" else x)

    def split(self, rows: int) -> list[Batch]:
        """Cut the batch into parts, whose losses and ratios add up to those of the whole.

        Args:
            rows: the most rows of a part.

        Returns:
            The parts in order.
        """
        cuts = [slice(start, start + rows) for start in range(0, self.task.shape[0], rows)]
        return [self.map(lambda x, cut=cut: x[cut]) for cut in cuts]  # type: ignore[misc]

    def within(self, tokens: int) -> list[Batch]:
        """Cut the batch into parts of a limited number of tokens.

        Args:
            tokens: the most tokens of a part, padding included; a part has at least one row, however long.

        Returns:
            The parts in order.
        """
        return self.split(max(tokens // self.task.shape[1], 1))

    def arguments(self, dtype: torch.dtype) -> dict[str, Any]:
        """Return the keyword arguments of the model's forward.

        Args:
            dtype: the model's floating dtype, which the attention mask gets.

        Returns:
            ``inputs``, with an ``attention_mask`` that keeps samples apart where they share rows.
        """
        if self.segment is None:
            return self.inputs
        return {**self.inputs, "attention_mask": attention_mask(self.segment, dtype)}

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor of the batch.

        Args:
            change: takes and returns a tensor whose first dimension is the rows.

        Returns:
            The batch of the results.
        """
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        inputs = {name: change(value) for name, value in self.inputs.items()}
        there = {
            name: change(x) for name, x in (self.expected._asdict() if self.expected else {}).items() if x is not None
        }
        expected = self.expected and self.expected._replace(**there)
        return replace(
            self, inputs=inputs, expected=expected, **{name: change(value) for name, value in tensors.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """List every tensor of the batch.

        Returns:
            A name of its own -> tensor.
        """
        own = {"task": self.task, "weight": self.weight, "segment": self.segment}
        own |= {f"inputs.{name}": value for name, value in self.inputs.items()}
        own |= {f"expected.{name}": value for name, value in (self.expected._asdict() if self.expected else {}).items()}
        return {name: value for name, value in own.items() if value is not None}


def attention_mask(segment: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the causal attention mask of rows that several samples share.

    Args:
        segment: (b, L) integer: the sample of each token.
        dtype: the floating dtype of the attention scores.

    Returns:
        (b, 1, L, L) to add to the scores: 0 for earlier tokens of the same sample and the token itself, the dtype's
        lowest number elsewhere.
    """
    same = segment[:, None, :, None] == segment[:, None, None, :]
    past = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    scores = torch.zeros(same.shape, dtype=dtype, device=segment.device)
    return scores.masked_fill(~(same & past), torch.finfo(dtype).min)
