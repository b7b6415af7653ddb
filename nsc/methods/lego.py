"""LoRA-LEGO: the ranks of all adapters are units; units are clustered, and each cluster is a rank of the merge.

    u = [A_k[i, :], w_k s_k B_k[:, i]]           clustered by k-means with each half divided by (its norm + 1e-8)
    [a_c, b_c] = mean of the cluster's u, times  (mean |u|_inf) / (|mean u|_inf + 1e-12)
    D = (r / C)^1/2 sum_c b_c a_c                with C clusters and r = max_k r_k

Source: https://arxiv.org/abs/2409.16167. No code by its authors is known; this is what the NSC paper's repository does,
except that where ranks differ it drops some units, and here all units of all adapters count.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from nsc.errors import NSCError
from nsc.methods.protocol import LowRank, Method, Updates


@dataclass(frozen=True)
class LegoSettings:
    """Settings of ``lego``.

    Attributes:
        clusters: C; None for r.
        iterations: of Lloyd's algorithm.
        seed: of the choice of units that clusters start from.
        initial: layer -> the indices of C units to start from instead, counted task by task.
        parameter_reweighting: whether centres are multiplied by (mean |u|_inf) / (|mean u|_inf + 1e-12).
        output_reweighting: whether the update is multiplied by (r / C)^1/2.
    """

    clusters: int | None = None
    iterations: int = 10
    seed: int = 0
    initial: dict[str, tuple[int, ...]] | None = None
    parameter_reweighting: bool = True
    output_reweighting: bool = True

    def __post_init__(self) -> None:
        for name in ("clusters", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise NSCError(f"{name} must be 1 or more, not {value}")


def lego(updates: Updates, settings: LegoSettings) -> LowRank:
    """Merge one layer by LoRA-LEGO.

    Adapters without this layer have no units. With as many clusters as units or more, each unit is a cluster. A cluster
    that loses all its units is left out.

    Args:
        updates: one layer's K updates.
        settings: the settings.

    Returns:
        The merged update, of rank C at most.

    Raises:
        NSCError: if the initial units are not C, or an index is none of a unit.

    Source: https://arxiv.org/abs/2409.16167
    """
    rank, d = max(updates.ranks), updates.shape[1]
    units = torch.cat([torch.cat([a.double(), b.mT], 1) for a, b in zip(updates.A, updates.weighted(), strict=True)])
    clusters = settings.clusters or rank
    labels = torch.arange(len(units), device=units.device)
    if clusters < len(units):
        halves = units.split([d, units.shape[1] - d], dim=1)
        features = torch.cat([h / (h.norm(dim=1, keepdim=True) + 1e-8) for h in halves], 1)
        labels = cluster(features, features[_initial(updates, settings, clusters)], settings.iterations)
    members = one_hot(labels).to(units).mT
    members = members[members.any(1)]
    members = members / members.sum(1, keepdim=True)
    centres = members @ units
    if settings.parameter_reweighting:
        largest = members @ units.abs().amax(1)
        centres = centres * (largest / (centres.abs().amax(1) + 1e-12))[:, None]
    gain = math.sqrt(rank / clusters) if settings.output_reweighting else 1.0
    return LowRank(gain * centres[:, d:].mT, centres[:, :d])


def cluster(X: Tensor, centres: Tensor, iterations: int) -> Tensor:
    """Cluster rows by Lloyd's k-means.

    Of equally near centres the first is taken; a centre that loses all its rows stays where it is.

    Args:
        X: (N, p).
        centres: (C, p), where the clusters start.
        iterations: of assignment and update, at least 1.

    Returns:
        (N,) int64: the cluster of each row at the last assignment.
    """
    for _ in range(iterations):
        labels = torch.cdist(X, centres, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
        members = one_hot(labels, len(centres)).to(X).mT
        count = members.sum(1, keepdim=True)
        centres = torch.where(count > 0, members @ X / count.clamp_min(1), centres)
    return labels


def _initial(updates: Updates, settings: LegoSettings, clusters: int) -> list[int]:
    """Choose the caller's units, or those with the smallest random numbers, whatever the order of tasks."""
    chosen = (settings.initial or {}).get(updates.name)
    if chosen is None:
        pairs = zip(updates.tasks, updates.ranks, strict=True)
        numbers = torch.cat([_random(settings.seed, updates.name, task, rank) for task, rank in pairs])
        return numbers.argsort()[:clusters].tolist()
    last = sum(updates.ranks) - 1
    if len(chosen) != clusters or not all(0 <= unit <= last for unit in chosen):
        raise NSCError(f"initial of {updates.name} must be {clusters} of its units 0 to {last}, not {list(chosen)}")
    return list(chosen)


def _random(seed: int, layer: str, task: str, count: int) -> Tensor:
    """Draw (count,) float64 uniform numbers, the same in every process and on every device."""
    digest = hashlib.sha256(repr((seed, layer, task)).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
    return torch.rand(count, dtype=torch.float64, generator=generator)


METHODS = {
    "lego": Method(
        "rank rows of all adapters, clustered; each cluster's mean is a rank of the merge",
        "https://arxiv.org/abs/2409.16167",
        LegoSettings,
        on_factors=lego,
    ),
}
