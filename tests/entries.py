"""What the tests of the element-wise methods share: every one of them by name, ways to run it, inputs."""

import pytest
import torch
from torch import Tensor

from nsc.methods import LayerInfo
from nsc.methods.ties import PRESETS
from nsc.recipes.spec import read_recipe

METHODS_HERE = {
    **{f"ties {preset}": ("ties", dict(preset=preset, density=0.3)) for preset in PRESETS},
    "ties max": ("ties", dict(agg="max")),
    "dare": ("dare", dict(drop=0.6)),
    "dare l1": ("dare", dict(drop=0.6, rescale="l1")),
    **{f"dare-ties {preset}": ("dare-ties", dict(preset=preset, drop=0.6)) for preset in PRESETS},
    "dare-ties nsc trims": ("dare-ties", dict(preset="nsc", drop=0.6, density=0.4)),
    "dare-ties trims": ("dare-ties", dict(drop=0.2, density=0.4)),
    "emr": ("emr", {}),
    "fr": ("fr", {}),
    "fr aligned": ("fr", dict(align=True)),
}
every = pytest.mark.parametrize("name", METHODS_HERE)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
presets = pytest.mark.parametrize("preset", PRESETS)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_info(K: int, weights: list[float] | None = None, name: str = "layer", **more) -> LayerInfo:
    tasks = tuple("abcdefgh"[:K])
    return LayerInfo(name, tasks, torch.tensor(weights or [1.0] * K, dtype=torch.float64), 4, **more)


def run(method: str, X: Tensor, layer: LayerInfo | None = None, **settings) -> Tensor:
    """One layer alone."""
    recipe = read_recipe(method, **settings)
    layer = layer or layer_info(len(X))
    known = (
        recipe.method.survey(lambda: iter([(layer, X)]), recipe.settings) if recipe.method.survey else recipe.settings
    )
    return recipe.method.on_matrices(X, known, layer)


def run_all(method: str, layers: list[Tensor], space: str = "full", **settings) -> list[Tensor]:
    """Layers that may know of each other."""
    recipe = read_recipe(method, **settings)
    infos = [layer_info(len(X), name=f"l{i}", space=space) for i, X in enumerate(layers)]
    known = recipe.method.survey(lambda: zip(infos, layers, strict=True), recipe.settings)
    return [recipe.method.on_matrices(X, known, layer) for layer, X in zip(infos, layers, strict=True)]


def plain_ties(flat: Tensor, density: float, agg: str = "mean") -> Tensor:
    """As its authors wrote it: (K, d) -> (d,)."""
    d = flat.shape[1]
    if density < 1:
        smallest = flat.abs().sort(1).values[:, [d - int(d * density) - 1]]
        flat = flat * (flat.abs() >= smallest)
    sign = flat.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    chosen = flat * torch.where(sign > 0, flat > 0, flat < 0)
    total = {"sum": chosen.sum(0), "mean": chosen.sum(0), "max": chosen.abs().amax(0) * sign}[agg]
    return total / (chosen != 0).sum(0).clamp(min=1) if agg == "mean" else total


def layers_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    """Three layers, the last a bias, of unlike magnitudes; or integers full of ties and zero sums; or mostly zeros."""
    layers = [10.0**-i * noise(4, *shape, seed=i) for i, shape in enumerate([(9, 7), (5, 12), (1, 11)])]
    if kind != "noise":
        layers = [(3 * 10.0**i * X).round().clamp(-2, 2) for i, X in enumerate(layers)]
    if kind == "zeros":
        layers = [X * (noise(*X.shape, seed=9) > 1.5) for X in layers]
    return [X.to(dtype) for X in layers]
