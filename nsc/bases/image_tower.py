"""A frozen image tower, run once a sample: its features are kept, and the model takes them where it took pixels.

The store holds features in memory up to a budget and on disk beyond it. With the stand-in in the tower's place a step
runs no tower, whatever the image; the projector behind it stays in the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nsc.adapters.surgery import replace_module
from nsc.errors import NSCError

BUDGET = 2 * 2**30
Sample = TypeVar("Sample")


class FeatureStore(Generic[Sample]):
    """``store(sample)`` is ``compute(sample)`` on the CPU, computed once, to the bit.

    Samples are computed one at a time: which others are drawn with them, by which rank or after which resume, rounds
    nothing differently. budget: bytes kept in memory; the rest goes to a temporary folder that is removed by ``close``,
    at the end of a ``with``, or with the store.
    """

    def __init__(self, compute: Callable[[Sample], Tensor], budget: int = BUDGET) -> None:
        self.compute = compute
        self.budget = budget
        self.in_memory = 0  # bytes
        self._kept: dict[Sample, Tensor] = {}
        self._files: dict[Sample, Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __call__(self, sample: Sample) -> Tensor:
        """The features of one sample, of any shape and dtype. Not to be written to."""
        if sample in self._kept:
            return self._kept[sample]
        if sample in self._files:
            return load_file(self._files[sample])["features"]
        features = self.compute(sample).detach().to("cpu").contiguous()
        if self.in_memory + features.nbytes <= self.budget:
            self.in_memory += features.nbytes
            self._kept[sample] = features
        else:
            self._files[sample] = self._write(features)
        return features

    def close(self) -> None:
        """Forget everything, on disk too."""
        self._kept.clear()
        self._files.clear()
        self.in_memory = 0
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> FeatureStore[Sample]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _write(self, features: Tensor) -> Path:
        self._folder = self._folder or TemporaryDirectory(prefix="nsc-features-")
        file = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"features": features}, file)
        return file


def find_tower(model: nn.Module) -> str | None:
    """The outermost submodule that is a model of images in its own right, by what its forward takes first."""
    inner = ((name, module) for name, module in model.named_modules() if name)
    return next((name for name, module in inner if getattr(module, "main_input_name", None) == "pixel_values"), None)


class ImageTower:
    """The frozen image tower of a model that hands it ``pixel_values`` as they are and picks some hidden states.

    That is ``hidden_states[config.vision_feature_layer]``, one layer or several, as LLaVA does. Raises NSCError for a
    model without such a tower, and for LLaVA-NeXT's kind, whose images come in tiles, (b, tiles, 3, H, W).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self.layers = _tower_and_layers(model)
        self.tower = model.get_submodule(self.name)

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """(b, 3, H, W) -> (b, patches and class token, hidden): the hidden states that the model picks.

        Of several layers, side by side in the last dimension.
        """
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """The model takes ``features`` as its ``pixel_values`` and runs no tower; afterwards it is as it was."""
        replace_module(self.model, self.name, _StandIn(self.layers))
        try:
            yield
        finally:
            replace_module(self.model, self.name, self.tower)


class _StandIn(nn.Module):
    """Passes on features as the hidden states of the layers that they are from."""

    def __init__(self, layers: tuple[int, ...]) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, pixel_values: Tensor, **ignored: Any) -> SimpleNamespace:
        states = dict(zip(self.layers, pixel_values.chunk(len(self.layers), dim=-1), strict=True))
        return SimpleNamespace(hidden_states=states, pooler_output=None)


def _tower_and_layers(model: nn.Module) -> tuple[str, tuple[int, ...]]:
    name, config = find_tower(model), getattr(model, "config", None)
    layers = getattr(config, "vision_feature_layer", None)
    if name is None or layers is None:
        raise NSCError(
            f"{type(model).__name__} has no image tower whose hidden states it picks by vision_feature_layer;"
            " run it with its images instead"
        )
    if hasattr(config, "image_grid_pinpoints"):
        raise NSCError(f"{type(model).__name__} cuts images in tiles, whose number depends on the image; not supported")
    return name, (layers,) if isinstance(layers, int) else tuple(layers)
