"""LoRA on experts, brought to the layers that the base at hand has for them.

An adapter of transformers 4 has factors for ``experts.3.gate_proj`` and ``experts.3.up_proj``, and a base of
transformers 5 one matrix ``experts.gate_up_proj[3]`` for both: then A is both of theirs, one under the other, and B is
block-diagonal. PEFT before 0.19 laid factors on parameters the other way round, A over the outputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from packaging.version import InvalidVersion, Version
from torch import nn

from nsc.adapters.factors import LoraFactors
from nsc.adapters.lora import Adapter
from nsc.adapters.target_parameters import registered_order
from nsc.bases.experts import (
    ExpertNames,
    FusedExperts,
    Place,
    expert_of,
    fused_experts,
    layer_of,
    router_shapes,
    unwatched,
)
from nsc.bases.module_names import layer_kind, resolve
from nsc.errors import NameMismatch, NSCError

SWAPPED_SINCE = Version("0.19")  # PEFT's, with A over the inputs of (E, out, in)


@dataclass(frozen=True)
class _Found:
    """Factors of an adapter that belong to an expert, under the name that they have there."""

    name: str
    factors: LoraFactors
    place: Place
    on_parameter: bool


def on_experts(adapters: Mapping[str, Adapter], model: nn.Module) -> dict[str, Adapter]:
    """Give every adapter the factors of the base's own layers for its experts; other factors stay as they are.

    Args:
        adapters: task -> adapter.
        model: body of the base; the meta device is enough.

    Returns:
        Task -> adapter.

    Raises:
        NameMismatch: naming what does not fit the base's experts, or could mean two things.
    """
    if not (fused := fused_experts(model)):
        return dict(adapters)
    names, routers = ExpertNames(model), router_shapes(model)
    return {task: _on_base(adapter, names, fused, routers) for task, adapter in adapters.items()}


def refuse_experts(model: nn.Module, layers: Iterable[str], what: str) -> None:
    """Refuse to do with experts and routers what needs linear modules.

    Args:
        model: body of the base.
        layers: names of layers.
        what: the method, or part of one, with which the message begins.

    Raises:
        NSCError: naming the first such layer and the remedy.
    """
    if found := unwatched(model, layers):
        raise NSCError(
            f"{what} runs on linear modules, and adapters have LoRA on experts or routers, first on {found[0]}: take a"
            " method that needs no data, such as task-arithmetic, ties or tsv, or adapters of attention alone"
        )


def _on_base(
    adapter: Adapter, names: ExpertNames, fused: Mapping[str, FusedExperts], routers: Collection[str]
) -> Adapter:
    layers: dict[str, list[_Found]] = {}
    factors: dict[str, LoraFactors] = {}
    for name, pair in adapter.factors.items():
        if found := _found(name, pair, names):
            layers.setdefault(layer_of(found.place.parameter, found.place.expert), []).append(found)
        else:
            new = names.renamed(f"{name}.weight").removesuffix(".weight")
            factors[new if any(f".{new}".endswith(f".{router}") for router in routers) else name] = pair
    if not layers:
        return replace(adapter, factors=factors)
    mapping = resolve(adapter.name, layers, {layer_of(n, e): f.shape for n, f in fused.items() for e in range(f.count)})
    places = {layer: expert_of(base) or ("", 0) for layer, base in mapping.items()}
    _check_coverage(adapter, list(places.values()), fused)
    parameters = {layer: fused[parameter] for layer, (parameter, _) in places.items()}
    on_parameters = {layer: found[0] for layer, found in layers.items() if found[0].on_parameter}
    _check_order(adapter, {places[layer][0] for layer in on_parameters}, fused)
    turned = _are_turned(adapter, on_parameters, parameters)
    joined = {layer: _joined(adapter, found, parameters[layer].shape, turned) for layer, found in layers.items()}
    return replace(adapter, factors=factors | joined)


def _found(name: str, factors: LoraFactors, names: ExpertNames) -> _Found | None:
    if inner := expert_of(name):
        return _Found(name, factors, Place(names.renamed(inner[0]), inner[1], 0, 1), True)
    place = names.place(f"{name}.weight")
    return _Found(name, factors, place, False) if place else None


def _joined(adapter: Adapter, found: Sequence[_Found], shape: tuple[int, int], turned: bool) -> LoraFactors:
    """The factors of an expert's matrix, of those of its blocks of rows."""
    first, parts = found[0].factors, found[0].place.parts
    if found[0].on_parameter and len(found) == 1:
        return replace(first, A=first.B.mT, B=first.A.mT) if turned else first
    pairs = {f.place.part: f.factors.narrowed(shape[1]) for f in found if not f.on_parameter}
    expected = (shape[0] // parts, shape[1])
    for f in found:
        update = (len(f.factors.B), f.factors.narrowed(shape[1]).A.shape[1])
        if update != expected or len(pairs) != len(found):
            raise NameMismatch(
                f"adapter '{adapter.name}': the update of '{f.name}' is {update} (out, in), and the base has {expected}"
                " for it, from one module alone. Wrong base?"
            )
    return pairs[0] if parts == 1 else _block_diagonal(pairs, parts)


def _block_diagonal(pairs: Mapping[int, LoraFactors], parts: int) -> LoraFactors:
    """Factors of blocks of rows side by side: A one under the other, B block-diagonal, zero where a block has none."""
    blocks = [pairs[part] for part in sorted(pairs)]
    scale = blocks[0].scale if len({f.scale for f in blocks}) == 1 else 1.0
    dtype = torch.promote_types(blocks[0].A.dtype, torch.float32 if scale == 1.0 else blocks[0].B.dtype)
    for f in blocks:
        dtype = torch.promote_types(dtype, torch.promote_types(f.A.dtype, f.B.dtype))
    rows = len(blocks[0].B)
    none = torch.zeros(rows, 0, dtype=dtype)
    sides = [pairs[part].B.to(dtype) * (pairs[part].scale / scale) if part in pairs else none for part in range(parts)]
    return LoraFactors(torch.cat([f.A.to(dtype) for f in blocks]), torch.block_diag(*sides), scale)


def _are_turned(adapter: Adapter, found: Mapping[str, _Found], parameters: Mapping[str, FusedExperts]) -> bool:
    """Whether factors on parameters lie the other way round: A over the outputs, B over the inputs.

    The shapes tell, but of square matrices. Where all are square, the version of PEFT does; what was saved before 0.19
    is read otherwise by PEFT today, so it is refused.
    """
    updates = {layer: (len(f.factors.B), f.factors.A.shape[1]) for layer, f in found.items()}
    seen = {updates[layer] != parameters[layer].shape for layer in found if len({*parameters[layer].shape}) == 2}
    if seen or not found:
        return seen == {True}
    try:
        known = Version(str(adapter.config.get("peft_version")).partition("@")[0]) >= SWAPPED_SINCE
    except InvalidVersion:
        known = False
    if not known:
        layer = next(iter(found))
        raise NameMismatch(
            f"adapter '{adapter.name}': the matrices of '{layer}' are square, {updates[layer]}, and its config names no"
            f" PEFT since {SWAPPED_SINCE}, before which lora_A and lora_B of parameters lay the other way round: if it"
            f" was trained with a later one, set peft_version in its config, else train it again"
        )
    return any(parameters[layer].marked != parameters[layer].transposed for layer in found)


def _check_order(adapter: Adapter, parameters: Collection[str], fused: Mapping[str, FusedExperts]) -> None:
    """Make sure that parameters of one module were told apart as they are wrapped: in the order of registration."""
    holders: dict[str, list[str]] = {}
    for name in fused:
        if name in parameters:
            holders.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    for holder, own in holders.items():
        if own != registered_order(own):
            raise NameMismatch(
                f"adapter '{adapter.name}': '{holder}' of the base registers its parameters as {', '.join(own)}, so"
                " which of them lora_A and lora_B are on is not known; nsc merges LoRA on one of them alone there"
            )


def _check_coverage(adapter: Adapter, places: Sequence[tuple[str, int]], fused: Mapping[str, FusedExperts]) -> None:
    """Refuse experts of a base with more blocks, or more experts, than the one that the adapter was trained on.

    A single expert may lack factors. Nothing is said of blocks where the config narrows its targets.
    """
    highest: dict[str, int] = {}
    for parameter, expert in places:
        kind = layer_kind(parameter)
        highest[kind] = max(highest.get(kind, 0), expert)
    covered, config = {parameter for parameter, _ in places}, adapter.config
    narrow = isinstance(config.get("target_modules"), str) or config.get("exclude_modules")
    whole = not narrow and config.get("layers_to_transform") is None
    for name, experts in fused.items():
        if (last := highest.get(layer_kind(name))) is None:
            continue
        if last + 1 != experts.count or (whole and name not in covered):
            lacking = layer_of(name, last + 1) if last + 1 != experts.count else name
            raise NameMismatch(
                f"adapter '{adapter.name}' has factors for experts like '{name}', but none for '{lacking}'. Is the base"
                " larger than the one it was trained on?"
            )
