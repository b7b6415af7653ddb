"""Metrics by name, and what share of the adapter alone a score is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor

from nsc.errors import NSCError


@dataclass(frozen=True)
class Metric:
    """One metric of labelled rows.

    Attributes:
        higher: whether a higher value is better.
        of: function of logits (n, C) and labels (n,) that returns the metric; None where it is made of the loss.
    """

    higher: bool
    of: Callable[[Tensor, Tensor], float] | None = None


def normalised(score: float, alone: float, higher: bool) -> tuple[float, str]:
    """Return a score as a percentage of what the adapter alone reaches.

    Args:
        score: metric of the merged model.
        alone: metric of the adapter alone.
        higher: whether a higher value is better; if not, the share is the other way round.

    Returns:
        The percentage and an empty text; or NaN and the reason why there is none.
    """
    if not (math.isfinite(score) and math.isfinite(alone)):
        return math.nan, "the metric is not defined"
    whole, part = (alone, score) if higher else (score, alone)
    if alone <= 0 and higher:
        return math.nan, f"the adapter alone reaches {alone:.3g}"
    if not higher and score <= 0:
        return math.nan, f"the metric is {score:.3g}, of which nothing is a share"
    return part / whole * 100, ""


def torchmetrics_function(name: str) -> Any:
    """Return a function of ``torchmetrics.functional``, which is imported only where a metric needs it.

    Args:
        name: name of the function.

    Returns:
        The function.

    Raises:
        NSCError: if torchmetrics is not installed.
    """
    try:
        return getattr(import_module("torchmetrics.functional"), name)
    except ImportError as error:
        raise NSCError("metrics need torchmetrics: pip install 'nsc-merging[compare]'") from error


def _accuracy(logits: Tensor, labels: Tensor) -> float:
    of = torchmetrics_function("accuracy")
    return of(logits, labels.long(), task="multiclass", num_classes=logits.shape[1], average="micro").item()


def _of_numbers(name: str, logits: Tensor, labels: Tensor, **settings: Any) -> float:
    return torchmetrics_function(name)(logits[:, 0].double().cpu(), labels.double().cpu(), **settings).item()


METRICS = {
    "accuracy": Metric(True, _accuracy),
    "pearson": Metric(True, partial(_of_numbers, "pearson_corrcoef")),
    "spearman": Metric(True, partial(_of_numbers, "spearman_corrcoef")),
    "rmse": Metric(False, partial(_of_numbers, "mean_squared_error", squared=False)),
    "mae": Metric(False, partial(_of_numbers, "mean_absolute_error")),
    "loss": Metric(False),
    "perplexity": Metric(False),
}
OF_NUMBERS = ("pearson", "spearman", "rmse", "mae")
