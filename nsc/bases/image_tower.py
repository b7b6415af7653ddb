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
    """Find the outermost submodule that is an image model in its own right, by what its forward takes first.

    Args:
        model: any model.

    Returns:
        Its name, or None.
    """
    inner = ((name, module) for name, module in model.named_modules() if name)
    return next((name for name, module in inner if getattr(module, "main_input_name", None) == "pixel_values"), None)


class ImageTower:
    """The frozen image tower of a model that takes ``pixel_values`` and picks hidden states of it, as LLaVA does.

    The picked states are ``hidden_states[config.vision_feature_layer]``, of one layer or several.

    Args:
        model: the whole model.

    Raises:
        NSCError: for a model without such a tower, and for LLaVA-NeXT and its kind, whose images come in tiles.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name, self.layers = _tower_and_layers(model)
        self.tower = model.get_submodule(self.name)

    @torch.no_grad()
    def features(self, pixel_values: Tensor) -> Tensor:
        """Run the tower.

        Args:
            pixel_values: (b, 3, H, W).

        Returns:
            (b, patches and class token, hidden): the hidden states that the model picks; those of several layers are
            concatenated in the last dimension.
        """
        states = self.tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        return torch.cat([states[layer] for layer in self.layers], dim=-1)

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Let the model take ``features`` as its ``pixel_values`` without running the tower.

        Yields:
            Nothing; the model is as it was afterwards.
        """
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
