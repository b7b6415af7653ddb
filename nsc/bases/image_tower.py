"""A frozen image tower, run once a sample: its features are kept, and the model takes them where it took pixels.

The store holds features in memory up to a budget and on disk beyond it. With the stand-in in the tower's place a step
runs no tower, whatever the image; the projector behind it stays in the model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from nsc.bases.structure import replace_module
from nsc.errors import NSCError


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
