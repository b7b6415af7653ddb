"""Merging factors that are in memory: no base, no files, by every method that needs no data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from nsc.adapters.factors import DTYPES, LoraFactors, read_factors, read_saved
from nsc.adapters.peft_folder import Checkpoint, refuse_unsupported
from nsc.adapters.unsupported import PREFIX
from nsc.config import AUTO, LEARNED
from nsc.errors import AdapterError, NSCError
from nsc.methods import Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.merged_factors import MergedFactors, merged_factors, padded
from nsc.recipes.spec import Recipe, read_recipe, settings_of

Pairs = Mapping[str, tuple[Tensor, Tensor] | tuple[Tensor, Tensor, float]]  # layer -> A (r, d), B (m, r), scale
PeftState = tuple[Mapping[str, Tensor], Any]  # a state dict with lora_A and lora_B in its keys, and its LoraConfig


def merge_factors(
    adapters: Mapping[str, Pairs | PeftState],
    method: str = "task-arithmetic",
    *,
    rank: int | None = None,
    **settings: Any,
) -> dict[str, tuple[Tensor, Tensor]] | tuple[dict[str, Tensor], dict[str, Any]]:
    """Merge LoRA factors that are in memory, without a base, by a method that needs no data.

    What comes out has the form of what goes in. Nothing is compared with a base: layers of two adapters are the same if
    their names are.

    Args:
        adapters: task -> its adapter, all in one form. Either layer -> (A, B) or (A, B, scale), with A (r, d) and B
            (m, r) of any floating dtype and the update scale B A, scale 1 by default. Or (state dict, config), as
            PEFT's ``get_peft_model_state_dict`` and ``LoraConfig`` give them; of a config given as a dict ``r`` and
            ``lora_alpha`` are enough.
        method: [SPACE-]METHOD, such as "ties", "core-ties" or "svd"; ``nsc methods`` lists them.
        rank: of the merged factors, where the method has no exact ones or fewer are wanted; svd and methods in ctm take
            it as their own setting.
        settings: of the method, such as ``density``, ``weights`` (task -> w_k) and ``scale``.

    Returns:
        Layer -> A (R, d), B (m, R), whose product is the merged update. Or (state dict, config), every layer filled up
        with zeros to one rank R, with ``lora_alpha`` equal to it: for ``LoraConfig(**config)`` and PEFT's
        ``set_peft_model_state_dict``. In float32, on the CPU.

    Raises:
        NSCError: if the method needs data, or makes dense updates and no rank is given; for settings that do not fit;
            and if adapters differ in form, or in the shape of a layer.
        AdapterError: naming adapter and layer, for factors that do not fit together or are not finite.

    Example:
        >>> one, two = ({"q": (torch.randn(4, 64), torch.randn(48, 4))} for _ in range(2))
        >>> A, B = merge_factors({"one": one, "two": two}, "core-ties", density=0.5)["q"]
    """
    if not adapters:
        raise NSCError("no adapter given; a merge needs at least one")
    of_peft = {task: isinstance(adapter, tuple) for task, adapter in adapters.items()}
    if len(set(of_peft.values())) > 1:
        raise NSCError(
            f"adapters must be of one form: {_names(of_peft, True)} are (state dict, config), {_names(of_peft, False)}"
            " map layers to (A, B)"
        )
    recipe, rank = _recipe(method, settings, rank)
    read = _read_states if all(of_peft.values()) else _read_pairs
    updates = _by_layer({task: read(task, cast(Any, adapter)) for task, adapter in adapters.items()})
    factors = merged_factors(Combination(stack_of(updates), recipe, device=_device(updates)), rank)
    return _as_state(factors) if all(of_peft.values()) else {name: (f.A, f.B) for name, f in factors.items()}


def _recipe(method: str, settings: dict[str, Any], rank: int | None) -> tuple[Recipe, int | None]:
    """The recipe, and the rank of a truncation after it."""
    learns = method == AUTO or method.partition("+")[0] in LEARNED
    if not learns and rank is not None and "rank" in settings_of(method):
        settings, rank = settings | {"rank": rank}, None
    recipe = None if learns else read_recipe(method, **settings)
    if recipe is None or recipe.needs_rows:
        step = "aim" if recipe and recipe.aim is not None else method
        raise NSCError(
            f"{step} needs data and a base; call nsc.merge, or take a method without data, such as core-ties"
        )
    if recipe.is_dense and rank is None:
        raise NSCError(f"{method} makes dense updates, which no factors hold exactly; give rank, or take core-ties")
    return recipe, rank


def _read_states(task: str, adapter: PeftState) -> dict[str, LoraFactors]:
    """The factors of a PEFT state dict; what cannot be merged without a base is refused."""
    state, config = adapter
    given = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    given = {"peft_type": "LORA"} | {key: value for key, value in given.items() if key != "runtime_config"}
    checkpoint = Checkpoint(task, Path("its state dict"), given, dict(state), "")
    refuse_unsupported(checkpoint)
    factors = read_factors(checkpoint)
    if saved := sorted(read_saved(checkpoint)):
        raise checkpoint.error(
            f"'{saved[0]}' is fine-tuned whole, which only a base tells; call nsc.merge, or leave it out"
        )
    return factors


def _read_pairs(task: str, adapter: Pairs) -> dict[str, LoraFactors]:
    """The factors of each layer, once they fit together."""
    factors = {}
    for name, (A, B, *scale) in adapter.items():
        where = f"adapter '{task}', layer '{name}'"
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise AdapterError(f"{where}: A {tuple(A.shape)} and B {tuple(B.shape)} must be (r, d) and (m, r)")
        if not {A.dtype, B.dtype} <= set(DTYPES) or not (A.isfinite().all() and B.isfinite().all()):
            raise AdapterError(f"{where}: A ({A.dtype}) and B ({B.dtype}) must be finite, in a floating dtype")
        factors[name] = LoraFactors(A, B, float(*scale) if scale else 1.0)
    return factors


def _by_layer(adapters: Mapping[str, Mapping[str, LoraFactors]]) -> dict[str, Updates]:
    """Layer -> the updates of all tasks, of rank 0 where a task does not touch it."""
    shapes: dict[str, tuple[int, int]] = {}
    for task, factors in adapters.items():
        for name, f in factors.items():
            shape = len(f.B), f.A.shape[1]
            if shapes.setdefault(name, shape) != shape:
                raise NSCError(
                    f"layer {name} is {shape} in adapter {task} but {shapes[name]} in another; take one base"
                )
    if not shapes:
        raise NSCError("the adapters have no layer; give at least one")
    tasks = tuple(adapters)
    return {name: _updates(name, tasks, [adapters[t].get(name) for t in tasks], shapes[name]) for name in shapes}


def _updates(name: str, tasks: tuple[str, ...], row: list[LoraFactors | None], shape: tuple[int, int]) -> Updates:
    like = next(f.A for f in row if f is not None)
    absent = LoraFactors(like.new_zeros(0, shape[1]), like.new_zeros(shape[0], 0), 0.0)
    here = [f or absent for f in row]
    A, B = tuple(f.A.to(like.device) for f in here), tuple(f.B.to(like.device) for f in here)
    return Updates(name, tasks, A, B, tuple(f.scale for f in here), (1.0,) * len(tasks))


def _as_state(factors: Mapping[str, MergedFactors]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A state dict as PEFT saves it, of one rank, and what its LoraConfig must say."""
    even, state = padded(factors), {}
    for name, f in even.items():
        state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"] = f.A, f.B
    rank = len(next(iter(even.values())).A)
    return state, {"r": rank, "lora_alpha": rank, "target_modules": list(factors)}


def _device(updates: Mapping[str, Updates]) -> torch.device:
    return next(iter(updates.values())).A[0].device


def _names(of_peft: Mapping[str, bool], which: bool) -> str:
    return ", ".join(task for task, peft in of_peft.items() if peft is which)
