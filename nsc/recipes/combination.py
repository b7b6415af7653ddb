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
from nsc.methods import METHODS, LayerInfo, LowRank, Updates
from nsc.methods.aim import relaxed
from nsc.methods.equations import Solution, solve
from nsc.methods.inputs import InputMoments, SpanMoments
from nsc.methods.reconstruction import reconstruction
from nsc.methods.spectral import isotropize
from nsc.recipes.spaces import SPACES, View
from nsc.recipes.spec import Recipe, with_scale
from nsc.recipes.updates import run_as_one


class Combination:
    """What a recipe makes of a stack of adapters; it implements ``Merged``.

    Args:
        stack: the adapters.
        recipe: the method with all its settings.
        coefficients: (M, K), learned before: weights w_k of each layer, which the recipe's weights of tasks multiply.
        masks: layer -> (K, p, q) bool, the entries to keep for methods that drop entries at random; LAYER.bias for the
            bias (K, 1, m) of a layer fine-tuned whole.
        device: where layers are worked on.
        found: layer -> its update at scale 1, where the method needs rows and had them, as ``solution`` gives it.
        magnitudes: layer -> (d,) E|x_i| of its inputs in the base, where AIM follows the method.

    Attributes:
        names: the layers that are merged, in the base's order.
        whole: those that adapters fine-tuned whole.
        weights: (M, K) float64, w_k of each layer.

    Raises:
        NSCError: if the recipe does not go with such adapters, coefficients or masks.
    """

    def __init__(
        self,
        stack: Stack,
        recipe: Recipe,
        coefficients: Tensor | None = None,
        masks: Mapping[str, Tensor] | None = None,
        device: torch.device | str = "cpu",
        found: Mapping[str, LowRank] | None = None,
        magnitudes: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.stack, self.recipe, self.device = stack, recipe, torch.device(device)
        self.found, self.magnitudes = found or {}, magnitudes or {}
        self.names, self.whole = stack.names, list(stack.dense)
        self.coefficients, self.masks = coefficients, dict(masks or {})
        self._require_fit()
        tasks = torch.tensor([float(recipe.weights.get(task, 1)) for task in stack.tasks], dtype=torch.float64)
        rows = tasks.expand(len(self.names), -1)
        self.weights = rows if coefficients is None else rows * coefficients.double().cpu()

    @cached_property
    def settings(self) -> Any:
        """The recipe's settings, with what the method must know of all layers."""
        method = self.recipe.method
        return method.survey(self.matrices, self.recipe.settings) if method.survey else self.recipe.settings

    @torch.no_grad()
    def update(self, name: str) -> LowRank | Tensor:
        """Merge one layer.

        Args:
            name: of the layer.

        Returns:
            Factors, or dense (m, d), on ``device`` and with the recipe's scale.
        """
        if name in self.stack.dense:
            return self._relaxed(name, self._on_matrices(self._whole_views(name)[0]))
        merged, scale = self._merged(self.updates(name)), self.recipe.scale
        return self._relaxed(
            name, LowRank(merged.B * scale, merged.A) if isinstance(merged, LowRank) else merged * scale
        )

    @torch.no_grad()
    def bias_update(self, name: str) -> Tensor | None:
        """Merge the bias of a layer fine-tuned whole.

        Args:
            name: of the layer.

        Returns:
            (m,) with the recipe's scale; None for a layer of LoRA factors or without bias.
        """
        views = self._whole_views(name)[1:] if name in self.stack.dense else []
        return self._on_matrices(views[0])[0] if views else None

    def at_scale(self, scale: float) -> Combination:
        """Change the recipe's scale, and keep what the method already knows of all layers.

        Args:
            scale: lambda.

        Returns:
            Another combination of the same stack.
        """
        other = copy(self)
        other.recipe = with_scale(self.recipe, scale)
        return other

    def with_recipe(self, recipe: Recipe) -> Combination:
        """Merge the same adapters by other settings.

        Args:
            recipe: the same method with other settings.

        Returns:
            Another combination of the same stack.

        Raises:
            NSCError: as the constructor does.
        """
        other = copy(self)
        other.__dict__.pop("settings", None)
        other.recipe = recipe
        other._require_fit()
        return other

    def updates(self, name: str) -> Updates:
        """Return one layer's updates as methods take them.

        Args:
            name: of the layer.

        Returns:
            The updates on ``device``, with their weights.
        """
        row = self.weights[self.names.index(name)]
        return updates_of(self.stack.modules[name], name, self.stack.tasks, row.tolist(), self.device)

    @torch.no_grad()
    def solution(self, name: str, moments: SpanMoments | InputMoments) -> tuple[LowRank, Solution, Tensor]:
        """Merge one layer by a method that needs rows.

        Args:
            name: of the layer.
            moments: what is known of its inputs, on ``device``.

        Returns:
            The update at scale 1, how it was found, and how near it comes: (T, 3), as ``reconstruction`` has it.
        """
        equations = self.recipe.method.equations
        assert equations is not None
        updates = replace(self.updates(name), moments=moments)
        problem = equations(updates, self.settings)
        solved = solve(problem, name)
        return LowRank(problem.B, solved.A), solved, reconstruction(updates, solved)

    def with_found(self, found: Mapping[str, LowRank]) -> Combination:
        """Give every layer the update that was found for it from rows.

        Args:
            found: layer -> its update at scale 1.

        Returns:
            Another combination of the same stack.
        """
        other = copy(self)
        other.found = found
        return other

    def with_magnitudes(self, magnitudes: Mapping[str, Tensor]) -> Combination:
        """Give every layer what AIM must know of its inputs.

        Args:
            magnitudes: layer -> (d,) E|x_i| in the base itself.

        Returns:
            Another combination of the same stack.
        """
        other = copy(self)
        other.magnitudes = magnitudes
        return other

    def in_model(self) -> tuple[Stack, Tensor]:
        """Make all merged updates, to run them in a model by ``merged_layers``.

        Returns:
            One adapter in place of all, and its coefficients (M, 1), which are 1.
        """
        return run_as_one(self)

    def matrices(self) -> Iterator[tuple[LayerInfo, Tensor]]:
        """Go through all layers as the method sees them, one at a time in memory.

        Yields:
            Each layer with its X (K, p, q) in the recipe's space, and then its bias where it is fine-tuned whole.
        """
        for name in self.names:
            views = self._whole_views(name) if name in self.stack.dense else [self._view(self.updates(name))]
            while views:
                view = views.pop(0)
                item = view.layer, view.X
                del view  # so that nothing here holds X while the next layer is made
                yield item
                del item

    def _merged(self, updates: Updates) -> LowRank | Tensor:
        method, settings = self.recipe.method, self.settings
        if method.equations:
            return self._found(updates.name)
        if self.recipe.space == "full" and method.on_factors and not self.recipe.isotropize:
            return method.on_factors(updates, settings)
        view = self._view(updates)
        assert method.on_matrices is not None
        merged = method.on_matrices(view.X, settings, view.layer)
        return view.lift(isotropize(merged, view.layer) if self.recipe.isotropize else merged)

    def _found(self, name: str) -> LowRank:
        if name not in self.found:
            raise NSCError(
                f"{self.recipe.full_name} is made from rows, and there are none for {name}: give --data TASK=FILE for"
                " each task"
            )
        return self.found[name]

    def _relaxed(self, name: str, update: LowRank | Tensor) -> LowRank | Tensor:
        """Follow AIM, where the recipe asks for it."""
        if self.recipe.aim is None:
            return update
        if name not in self.magnitudes:
            raise NSCError(
                f"aim is measured on rows, and there are none for {name}: give --data TASK=FILE for each task"
            )
        return relaxed(update, self.magnitudes[name], self.recipe.aim)

    def _on_matrices(self, view: View) -> Tensor:
        method = self.recipe.method
        assert method.on_matrices is not None
        return method.on_matrices(view.X, self.settings, view.layer) * self.recipe.scale

    def _view(self, updates: Updates) -> View:
        """Show a layer in the recipe's space; a basis-free method sees the full space in the factors' span.

        What is isotropized in the full space is shown in float64, in which a singular matrix is known by its values.
        """
        in_span = self.recipe.space == "full" and self.recipe.method.basis_free
        if self.recipe.isotropize:
            updates = replace(updates, A=tuple(a.double() for a in updates.A), B=tuple(b.double() for b in updates.B))
        view = SPACES["core" if in_span else self.recipe.space](updates, **self.recipe.of_space)
        size = min(updates.shape) if in_span else view.layer.size
        return self._with_mask(view, view.layer._replace(size=size, space=self.recipe.space))

    def _whole_views(self, name: str) -> list[View]:
        """Show a layer fine-tuned whole: the differences of its weight (K, m, d), and of its bias (K, 1, m), if any."""
        layer, row, views = self.stack.dense[name], self.weights[self.names.index(name)], []
        biases = None if layer.bias_deltas is None else layer.bias_deltas[:, None]
        for key, deltas in ((name, layer.deltas), (f"{name}.bias", biases)):
            if deltas is not None:
                X = deltas.new_zeros(len(layer.present), *deltas.shape[1:], device=self.device)
                X[torch.tensor(layer.present)] = deltas.to(self.device)
                info = LayerInfo(key, self.stack.tasks, row, min(X.shape[1:]))
                views.append(self._with_mask(View(X, info, lambda D: D), info))
        return views

    def _with_mask(self, view: View, layer: LayerInfo) -> View:
        """Describe the view by ``layer``, with the caller's mask if there is one for it."""
        keep = self.masks.get(layer.name)
        if keep is not None and (keep.shape != view.X.shape or keep.dtype != torch.bool):
            raise NSCError(
                f"the mask of {layer.name} is {keep.dtype} {tuple(keep.shape)}, but must be bool {tuple(view.X.shape)}"
            )
        return replace(view, layer=layer._replace(keep=keep))

    def _require_fit(self) -> None:
        stack, recipe, given = self.stack, self.recipe, self.coefficients
        if strange := sorted(set(recipe.weights) - set(stack.tasks)):
            raise NSCError(f"weights names {strange[0]}, which is no task; there are {', '.join(stack.tasks)}")
        if self.whole and not recipe.merges_whole_layers:
            able = [name for name, method in METHODS.items() if method.whole_layers]
            raise NSCError(
                f"{recipe.full_name} works on the factors of LoRA, but adapters fine-tuned {', '.join(self.whole)}"
                f" whole; keep those for their own tasks with keep_modules, or take one of {', '.join(able)}"
            )
        if self.masks and not recipe.method.takes_masks:
            raise NSCError(
                f"{recipe.full_name} takes no masks: they are for methods that drop entries at random, such as dare"
            )
        if strange := sorted(set(self.masks) - {*self.names, *(f"{name}.bias" for name in self.whole)}):
            raise NSCError(f"there is a mask for {strange[0]}, which is no layer that is merged")
        shape = tuple(stack.present.shape)
        if given is not None and (tuple(given.shape) != shape or not torch.isfinite(given).all()):
            raise NSCError(f"coefficients {tuple(given.shape)} must be finite and of shape {shape}, modules by tasks")


def updates_of(
    module: ModuleStack, name: str, tasks: tuple[str, ...], weights: list[float], device: torch.device
) -> Updates:
    """Split one layer of a stack into the updates of its tasks.

    Args:
        module: the layer.
        name: its name.
        tasks: K names.
        weights: K numbers w_k.
        device: where the factors are put.

    Returns:
        The updates, as methods take them.
    """
    ranks = list(module.ranks)
    A, B = module.A.to(device).split(ranks), module.B.to(device).split(ranks, dim=1)
    return Updates(name, tasks, tuple(A), tuple(B), module.scales, tuple(weights))


def as_one(combination: Combination) -> Stack:
    """Make all merged updates, as one adapter of scale 1 that ``merged_layers`` can run in a model.

    Args:
        combination: the merge.

    Returns:
        The stack of that adapter.
    """
    return run_as_one(combination)[0]


def stack_of(updates: Mapping[str, Updates]) -> Stack:
    """Put the updates of all layers into a stack; the inverse of ``updates_of``.

    Args:
        updates: layer -> its K updates.

    Returns:
        The stack, without Gram factors.
    """
    modules = {
        name: ModuleStack(u.A, u.B, u.ranks, u.scales, (None,) * len(u.tasks), None) for name, u in updates.items()
    }
    return Stack(next(iter(updates.values())).tasks, modules)
