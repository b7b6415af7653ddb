"""TIES: trim every update to its largest entries, elect a sign for each entry, join those that agree with it.

    X'_k = X_k where |X_k| is among the share q of largest, else 0        Y_k = w_k X'_k
    g = sign sum_k Y_k                                                    D = sum_k Y_k [Y_k g > 0] / max(#, 1)

Source: https://arxiv.org/abs/2306.01708. Its implementations differ, and the presets are what they do:

| preset   | kept of d       | over   | votes        | no majority               | divided by        |
|----------|-----------------|--------|--------------|---------------------------|-------------------|
| default  | int(d q) + 1    | matrix | sum of Y     | the sign of most entries  | agreeing tasks    |
| original | int(d q) + 1    | model  | sum of Y     | the sign of most entries  | agreeing tasks    |
| nsc      | round(d q) or 1 | matrix | signs of Y   | +                         | 1, it is a sum    |
| peft     | int(d q)        | matrix | sum of X'    | +                         | agreeing tasks    |
| mergekit | int(d q)        | matrix | sum of Y     | +                         | agreeing weights  |

Entries as large as the last one kept are kept as well; where an original picks some of them, its pick is arbitrary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.errors import NSCError
from nsc.methods.kth_largest import kth_largest
from nsc.methods.protocol import Matrices, Method, Place
from nsc.methods.row_blocks import by_rows, streamed


class Rules(NamedTuple):
    """A row of the table above.

    kept: how many of d are, for a density.  scope: matrix, model, or None: model in the knots space, else matrix.
    zero: whose sign an entry without majority gets, "majority" of all entries or "positive".  votes: of Y, "weighted",
    or of X', "bare".  shares: what a mean divides by, "tasks" or "weights".  trims_first: before entries are dropped,
    in DARE-TIES.
    """

    kept: Callable[[int, float], int]
    scope: str | None = "matrix"
    elect: str = "mass"
    zero: str = "positive"
    votes: str = "weighted"
    agg: str = "mean"
    shares: str = "tasks"
    trims_first: bool = False


def _and_ties(d: int, q: float) -> int:
    return int(d * q) + 1


def _floor(d: int, q: float) -> int:
    return int(d * q)


def _nearest(d: int, q: float) -> int:
    return max(1, round(d * q))


PRESETS = {
    "default": Rules(_and_ties, scope=None, zero="majority"),
    "original": Rules(_and_ties, scope="model", zero="majority"),
    "nsc": Rules(_nearest, elect="count", agg="sum", trims_first=True),
    "peft": Rules(_floor, votes="bare"),
    "mergekit": Rules(_floor, shares="weights"),
}


@dataclass(frozen=True)
class TiesSettings:
    """preset: of the table; None elsewhere is what it says.  density: q, the share that is kept, 1 for all.

    scope: "matrix", or "model": entries of all layers compete.  elect: "mass", the sum of values, "count", of signs, or
    "none": every kept entry is joined.  agg: "mean", "sum" or "max" of the entries that agree.
    """

    preset: str = "default"
    density: float = 0.2
    scope: str | None = None
    elect: str | None = None
    agg: str | None = None

    def __post_init__(self) -> None:
        require_choice("preset", self.preset, tuple(PRESETS))
        require_fraction("density", self.density, above_zero=True)
        require_choice("scope", self.scope, (None, "matrix", "model"))
        require_choice("elect", self.elect, (None, "mass", "count", "none"))
        require_choice("agg", self.agg, (None, "mean", "sum", "max"))
        if self.rules.elect == "none" and self.rules.agg == "max":
            raise NSCError("without an election there is no sign for agg max: give another elect, or agg mean or sum")

    @property
    def rules(self) -> Rules:
        """The preset's, with what was chosen beside it."""
        chosen = {key: getattr(self, key) for key in ("scope", "elect", "agg") if getattr(self, key) is not None}
        return PRESETS[self.preset]._replace(**chosen)


@dataclass(frozen=True)
class Known:
    """Settings, and what must be known of all entries that compete.

    floors: (K,), the least magnitude that is kept, or None: all are.  majority: (), the sign of most elections.
    """

    settings: TiesSettings
    floors: Tensor | None
    majority: Tensor


def ties(X: Tensor, settings: TiesSettings | Known, place: Place) -> Tensor:
    """(p, q) of X (K, p, q) without weights."""
    known = settings if isinstance(settings, Known) else look(lambda: iter([(place, X)]), settings)
    return by_rows(partial(_joined, known=known, place=place), X)


def survey(matrices: Matrices, settings: TiesSettings) -> TiesSettings | Known:
    """With thresholds and majority of the whole model, where they are of the whole model."""
    return look(matrices, settings) if model_wide(matrices, settings) else settings


def model_wide(matrices: Matrices, settings: TiesSettings) -> bool:
    """Whether entries of all layers compete."""
    scope = settings.rules.scope
    return scope == "model" or (scope is None and any(place.space == "knots" for place, _ in _first(matrices)))


def look(matrices: Matrices, settings: TiesSettings) -> Known:
    """At most three passes over these layers."""
    rules, floors = settings.rules, None
    if settings.density < 1:
        floors = kth_largest(lambda: map(itemgetter(1), streamed(matrices)), lambda d: rules.kept(d, settings.density))
    if rules.zero == "positive" or rules.elect == "none":
        return Known(settings, floors, torch.tensor(1.0))
    total: Tensor | float = 0.0
    for place, X in streamed(matrices):
        total = total + _elected(_voting(X, floors, rules, place)[1], rules.elect).sum(dtype=torch.float64)
        del X
    return Known(settings, floors, torch.as_tensor(total).sign())


def trimmed(X: Tensor, floors: Tensor | None) -> Tensor:
    """X' of X (K, p, q)."""
    return X if floors is None else X * (X.abs() >= floors[:, None, None])


def _joined(X: Tensor, known: Known, place: Place) -> Tensor:
    rules = known.settings.rules
    weighted, votes = _voting(X, known.floors, rules, place)
    if rules.elect == "none":
        agree = votes != 0
    else:
        sign = _elected(votes, rules.elect)
        sign = torch.where(sign == 0, known.majority.to(sign), sign)
        agree = votes * torch.where(sign > 0, 1, -1).to(sign) > 0  # without any majority too: -
    chosen = weighted * agree
    if rules.agg == "max":
        return chosen.abs().amax(0) * sign
    if rules.agg == "sum":
        return chosen.sum(0)
    parts = (place.weighted(agree.to(X)) if rules.shares == "weights" else agree).sum(0)
    return chosen.sum(0) / parts.masked_fill(parts == 0, 1)


def _voting(X: Tensor, floors: Tensor | None, rules: Rules, place: Place) -> tuple[Tensor, Tensor]:
    """Y, and what votes (K, p, q)."""
    bare = trimmed(X, floors)
    weighted = place.weighted(bare)
    return weighted, bare if rules.votes == "bare" else weighted


def _elected(votes: Tensor, elect: str) -> Tensor:
    return (votes.sign() if elect == "count" else votes).sum(0).sign()


def _first(matrices: Matrices) -> Iterator[tuple[Place, Tensor]]:
    for found in matrices():
        yield found
        return


METHODS = {
    "ties": Method(
        "trim to the largest entries, elect their signs, join those that agree",
        "https://arxiv.org/abs/2306.01708",
        TiesSettings,
        on_matrices=ties,
        survey=survey,
        spaces=("full", "core", "knots"),
        whole_layers=True,
    ),
}
