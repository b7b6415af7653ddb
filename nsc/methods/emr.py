"""EMR-Merging: one unified update; a mask and a rescaler recover each task's own from it.

    g = sign mean_k D_k, - for 0        tau = g max_k |D_k| [D_k g > 0]
    M_k = [D_k g > 0]                   l_k = sum over layers of mean |D_k| / sum over layers of mean |M_k tau|

Source: https://arxiv.org/abs/2405.17461. The merge is tau, or with the setting ``task`` that task's l_k M_k tau;
``emr_tasks`` gives all K. l_k sums means of tensors, as the original's code does; the paper's formula sums entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.checks import require_choice
from nsc.methods.protocol import LayerInfo, Matrices, Method
from nsc.methods.row_blocks import by_rows, row_blocks


@dataclass(frozen=True)
class EmrSettings:
    """Settings of ``emr``.

    Attributes:
        task: the task whose recovered update is merged; None for the unified update.
    """

    task: str | None = None


@dataclass(frozen=True)
class TaskRescaler:
    """A task with its rescaler, which depends on all layers.

    Attributes:
        task: the task's name.
        rescaler: l_k.
    """

    task: str
    rescaler: float


def emr(X: Tensor, settings: EmrSettings | TaskRescaler, layer: LayerInfo) -> Tensor:
    """Merge one layer by EMR.

    Args:
        X: (K, p, q), without weights.
        settings: no task, for the unified update; or a task and its rescaler, as ``survey`` returns them.
        layer: the tasks and their weights.

    Returns:
        (p, q): tau of w_k X_k, or l_k M_k tau.

    Source: https://arxiv.org/abs/2405.17461
    """
    if not isinstance(settings, TaskRescaler):
        return by_rows(lambda block: _unified(layer.weighted(block))[0], X)
    k, rescaler = layer.tasks.index(settings.task), settings.rescaler

    def own(block: Tensor) -> Tensor:
        tau, agree = _unified(layer.weighted(block))
        return agree[k] * tau * rescaler

    return by_rows(own, X)


def survey(matrices: Matrices, settings: EmrSettings) -> EmrSettings | TaskRescaler:
    """Find the rescaler of the task, where the settings name one.

    Args:
        matrices: every layer's X.
        settings: the settings.

    Returns:
        The task and its rescaler, or ``settings`` where they name no task.

    Raises:
        NSCError: if the task is none of the merge's.
    """
    if settings.task is None:
        return settings
    tasks = next(layer.tasks for layer, _ in matrices())
    require_choice("the task of emr", settings.task, tasks)
    return TaskRescaler(settings.task, emr_rescalers(matrices)[tasks.index(settings.task)].item())


def emr_tasks(matrices: Matrices) -> Iterator[tuple[str, Tensor]]:
    """Recover every task's own update; all layers are read once before the first is returned.

    Args:
        matrices: every layer's X.

    Yields:
        Each layer's name, and (K, p, q): l_k M_k tau.
    """
    rescalers = emr_rescalers(matrices)
    for layer, X in matrices():
        tau, agree = _unified(layer.weighted(X))
        yield layer.name, agree * tau * rescalers.to(X)[:, None, None]


def emr_rescalers(matrices: Matrices) -> Tensor:
    """Return the rescalers of all tasks.

    Args:
        matrices: every layer's X.

    Returns:
        (K,) float64: l_k, and 1 for a task without any update.
    """
    own: Tensor | float = 0.0
    unified: Tensor | float = 0.0
    for layer, X in matrices():
        size = X[0].numel()
        for block in row_blocks(X):
            mine, joint = _sums(layer.weighted(block))
            own, unified = own + mine / size, unified + joint / size
        del X, block  # before the next layer is made
    own, unified = torch.as_tensor(own), torch.as_tensor(unified)
    return torch.where(unified > 0, own / unified, 1)


def _unified(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return tau (p, q) and M (K, p, q) of X (K, p, q)."""
    sign = torch.where(X.mean(0) > 0, 1, -1).to(X)
    aligned = X * sign
    return aligned.amax(0).clamp_min(0) * sign, aligned > 0


def _sums(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return the K sums of |X_k|, and those of |M_k tau|."""
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
