"""Whether a provider computes what it should. One that does not gets no number."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

SEED = secrets.randbits(30)  # of this run's inputs: drawn anew in each, and recorded
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-3}  # of ``error``, by dtype of the inputs


def exact(inputs: Sequence[Any]) -> list[Any]:
    """Return the inputs of an oracle: floating tensors in float64, the rest as it is."""
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]


def results(function: Callable, inputs: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that a call gives, out of memory in which a first call's were overwritten with NaN."""
    for left in _tensors(function(*inputs)):
        left.detach().fill_(torch.nan)
    del left
    return _tensors(function(*inputs))


def error(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    """Return the largest distance of a row of ``got`` from that of ``want``, relative to its norm or the typical norm.

    Rows are those of a matrix, or the single elements of a vector. NaN counts as infinitely far.

    Raises:
        ValueError: if the shapes differ.
    """
    if [x.shape for x in got] != [x.shape for x in want]:
        raise ValueError(f"shapes {[tuple(x.shape) for x in got]} where {[tuple(x.shape) for x in want]} are due")
    return max((_row_error(x, y) for x, y in zip(got, want, strict=True) if y.numel()), key=_nan_last, default=0.0)


def _row_error(got: Tensor, want: Tensor) -> float:
    width = want.shape[-1] if want.dim() > 1 else 1
    distance = torch.linalg.vector_norm((got.double() - want).reshape(-1, width), dim=1)
    norm = torch.linalg.vector_norm(want.reshape(-1, width), dim=1)
    typical = norm.square().mean().sqrt()
    return (distance / norm.maximum(typical).clamp_min(1e-30)).max().item()


def _nan_last(value: float) -> float:
    return float("inf") if value != value else value


def _tensors(returned: Any) -> list[Tensor]:
    """Return the tensors among what a function gives."""
    found = [returned] if isinstance(returned, Tensor) else list(returned)
    return [x for x in found if isinstance(x, Tensor)]
