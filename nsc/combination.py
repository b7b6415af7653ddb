"""A recipe on a stack of adapters: each layer's merged update, made when asked for, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nsc.methods import LowRank, Place, Updates
from nsc.methods.spectral import isotropize
from nsc.recipes import Recipe
from nsc.spaces import SPACES, View
from nsc.stack import DenseStack, ModuleStack, Stack


class Combination:
    """What ``recipe`` makes of the adapters of ``stack``.

    coefficients: (M, K) learned before, as weights w_k of each layer, beside the recipe's own weights of tasks.  masks:
    layer -> (K, p, q) bool, what methods that drop entries at random are to keep.  device: where layers are worked on.
    """

    def __init__(
        self, stack: Stack, recipe: Recipe, coefficients: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.stack, self.recipe, self.device = stack, recipe, torch.device(device)
        self.masks = masks or {}
        tasks = torch.tensor([float(recipe.weights.get(task, 1)) for task in stack.tasks], dtype=torch.float64)
        rows = tasks.expand(len(stack.names), -1)
        self.weights = rows if coefficients is None else rows * coefficients.double().cpu()

    @property
    def names(self) -> list[str]:
        """Of the layers that are merged."""
        return self.stack.names

    @cached_property
    def settings(self) -> Any:
        """The recipe's, with what the method must know of all layers."""
        method = self.recipe.method
        return method.survey(self._matrices, self.recipe.settings) if method.survey else self.recipe.settings

    @torch.no_grad()
    def update(self, name: str) -> LowRank | Tensor:
        """The layer's merged update, with the scale in it, on ``device``: factors, or dense (m, d)."""
        found = self._merged(self._updates(name))
        scale = self.recipe.scale
        return LowRank(found.B * scale, found.A) if isinstance(found, LowRank) else found * scale

    def _merged(self, updates: Updates) -> LowRank | Tensor:
        method, settings = self.recipe.method, self.settings
        if self.recipe.space == "full" and method.on_factors and not self.recipe.isotropize:
            return method.on_factors(updates, settings)
        view = self._view(updates)
        assert method.on_matrices is not None
        merged = method.on_matrices(view.X, settings, view.place)
        return view.lift(isotropize(merged, view.place) if self.recipe.isotropize else merged)

    def _view(self, updates: Updates) -> View:
        """In the recipe's space; a spectral method sees the full space in the factors' span."""
        spectral = self.recipe.space == "full" and self.recipe.method.spectral
        view = SPACES["core" if spectral else self.recipe.space](updates)
        size = min(updates.shape) if spectral else view.place.size
        place = view.place._replace(size=size, space=self.recipe.space, keep=self.masks.get(updates.name))
        return replace(view, place=place)

    def _matrices(self) -> Iterator[tuple[Place, Tensor]]:
        for name in self.stack.modules:
            view = self._view(self._updates(name))
            yield view.place, view.X

    def _updates(self, name: str) -> Updates:
        row = self.weights[self.names.index(name)]
        return updates_of(self.stack.modules[name], name, self.stack.tasks, row.tolist(), self.device)


def updates_of(
    module: ModuleStack, name: str, tasks: tuple[str, ...], weights: list[float], device: torch.device
) -> Updates:
    """One layer of a stack as methods take it."""
    ranks = list(module.ranks)
    A, B = module.A.to(device).split(ranks), module.B.to(device).split(ranks, dim=1)
    return Updates(name, tasks, tuple(A), tuple(B), module.scales, tuple(weights))


def as_one(combination: Combination) -> Stack:
    """All merged updates in memory as one adapter of scale 1, to run them in a model by ``merged_layers``."""
    modules, dense = {}, {}
    for name in combination.names:
        found = combination.update(name)
        if isinstance(found, LowRank):
            modules[name] = ModuleStack(found.A, found.B, (len(found.A),), (1.0,), (None,), gram_inverse=None)
        else:
            dense[name] = DenseStack(found[None], None, [True])
    return Stack(("merged",), modules, dense, tuple(combination.names))


def stack_of(updates: Mapping[str, Updates]) -> Stack:
    """The inverse for all layers, without Gram factors: for tests and benchmarks."""
    modules = {
        name: ModuleStack(torch.cat(u.A), torch.cat(u.B, 1), u.ranks, u.scales, (None,) * len(u.tasks), None)
        for name, u in updates.items()
    }
    return Stack(next(iter(updates.values())).tasks, modules)
