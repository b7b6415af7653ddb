"""EMR-Merging: one update of elected signs and largest magnitudes; a mask and a rescaler recover each task's own.

    g = sign mean_k D_k, - for 0        tau = g max_k |D_k| [D_k g > 0]
    M_k = [D_k g > 0]                   l_k = sum over layers of mean |D_k| / sum over layers of mean |M_k tau|

Source: https://arxiv.org/abs/2405.17461. What is merged is tau alone, or with the setting task that one's l_k M_k tau;
``emr_tasks`` gives all K. l_k sums means of tensors as the original's code does; the paper's formula sums entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods.protocol import Matrices, Method, Place
from nsc.methods.row_blocks import by_rows, row_blocks


@dataclass(frozen=True)
class EmrSettings:
    """task: whose own update is merged; None: the unified one."""

    task: str | None = None


@dataclass(frozen=True)
class Known:
    """The task and its rescaler l_k."""

    task: str
    rescaler: float


def emr(X: Tensor, settings: EmrSettings | Known, place: Place) -> Tensor:
    """(p, q): tau of w_k X_k, for X (K, p, q), or what is one task's of it."""
    if not isinstance(settings, Known):
        return by_rows(lambda block: _unified(place.weighted(block))[0], X)
    k, rescaler = place.tasks.index(settings.task), settings.rescaler

    def own(block: Tensor) -> Tensor:
        tau, agree = _unified(place.weighted(block))
        return agree[k] * tau * rescaler

    return by_rows(own, X)


def survey(matrices: Matrices, settings: EmrSettings) -> EmrSettings | Known:
    """With the rescaler of the task, where one is named. Raises NSCError for a name that is no task."""
    if settings.task is None:
        return settings
    tasks = next(place.tasks for place, _ in matrices())
    if settings.task not in tasks:
        raise NSCError(f"emr is to be of task {settings.task}, but there are {', '.join(tasks)}")
    return Known(settings.task, emr_rescalers(matrices)[tasks.index(settings.task)].item())


def emr_tasks(matrices: Matrices) -> Iterator[tuple[str, Tensor]]:
    """Of each layer its name and the K updates (K, p, q), l_k M_k tau; all layers are seen once before the first."""
    rescalers = emr_rescalers(matrices)
    for place, X in matrices():
        tau, agree = _unified(place.weighted(X))
        yield place.name, agree * tau * rescalers.to(X)[:, None, None]


def emr_rescalers(matrices: Matrices) -> Tensor:
    """(K,) float64: l_k; 1 for a task without any update."""
    own: Tensor | float = 0.0
    unified: Tensor | float = 0.0
    for place, X in matrices():
        size = X[0].numel()
        for block in row_blocks(X):
            mine, joint = _sums(place.weighted(block))
            own, unified = own + mine / size, unified + joint / size
        del X, block  # before the next layer is made
    own, unified = torch.as_tensor(own), torch.as_tensor(unified)
    return torch.where(unified > 0, own / unified, 1)


def _unified(X: Tensor) -> tuple[Tensor, Tensor]:
    """tau (p, q), and M (K, p, q)."""
    sign = torch.where(X.mean(0) > 0, 1, -1).to(X)
    aligned = X * sign
    return aligned.amax(0).clamp_min(0) * sign, aligned > 0


def _sums(X: Tensor) -> tuple[Tensor, Tensor]:
    """(K,) sums of |X_k|, and of |M_k tau|."""
    tau, agree = _unified(X)
    return X.abs().sum((1, 2), dtype=torch.float64), (agree * tau).abs().sum((1, 2), dtype=torch.float64)


METHODS = {
    "emr": Method(
        "elected signs with the largest magnitude among those who voted so",
        "https://arxiv.org/abs/2405.17461",
        EmrSettings,
        on_matrices=emr,
        survey=survey,
        whole_layers=True,
    ),
}
