"""DARE: drop entries at random and enlarge the others, then add the updates, or run TIES on them.

    X'_k = keep_k X_k / (1 - p),   keep ~ Bernoulli(1 - p) for each entry of each task        D = sum_k w_k X'_k

Source: https://arxiv.org/abs/2311.03099. The mask of a task in a layer is drawn from the seed and their two names
alone: the same in every process, order of tasks, choice of other tasks and on every device.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nsc.checks import require_choice, require_fraction
from nsc.errors import NSCError
from nsc.methods.protocol import Matrices, Method, Place
from nsc.methods.ties import Known, Rules, TiesSettings, look, model_wide, ties, trimmed

RESCALES = ("inverse", "l1", "none")


@dataclass(frozen=True)
class DareSettings:
    """drop: p.  seed: of the masks.  rescale: what kept entries are multiplied by.

    "inverse": 1/(1 - p), the paper's.  "l1": what gives each task's matrix its L1 norm back, mergekit's.  "none": 1.
    """

    drop: float = 0.9
    seed: int = 0
    rescale: str = "inverse"

    def __post_init__(self) -> None:
        require_fraction("drop", self.drop, below_one=True)
        require_choice("rescale", self.rescale, RESCALES)


@dataclass(frozen=True)
class DareTiesSettings(TiesSettings):
    """Those of TIES, by default without trimming, and those of DARE; rescale None is what the preset says.

    Entries are dropped first and trimmed then; the preset nsc trims first. In peft and mergekit dropping replaces
    trimming, so density must be 1; mergekit's joins by a sum here, and keeps L1 norms.
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
            raise NSCError(f"in {self.preset}'s dare-ties dropping replaces trimming: leave density out, or be it 1")

    @property
    def rules(self) -> Rules:
        """As of TIES."""
        rules = super().rules
        return rules._replace(agg="sum") if self.preset == "mergekit" and self.agg is None else rules

    @property
    def dare(self) -> DareSettings:
        """DARE's part."""
        return DareSettings(self.drop, self.seed, self.rescale or ("l1" if self.preset == "mergekit" else "inverse"))


def dare(X: Tensor, settings: DareSettings, place: Place) -> Tensor:
    """(p, q): the sum of what is kept of X (K, p, q)."""
    total = torch.zeros_like(X[0])
    for k, weight in enumerate(place.weights.tolist()):
        total += _kept(X[k], k, settings, place).mul_(weight)
    return total


def dare_ties(X: Tensor, settings: DareTiesSettings | Known, place: Place) -> Tensor:
    """(p, q): TIES of what is kept of X (K, p, q)."""
    chosen = settings.settings if isinstance(settings, Known) else settings
    assert isinstance(chosen, DareTiesSettings)
    if not chosen.rules.trims_first:
        return ties(dropped(X, chosen.dare, place), settings, place)
    known = settings if isinstance(settings, Known) else look(lambda: iter([(place, X)]), settings)
    return ties(dropped(trimmed(X, known.floors), chosen.dare, place), replace(chosen, density=1.0), place)


def dropped(X: Tensor, settings: DareSettings, place: Place) -> Tensor:
    """X' (K, p, q), new."""
    found = torch.empty_like(X)
    for k, x in enumerate(X):
        found[k] = _kept(x, k, settings, place)
    return found


def keep_mask(settings: DareSettings, layer: str, task: str, shape: tuple[int, ...]) -> Tensor:
    """bool of ``shape``, on the CPU: what is kept of this task in this layer."""
    name = json.dumps([settings.seed, layer, task]).encode()
    generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "big") >> 1)
    return torch.rand(shape, generator=generator) >= settings.drop


def survey(matrices: Matrices, settings: DareTiesSettings) -> TiesSettings | Known:
    """As of TIES, of what TIES sees."""
    if not model_wide(matrices, settings):
        return settings
    if settings.rules.trims_first:
        return look(matrices, settings)
    return look(lambda: map(lambda found: (found[0], dropped(found[1], settings.dare, found[0])), matrices()), settings)


def _kept(x: Tensor, k: int, settings: DareSettings, place: Place) -> Tensor:
    """X'_k (p, q), new."""
    if place.keep is not None and place.keep.shape != (len(place.tasks), *x.shape):
        expected = (len(place.tasks), *x.shape)
        raise NSCError(f"the mask of {place.name} must have shape {expected}, not {tuple(place.keep.shape)}")
    if place.keep is None and settings.drop == 0:
        return x.clone()
    keep = keep_mask(settings, place.name, place.tasks[k], tuple(x.shape)) if place.keep is None else place.keep[k]
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
        spaces=("full", "core", "knots"),
        whole_layers=True,
        takes_masks=True,
    ),
    "dare-ties": Method(
        "drop entries at random, enlarge the others, join them by TIES",
        "https://arxiv.org/abs/2311.03099",
        DareTiesSettings,
        on_matrices=dare_ties,
        survey=survey,
        spaces=("full", "core", "knots"),
        whole_layers=True,
        takes_masks=True,
    ),
}
