"""TIES: trim every update to its largest entries, elect a sign for each entry, join the entries that agree with it.

    X'_k = X_k where |X_k| is among the share q of largest, else 0        Y_k = w_k X'_k
    g = sign sum_k Y_k                                                    D = sum_k Y_k [Y_k g > 0] / max(#, 1)

Source: https://arxiv.org/abs/2306.01708. Its implementations differ; each preset does what one of them does:

| preset   | kept of d       | over   | votes        | no majority               | divided by        |
|----------|-----------------|--------|--------------|---------------------------|-------------------|
| default  | int(d q) + 1    | matrix | sum of Y     | the sign of most entries  | agreeing tasks    |
| original | int(d q) + 1    | model  | sum of Y     | the sign of most entries  | agreeing tasks    |
| nsc      | round(d q) or 1 | matrix | signs of Y   | +                         | 1, it is a sum    |
| peft     | int(d q)        | matrix | sum of X'    | +                         | agreeing tasks    |
| mergekit | int(d q)        | matrix | sum of Y     | +                         | agreeing weights  |

Entries as large as the last one kept are kept as well; where an original picks some of them, its pick is arbitrary.

The election "normmass" of KnOTS (https://arxiv.org/abs/2410.19735) counts shares of squared norms, so that no task
outvotes the others by its size:  g = sign sum_k sign(Y_k) Y_k^2 / |Y_k|^2,  |Y_k| over all entries that compete.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.errors import NSCError
from nsc.methods.kth_largest import kth_largest
from nsc.methods.protocol import LayerInfo, Matrices, Method
from nsc.methods.row_blocks import by_rows, streamed


class TiesRules(NamedTuple):
    """How one implementation of TIES trims, elects and joins: a row of the table above.

    Attributes:
        count_kept: (number of entries d, density q) -> how many are kept.
        scope: which entries compete, those of a "matrix" or of the "model"; None: the model in the KnOTS space, else a
            matrix.
        elect: see ``TiesSettings``.
        no_majority: whose sign an entry without majority gets, the "majority" of all entries or "positive".
        votes: what is elected by, "weighted" Y or "bare" X'.
        agg: see ``TiesSettings``.
        divisor: what a mean divides by, the number of agreeing "tasks" or the sum of their "weights".
        trims_first: whether DARE-TIES trims before it drops entries.
    """

    count_kept: Callable[[int, float], int]
    scope: str | None = "matrix"
    elect: str = "mass"
    no_majority: str = "positive"
    votes: str = "weighted"
    agg: str = "mean"
    divisor: str = "tasks"
    trims_first: bool = False


def _floor_plus_one(d: int, q: float) -> int:
    return int(d * q) + 1


def _floor(d: int, q: float) -> int:
    return int(d * q)


def _nearest(d: int, q: float) -> int:
    return max(1, round(d * q))


PRESETS = {
    "default": TiesRules(_floor_plus_one, scope=None, no_majority="majority"),
    "original": TiesRules(_floor_plus_one, scope="model", no_majority="majority"),
    "nsc": TiesRules(_nearest, elect="count", agg="sum", trims_first=True),
    "peft": TiesRules(_floor, votes="bare"),
    "mergekit": TiesRules(_floor, divisor="weights"),
}


@dataclass(frozen=True)
class TiesSettings:
    """Settings of ``ties``; where one is None, the preset decides.

    Attributes:
        preset: a row of the table.
        density: q, the fraction of entries that is kept; 1 keeps all.
        scope: "matrix", or "model": the entries of all layers compete.
        elect: sign by "mass", the sum of values; by "normmass", the sum of each task's shares of its squared norm; by
            "count", the sum of signs; or "none": every kept entry is joined.
        agg: "mean", "sum" or "max" of the entries that agree.
    """

    preset: str = "default"
    density: float = 0.2
    scope: str | None = None
    elect: str | None = None
    agg: str | None = None

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, PRESETS)
        require_fraction("density", self.density, above_zero=True)
        require_choice("scope", self.scope, (None, "matrix", "model"))
        require_choice("elect", self.elect, (None, "mass", "normmass", "count", "none"))
        require_choice("agg", self.agg, (None, "mean", "sum", "max"))
        if self.rules.elect == "none" and self.rules.agg == "max":
            raise NSCError("without an election there is no sign for agg max: give another elect, or agg mean or sum")

    @property
    def rules(self) -> TiesRules:
        """The preset's rules, overridden by the settings that are given."""
        chosen = {key: getattr(self, key) for key in ("scope", "elect", "agg") if getattr(self, key) is not None}
        return PRESETS[self.preset]._replace(**chosen)


@dataclass(frozen=True)
class TiesStatistics:
    """Settings of TIES with what must be known of all entries that compete.

    Attributes:
        settings: the settings.
        thresholds: (K,), the least magnitude of each task that is kept; None keeps all.
        majority: (), the sign of most elections: 1, -1 or 0.
        norms: (K, 1, 1) float64, of what votes, for the election "normmass"; None for others.
    """

    settings: TiesSettings
    thresholds: Tensor | None
    majority: Tensor
    norms: Tensor | None = None


