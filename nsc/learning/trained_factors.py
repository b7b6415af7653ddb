"""One adapter whose factors themselves are optimised: one long vector theta, and its views as A and B of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nsc.bases.structure import replace_module
from nsc_kernels.trainable import TrainableLoRALinear

Factors = Mapping[str, tuple[Tensor, Tensor]]  # layer -> A (r, d), B (m, r)


class TrainedFactors:
    """The mapping from theta to the factors; it stands where ``Coefficients`` stand for other granularities.

    Args:
        factors: layer -> A (r, d) and B (m, r) at which theta starts.
        dtype: dtype of theta.
        device: where theta lies.

    Attributes:
        start: theta at the start, (P,).
    """

    def __init__(self, factors: Factors, dtype: torch.dtype, device: torch.device) -> None:
        self.shapes = {name: (A.shape, B.shape) for name, (A, B) in factors.items()}
        self.start = torch.cat([x.to(device, dtype).flatten() for pair in factors.values() for x in pair])

    def __call__(self, theta: Tensor) -> Tensor:
        """Return theta itself, as what is compared, bounded and written.

        Args:
            theta: (P,).

        Returns:
            ``theta``.
        """
        return theta

    def split(self, theta: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the factors in theta.

        Args:
            theta: (P,).

        Returns:
            Layer -> A (r, d) and B (m, r), views of ``theta``.
        """
        sizes = [shape.numel() for pair in self.shapes.values() for shape in pair]
        parts = iter(theta.split(sizes))
        return {name: (next(parts).view(a), next(parts).view(b)) for name, (a, b) in self.shapes.items()}

    def by_row(self, each: Tensor) -> Tensor:
        """Return a property of theta as it is.

        Args:
            each: (P,) bool.

        Returns:
            ``each``.
        """
        return each

    def box(self, reach: Tensor) -> tuple[Tensor, Tensor]:
        """Return no bounds.

        Args:
            reach: of theta's shape.

        Returns:
            Minus and plus infinity, of theta's shape.
        """
        return torch.full_like(reach, -torch.inf), torch.full_like(reach, torch.inf)

    def draw_back(self, theta: Tensor, reach: Tensor) -> None:
        """Leave theta as it is.

        Args:
            theta: (P,).
            reach: of theta's shape.
        """

    def stopped(self, theta: Tensor, reach: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
        """Return that no bound holds anything.

        Args:
            theta: at the end.
            reach: of theta's shape.
            lower: of theta's shape.
            upper: of theta's shape.

        Returns:
            (P,) bool, all False.
        """
        return torch.zeros_like(theta, dtype=torch.bool)


@contextmanager
def trained_layers(model: nn.Module, factors: Factors) -> Iterator[dict[str, TrainableLoRALinear]]:
    """Put one adapter into the model, whose factors can be replaced, and restore the model afterwards.

    Args:
        model: the body.
        factors: layer -> A (r, d) and B (m, r).

    Yields:
        Name -> layer that carries the adapter.
    """
    originals = {name: model.get_submodule(name) for name in factors}
    layers = {name: TrainableLoRALinear(originals[name], *pair) for name, pair in factors.items()}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield layers
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


def set_factors(layers: Mapping[str, TrainableLoRALinear], factors: Factors) -> None:
    """Point every layer at its factors; the next forward is differentiable in them.

    Args:
        layers: name -> layer that carries the adapter.
        factors: name -> A (r, d) and B (m, r).
    """
    for name, (A, B) in factors.items():
        layers[name].lora_A, layers[name].lora_B = A, B
