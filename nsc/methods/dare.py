"""DARE: drop entries at random and enlarge the others, then add the updates, or run TIES on them.

    X'_k = keep_k X_k / (1 - p),   keep ~ Bernoulli(1 - p) for each entry of each task        D = sum_k w_k X'_k

Source: https://arxiv.org/abs/2311.03099. The mask of a task in a layer is drawn from the seed and their two names
alone: it is the same in every process and on every device, whatever the order of tasks and the other tasks are.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.errors import NSCError
from nsc.methods.protocol import LayerInfo, Matrices, Method
from nsc.methods.ties import TiesRules, TiesSettings, TiesStatistics, model_wide, statistics, ties, trimmed

RESCALES = ("inverse", "l1", "none")


@dataclass(frozen=True)
class DareSettings:
    """Settings of ``dare``.

    Attributes:
        drop: p, the fraction of entries that is dropped.
        seed: of the masks.
        rescale: what kept entries are multiplied by: "inverse", 1/(1 - p) as in the paper; "l1", what gives each task's
            matrix its L1 norm back, as in mergekit; "none", 1.
    """

    drop: float = 0.9
    seed: int = 0
    rescale: str = "inverse"

    def __post_init__(self) -> None:
        require_fraction("drop", self.drop, below_one=True)
        require_choice("rescale", self.rescale, RESCALES)


@dataclass(frozen=True)
class DareTiesSettings(TiesSettings):
    """Settings of ``dare-ties``: those of TIES, by default without trimming, and those of DARE.

    Entries are dropped first and then trimmed; the preset nsc trims first. In peft and mergekit dropping replaces
    trimming, so density must be 1. mergekit's preset joins by a sum here, and keeps L1 norms.

    Attributes:
        density: q, the fraction of entries that TIES keeps.
        drop: p, the fraction of entries that is dropped.
        seed: of the masks.
        rescale: see ``DareSettings``; None: the preset decides.
    """

    density: float = 1.0
    drop: float = 0.9
    seed: int = 0
    rescale: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_fraction("drop", self.drop, below_one=True)
        require_choice("rescale", self.rescale, (None, *RESCALES))
        if self.density < 1 and self.preset in ("peft", "mergekit"):
            raise NSCError(f"in dare-ties of {self.preset} dropping replaces trimming: leave density out, or give 1")

    @property
    def rules(self) -> TiesRules:
        """The rules of TIES; mergekit's preset joins by a sum."""
        rules = super().rules
        return rules._replace(agg="sum") if self.preset == "mergekit" and self.agg is None else rules

    @property
    def dare(self) -> DareSettings:
        """The settings of DARE among these."""
        return DareSettings(self.drop, self.seed, self.rescale or ("l1" if self.preset == "mergekit" else "inverse"))


def dare(X: Tensor, settings: DareSettings, layer: LayerInfo) -> Tensor:
    """Merge one layer by DARE: the weighted sum of what is kept.

    Args:
        X: (K, p, q), without weights.
        settings: the settings.
        layer: the tasks, their weights and the caller's mask, if any.

    Returns:
        (p, q).

    Raises:
        NSCError: if the caller's mask has another shape than ``X``.

    Source: https://arxiv.org/abs/2311.03099
    """
    total = torch.zeros_like(X[0])
    for k, weight in enumerate(layer.weights.tolist()):
        total += _kept(X[k], k, settings, layer).mul_(weight)
    return total


