"""Regression merges: every B_k stays, and A' is chosen by least squares on the inputs x of the layer.

    D = [B_1 .. B_K] A'        A'_k = A_k N_k M^-1        E_k: the mean over task k's rows, in the model of expert k

regmean            N_k = E_k[x x'], off-diagonals times a, + l/K I       M = sum_k N_k
regmean++          the same, with x from behind the merge of all blocks below
iteris             N_k = c_k (E_k[x x~'] + a |.| I)                      M = sum_k c_k (E_k[x~ x~'] + a |.| I)
featcal            N_k = C_k + l p t I,  C_k = E_k[x x'] / |E_k[x x']|   M = sum_k C_k + l I
ssr                A' = Q (G + l I)^-1 A,  G = sum_k E_k[u u'],  u = A x;  Q: of E_k[u u'] the rows of adapter k
zero-interference  A'_k = A_k A_k' times the rows k of (A A')^-1 A, so that D A_k' = D_k A_k' for all k;  no data

A is the stack of all A_k. ssr and zero-interference work on orthonormal rows of each A_k, so that the ridge, too, is
the same however an update is factored. Ridges l are relative to the mean of the diagonal that they are added to, but
for featcal, whose matrices have norm 1. No merge depends on the weights of the base, nor on more of adapter k than D_k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsc.checks import require_fraction
from nsc.errors import NSCError
from nsc.methods.equations import Equations, Gram, solve
from nsc.methods.inputs import InputMoments, Inputs
from nsc.methods.protocol import LowRank, Method, Updates
from nsc.methods.reconstruction import observed, orthonormal, stacked


@dataclass(frozen=True)
class ZeroInterferenceSettings:
    """Settings of ``zero-interference``.

    Attributes:
        ridge: relative to the mean diagonal of A A'; needed only where adapters share directions.
    """

    ridge: float = 0.0

    def __post_init__(self) -> None:
        _require_positive("ridge", self.ridge)


@dataclass(frozen=True)
class SsrSettings:
    """Settings of ``ssr``.

    Attributes:
        ridge: relative to the mean diagonal of G.
    """

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        _require_positive("ridge", self.ridge)


@dataclass(frozen=True)
class RegMeanSettings:
    """Settings of ``regmean`` and ``regmean++``.

    Attributes:
        off_diagonal: what the off-diagonals of E_k[x x'] are multiplied by.
        ridge: relative to the mean diagonal of M; towards the mean of the updates.
    """

    off_diagonal: float = 0.9
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        require_fraction("off_diagonal", self.off_diagonal)
        _require_positive("ridge", self.ridge)


@dataclass(frozen=True)
class IterisSettings:
    """Settings of ``iteris``.

    Attributes:
        a: what is added to the diagonal of each matrix, times the matrix's norm.
        rounds: how often inputs are collected anew, in the merge of the round before.
    """

    a: float = 1e-4
    rounds: int = 6

    def __post_init__(self) -> None:
        _require_positive("a", self.a)
        if self.rounds < 1:
            raise NSCError(f"rounds must be at least 1, not {self.rounds}")


@dataclass(frozen=True)
class FeatCalSettings:
    """Settings of ``featcal``.

    Attributes:
        ridge: l, beside matrices of norm 1.
        p: l p t is the pull towards each update.
        t: the same.
    """

    ridge: float = 0.05
    p: float = 2.2
    t: float = 0.3

    def __post_init__(self) -> None:
        for name in ("ridge", "p", "t"):
            _require_positive(name, getattr(self, name))


def ssr(updates: Updates, settings: SsrSettings) -> Equations:
    """Fit the experts' outputs by least squares on u = A x.

    Args:
        updates: one layer's K updates, with ``SpanMoments``.
        settings: the ridge.

    Returns:
        Equations as wide as the span of all A_k.

    Source: https://arxiv.org/abs/2606.10617
    """
    seen = observed(updates)
    matrix = Gram.of(seen.second.sum(0)).ridged(settings.ridge)
    return Equations(torch.cat(updates.weighted(), 1), seen.cross.sum(0), matrix, seen.basis)


def regmean(updates: Updates, settings: RegMeanSettings) -> Equations:
    """Fit the experts' outputs by least squares on the inputs.

    Args:
        updates: one layer's K updates, with ``InputMoments``.
        settings: off-diagonals and ridge.

    Returns:
        Equations as wide as the layer's inputs.

    Source: https://arxiv.org/abs/2212.09849
    """
    moments, A, a = _of_inputs(updates), stacked(updates), settings.off_diagonal
    matrix = moments.second.times(a).plus((1 - a) * moments.second.diagonal)
    ranks = torch.tensor(updates.ranks).to(A.device)
    diagonals = moments.diagonals.repeat_interleave(ranks, 0)  # (R, d)
    pull = settings.ridge * matrix.mean_diagonal / len(ranks)
    left = a * moments.cross + (1 - a) * A * diagonals + pull * A
    return Equations(torch.cat(updates.weighted(), 1), left, matrix.ridged(settings.ridge))


def iteris(updates: Updates, settings: IterisSettings) -> Equations:
    """Fit the experts' outputs by least squares on the inputs that the merge of the round before gives.

    Args:
        updates: one layer's K updates, with ``InputMoments``.
        settings: what is added to diagonals.

    Returns:
        Equations as wide as the layer's inputs.

    Source: https://arxiv.org/abs/2411.15231
    """
    moments, A = _of_inputs(updates), stacked(updates)
    crossing, merged = (settings.a * moments.norms).unbind(1)
    pull = crossing.repeat_interleave(torch.tensor(updates.ranks).to(A.device))[:, None]
    return Equations(torch.cat(updates.weighted(), 1), moments.cross + pull * A, moments.second.plus(merged.sum()))


def featcal(updates: Updates, settings: FeatCalSettings) -> Equations:
    """Fit the experts' outputs on inputs of equal norm, pulled towards a multiple of each update.

    Args:
        updates: one layer's K updates, with ``InputMoments`` of norm 1.
        settings: l, p and t.

    Returns:
        Equations as wide as the layer's inputs.

    Source: https://arxiv.org/abs/2605.13030
    """
    moments, A = _of_inputs(updates), stacked(updates)
    left = moments.cross + settings.ridge * settings.p * settings.t * A
    return Equations(torch.cat(updates.weighted(), 1), left, moments.second.plus(settings.ridge))


def zero_interference(updates: Updates, settings: ZeroInterferenceSettings) -> LowRank:
    """Let every update alone act on the rows of its own A_k, without any data.

    Adapters without this layer are left out.

    Args:
        updates: one layer's K updates.
        settings: the ridge.

    Returns:
        Factors at rank sum_k r_k.

    Raises:
        NSCError: if adapters share directions and there is no ridge.

    Source: https://arxiv.org/abs/2503.08099
    """
    whiten, unwhiten, _ = orthonormal(updates)
    rows = whiten @ stacked(updates)
    B = torch.cat(updates.weighted(), 1)
    matrix = Gram.of(rows @ rows.mT).ridged(settings.ridge)
    return LowRank(B, solve(Equations(B, unwhiten, matrix, rows), updates.name).A)


def _of_inputs(updates: Updates) -> InputMoments:
    assert isinstance(updates.moments, InputMoments)
    return updates.moments


def _require_positive(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise NSCError(f"{name} must be 0 or more, not {value}")


METHODS = {
    "zero-interference": Method(
        "every update alone acts on the rows of its own A, without data",
        "https://arxiv.org/abs/2503.08099",
        ZeroInterferenceSettings,
        on_factors=zero_interference,
        regression=True,
    ),
    "ssr": Method(
        "the experts' updates of rows fitted by least squares in the span of all A",
        "https://arxiv.org/abs/2606.10617",
        SsrSettings,
        equations=ssr,
        inputs=Inputs("u"),
        regression=True,
    ),
    "regmean": Method(
        "the experts' updates of rows fitted by least squares on each layer's inputs",
        "https://arxiv.org/abs/2212.09849",
        RegMeanSettings,
        equations=regmean,
        inputs=Inputs("x"),
        regression=True,
    ),
    "regmean++": Method(
        "the same block by block, on the inputs that the merge below gives (measured worse)",
        "https://arxiv.org/abs/2508.03121",
        RegMeanSettings,
        equations=regmean,
        inputs=Inputs("x", run="below"),
        regression=True,
    ),
    "iteris": Method(
        "the same in rounds, on the inputs that the merge so far gives (measured worse)",
        "https://arxiv.org/abs/2411.15231",
        IterisSettings,
        equations=iteris,
        inputs=Inputs("x", run="merge", unit="output"),
        regression=True,
    ),
    "featcal": Method(
        "the same on inputs of equal norm, pulled towards a multiple of the sum",
        "https://arxiv.org/abs/2605.13030",
        FeatCalSettings,
        equations=featcal,
        inputs=Inputs("x", unit="norm"),
        regression=True,
    ),
}