def ties(X: Tensor, settings: TiesSettings | TiesStatistics, layer: LayerInfo) -> Tensor:
    """Merge one layer by TIES.

    Args:
        X: (K, p, q), without weights.
        settings: the settings; or statistics, as ``survey`` returns them, where entries of all layers compete.
        layer: the tasks and their weights.

    Returns:
        (p, q).

    Source: https://arxiv.org/abs/2306.01708
    """
    known = settings if isinstance(settings, TiesStatistics) else statistics(lambda: iter([(layer, X)]), settings)
    return by_rows(partial(_elect_and_join, known=known, layer=layer), X)


def survey(matrices: Matrices, settings: TiesSettings) -> TiesSettings | TiesStatistics:
    """Look at all layers, where entries of the whole model compete.

    Args:
        matrices: every layer's X.
        settings: the settings.

    Returns:
        The statistics of the whole model, or ``settings`` where each matrix is on its own.
    """
    return statistics(matrices, settings) if model_wide(matrices, settings) else settings


def model_wide(matrices: Matrices, settings: TiesSettings) -> bool:
    """Tell whether the entries of all layers compete.

    Args:
        matrices: every layer's X, of which the first is looked at: all are in one space.
        settings: the settings.

    Returns:
        True for the scope "model", and for no scope in the KnOTS space.
    """
    scope = settings.rules.scope
    return scope == "model" or (scope is None and any(layer.space == "knots" for layer, _ in islice(matrices(), 1)))


def statistics(matrices: Matrices, settings: TiesSettings) -> TiesStatistics:
    """Find thresholds, norms and the majority of all entries of these layers, in at most four passes over them.

    Args:
        matrices: the X of every layer whose entries compete.
        settings: the settings.

    Returns:
        The statistics, with a majority of 1 where none is needed.
    """
    rules, thresholds = settings.rules, None
    if settings.density < 1:
        thresholds = kth_largest(
            lambda: map(itemgetter(1), streamed(matrices)), lambda d: rules.count_kept(d, settings.density)
        )
    norms = _norms(matrices, thresholds, rules) if rules.elect == "normmass" else None
    if rules.no_majority == "positive" or rules.elect == "none":
        return TiesStatistics(settings, thresholds, torch.tensor(1.0), norms)
    total: Tensor | float = 0.0
    for layer, X in streamed(matrices):
        signs = _elected(_weighted_and_votes(X, thresholds, rules, layer)[1], rules.elect, norms)
        total = total + signs.sum(dtype=torch.float64)
        del X  # before the next layer is made
    return TiesStatistics(settings, thresholds, torch.as_tensor(total).sign(), norms)


def trimmed(X: Tensor, thresholds: Tensor | None) -> Tensor:
    """Set entries below each task's threshold to zero.

    Args:
        X: (K, p, q).
        thresholds: (K,), the least magnitude that is kept; None keeps all.

    Returns:
        (K, p, q): X'.
    """
    return X if thresholds is None else X * (X.abs() >= thresholds[:, None, None])


def _elect_and_join(X: Tensor, known: TiesStatistics, layer: LayerInfo) -> Tensor:
    rules = known.settings.rules
    weighted, votes = _weighted_and_votes(X, known.thresholds, rules, layer)
    if rules.elect == "none":
        agree = votes != 0
    else:
        sign = _elected(votes, rules.elect, known.norms)
        sign = torch.where(sign == 0, known.majority.to(sign), sign)
        agree = votes * torch.where(sign > 0, 1, -1).to(sign) > 0  # without any majority too: -
    chosen = weighted * agree
    if rules.agg == "max":
        return chosen.abs().amax(0) * sign
    if rules.agg == "sum":
        return chosen.sum(0)
    parts = (layer.weighted(agree.to(X)) if rules.divisor == "weights" else agree).sum(0)
    return chosen.sum(0) / parts.masked_fill(parts == 0, 1)


def _weighted_and_votes(
    X: Tensor, thresholds: Tensor | None, rules: TiesRules, layer: LayerInfo
) -> tuple[Tensor, Tensor]:
    """Return Y and what votes, both (K, p, q)."""
    bare = trimmed(X, thresholds)
    weighted = layer.weighted(bare)
    return weighted, bare if rules.votes == "bare" else weighted


def _norms(matrices: Matrices, thresholds: Tensor | None, rules: TiesRules) -> Tensor:
    """Return the norm (K, 1, 1) of what each task votes in all these layers, float64."""
    squares: Tensor | float = 0.0
    for layer, X in streamed(matrices):
        votes = _weighted_and_votes(X, thresholds, rules, layer)[1]
        squares = squares + votes.double().square().sum((1, 2), keepdim=True)
        del X, votes  # before the next layer is made
    return torch.as_tensor(squares).sqrt()


def _elected(votes: Tensor, elect: str, norms: Tensor | None) -> Tensor:
    """Return the sign of each election, 0 where nothing has a majority."""
    if norms is not None:
        shares = (votes / norms.clamp_min(torch.finfo(norms.dtype).tiny)).square()
        return (votes.sign() * shares).sum(0).sign().to(votes)
    return (votes.sign() if elect == "count" else votes).sum(0).sign()


METHODS = {
    "ties": Method(
        "trim to the largest entries, elect their signs, join those that agree",
        "https://arxiv.org/abs/2306.01708",
        TiesSettings,
        on_matrices=ties,
        survey=survey,
        spaces=("full", "core", "knots", "ctm"),
        whole_layers=True,
    ),
}