def dare_ties(X: Tensor, settings: DareTiesSettings | TiesStatistics, layer: LayerInfo) -> Tensor:
    """Merge one layer by TIES of what DARE keeps.

    Args:
        X: (K, p, q), without weights.
        settings: the settings; or statistics, as ``survey`` returns them, where entries of all layers compete.
        layer: the tasks, their weights and the caller's mask, if any.

    Returns:
        (p, q).

    Raises:
        NSCError: if the caller's mask has another shape than ``X``.

    Source: https://arxiv.org/abs/2311.03099
    """
    chosen = settings.settings if isinstance(settings, TiesStatistics) else settings
    assert isinstance(chosen, DareTiesSettings)
    if not chosen.rules.trims_first:
        return ties(dropped(X, chosen.dare, layer), settings, layer)
    known = settings if isinstance(settings, TiesStatistics) else statistics(lambda: iter([(layer, X)]), settings)
    return ties(dropped(trimmed(X, known.thresholds), chosen.dare, layer), replace(chosen, density=1.0), layer)


def dropped(X: Tensor, settings: DareSettings, layer: LayerInfo) -> Tensor:
    """Drop entries of every task and rescale the others.

    Args:
        X: (K, p, q).
        settings: the settings.
        layer: the tasks and the caller's mask, if any.

    Returns:
        (K, p, q): X', a new tensor.

    Raises:
        NSCError: if the caller's mask has another shape than ``X``.
    """
    kept = torch.empty_like(X)
    for k, x in enumerate(X):
        kept[k] = _kept(x, k, settings, layer)
    return kept


def keep_mask(settings: DareSettings, layer: str, task: str, shape: tuple[int, ...]) -> Tensor:
    """Draw what is kept of one task in one layer.

    Args:
        settings: drop and seed.
        layer: the layer's name.
        task: the task's name.
        shape: of the mask.

    Returns:
        bool of ``shape`` on the CPU, True where an entry is kept.
    """
    name = json.dumps([settings.seed, layer, task]).encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1)
    return torch.rand(shape, generator=generator) >= settings.drop


def survey(matrices: Matrices, settings: DareTiesSettings) -> TiesSettings | TiesStatistics:
    """Look at all layers as TIES will see them, where entries of the whole model compete.

    Args:
        matrices: every layer's X.
        settings: the settings.

    Returns:
        The statistics of the whole model, or ``settings`` where each matrix is on its own.
    """
    if not model_wide(matrices, settings):
        return settings
    if settings.rules.trims_first:
        return statistics(matrices, settings)

    def without_dropped(item: tuple[LayerInfo, Tensor]) -> tuple[LayerInfo, Tensor]:
        return item[0], dropped(item[1], settings.dare, item[0])

    # map, for a generator would hold a layer while the next one is made
    return statistics(lambda: map(without_dropped, matrices()), settings)


def _kept(x: Tensor, k: int, settings: DareSettings, layer: LayerInfo) -> Tensor:
    """Return X'_k (p, q), a new tensor."""
    if layer.keep is not None and layer.keep.shape != (len(layer.tasks), *x.shape):
        expected = (len(layer.tasks), *x.shape)
        raise NSCError(f"the mask of {layer.name} must have shape {expected}, not {tuple(layer.keep.shape)}")
    if layer.keep is None and settings.drop == 0:
        return x.clone()
    keep = keep_mask(settings, layer.name, layer.tasks[k], tuple(x.shape)) if layer.keep is None else layer.keep[k]
    kept = torch.where(keep.to(x.device), x, 0)
    if settings.rescale == "l1":
        left = kept.abs().sum()
        return kept.mul_(torch.where(left > 0, x.abs().sum() / left, 1))
    return kept.div_(1 - settings.drop) if settings.rescale == "inverse" else kept


METHODS = {
    "dare": Method(
        "drop entries at random, enlarge the others, add",
        "https://arxiv.org/abs/2311.03099",
        DareSettings,
        on_matrices=dare,
        spaces=("full", "core", "knots", "ctm"),
        whole_layers=True,
        takes_masks=True,
    ),
    "dare-ties": Method(
        "drop entries at random, enlarge the others, join them by TIES",
        "https://arxiv.org/abs/2311.03099",
        DareTiesSettings,
        on_matrices=dare_ties,
        survey=survey,
        spaces=("full", "core", "knots", "ctm"),
        whole_layers=True,
        takes_masks=True,
    ),
}
