"""A recipe on a stack of adapters: each layer's merged update, made when asked for, one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.stack import ModuleStack, Stack
from nsc.errors import NSCError
from nsc.methods import METHODS, LowRank, Place, Updates
from nsc.methods.spectral import isotropize
from nsc.recipes.spaces import SPACES, View
from nsc.recipes.spec import Recipe, with_scale
from nsc.recipes.updates import run_as_one


class Combination:
    """What ``recipe`` makes of the adapters of ``stack``: a ``Merged``.

    coefficients: (M, K) learned before, as weights w_k of each layer, beside the recipe's own weights of tasks.  masks:
    layer -> (K, p, q) bool, what methods that drop entries at random are to keep; LAYER.bias for the bias (K, 1, m) of
    one fine-tuned whole.  device: where layers are worked on. Raises NSCError where the recipe does not go with such
    adapters, coefficients or masks.
    """

    def __init__(
        self, stack: Stack, recipe: Recipe, coefficients: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.stack, self.recipe, self.device = stack, recipe, torch.device(device)
        self.coefficients, self.masks = coefficients, dict(masks or {})
        self._require_fit()
        tasks = torch.tensor([float(recipe.weights.get(task, 1)) for task in stack.tasks], dtype=torch.float64)
        rows = tasks.expand(len(stack.names), -1)
        self.weights = rows if coefficients is None else rows * coefficients.double().cpu()

    @property
    def names(self) -> list[str]:
        """Of the layers that are merged."""
        return self.stack.names

    @property
    def whole(self) -> list[str]:
        """Of the layers that adapters fine-tuned whole."""
        return list(self.stack.dense)

    @cached_property
    def settings(self) -> Any:
        """The recipe's, with what the method must know of all layers."""
        method = self.recipe.method
        return method.survey(self.matrices, self.recipe.settings) if method.survey else self.recipe.settings

    @torch.no_grad()
    def update(self, name: str) -> LowRank | Tensor:
        """The layer's merged update, with the scale in it, on ``device``: factors, or dense (m, d)."""
        if name in self.stack.dense:
            return self._on_matrices(self._whole(name)[0])
        found = self._merged(self._updates(name))
        scale = self.recipe.scale
        return LowRank(found.B * scale, found.A) if isinstance(found, LowRank) else found * scale

    @torch.no_grad()
    def bias_update(self, name: str) -> Tensor | None:
        """(m,) of a layer fine-tuned whole, if it has a bias."""
        views = self._whole(name)[1:] if name in self.stack.dense else []
        return self._on_matrices(views[0])[0] if views else None

    def at_scale(self, scale: float) -> Combination:
        """The same at another scale; what the method knows of all layers is kept."""
        other = copy(self)
        other.recipe = with_scale(self.recipe, scale)
        return other

    def in_model(self) -> tuple[Stack, Tensor]:
        """All merged updates in memory."""
        return run_as_one(self)

    def _merged(self, updates: Updates) -> LowRank | Tensor:
        method, settings = self.recipe.method, self.settings
        if self.recipe.space == "full" and method.on_factors and not self.recipe.isotropize:
            return method.on_factors(updates, settings)
        view = self._view(updates)
        assert method.on_matrices is not None
        merged = method.on_matrices(view.X, settings, view.place)
        return view.lift(isotropize(merged, view.place) if self.recipe.isotropize else merged)

    def _on_matrices(self, view: View) -> Tensor:
        """With the scale in it."""
        method = self.recipe.method
        assert method.on_matrices is not None
        return method.on_matrices(view.X, self.settings, view.place) * self.recipe.scale

    def _view(self, updates: Updates) -> View:
        """In the recipe's space; a basis-free method sees the full space in the factors' span."""
        in_span = self.recipe.space == "full" and self.recipe.method.basis_free
        view = SPACES["core" if in_span else self.recipe.space](updates)
        size = min(updates.shape) if in_span else view.place.size
        return self._placed(view, view.place._replace(size=size, space=self.recipe.space))

    def _whole(self, name: str) -> list[View]:
        """The differences of a layer fine-tuned whole: of its weight (K, m, d), then of its bias (K, 1, m), if any."""
        layer, row, views = self.stack.dense[name], self.weights[self.names.index(name)], []
        biases = None if layer.bias_deltas is None else layer.bias_deltas[:, None]
        for key, deltas in ((name, layer.deltas), (f"{name}.bias", biases)):
            if deltas is not None:
                X = deltas.new_zeros(len(layer.present), *deltas.shape[1:], device=self.device)
                X[torch.tensor(layer.present)] = deltas.to(self.device)
                place = Place(key, self.stack.tasks, row, min(X.shape[1:]))
                views.append(self._placed(View(X, place, lambda D: D), place))
        return views

    def _placed(self, view: View, place: Place) -> View:
        """With the caller's mask, if there is one for this place."""
        keep = self.masks.get(place.name)
        if keep is not None and (keep.shape != view.X.shape or keep.dtype != torch.bool):
            raise NSCError(
                f"the mask of {place.name} is {keep.dtype} {tuple(keep.shape)}, but must be bool {tuple(view.X.shape)}"
            )
        return replace(view, place=place._replace(keep=keep))

    def matrices(self) -> Iterator[tuple[Place, Tensor]]:
        """Every layer's X in the recipe's space, and of one fine-tuned whole its bias's; one at a time in memory."""
        for name in self.names:
            views = self._whole(name) if name in self.stack.dense else [self._view(self._updates(name))]
            while views:
                view = views.pop(0)
                found = view.place, view.X
                del view
                yield found
                del found

    def _updates(self, name: str) -> Updates:
        row = self.weights[self.names.index(name)]
        return updates_of(self.stack.modules[name], name, self.stack.tasks, row.tolist(), self.device)

    def _require_fit(self) -> None:
        stack, recipe = self.stack, self.recipe
        if strange := sorted(set(recipe.weights) - set(stack.tasks)):
            raise NSCError(f"weights names {strange[0]}, which is no task; there are {', '.join(stack.tasks)}")
        if stack.dense and not recipe.merges_whole_layers:
            able = [name for name, method in METHODS.items() if method.whole_layers]
            raise NSCError(
                f"{recipe.full_name} works on the factors of LoRA, but adapters fine-tuned {', '.join(stack.dense)}"
                f" whole; keep those for their own tasks with keep_modules, or take one of {', '.join(able)}"
            )
        if self.masks and not recipe.method.takes_masks:
            raise NSCError(
                f"{recipe.full_name} takes no masks: they are for methods that drop entries at random, as dare"
            )
        if strange := sorted(set(self.masks) - {*stack.names, *(f"{name}.bias" for name in stack.dense)}):
            raise NSCError(f"there is a mask for {strange[0]}, which is no layer that is merged")
        shape = tuple(stack.present.shape)
        given = self.coefficients
        if given is not None and (tuple(given.shape) != shape or not torch.isfinite(given).all()):
            raise NSCError(f"coefficients {tuple(given.shape)} must be finite and of shape {shape}, modules by tasks")


def updates_of(
    module: ModuleStack, name: str, tasks: tuple[str, ...], weights: list[float], device: torch.device
) -> Updates:
    """One layer of a stack as methods take it."""
    ranks = list(module.ranks)
    A, B = module.A.to(device).split(ranks), module.B.to(device).split(ranks, dim=1)
    return Updates(name, tasks, tuple(A), tuple(B), module.scales, tuple(weights))


def as_one(combination: Combination) -> Stack:
    """All merged updates in memory as one adapter of scale 1, to run them in a model by ``merged_layers``."""
    return run_as_one(combination)[0]


def stack_of(updates: Mapping[str, Updates]) -> Stack:
    """The inverse for all layers, without Gram factors: for tests and benchmarks."""
    modules = {
        name: ModuleStack(torch.cat(u.A), torch.cat(u.B, 1), u.ranks, u.scales, (None,) * len(u.tasks), None)
        for name, u in updates.items()
    }
    return Stack(next(iter(updates.values())).tasks, modules)
