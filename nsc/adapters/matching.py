"""Adapters on a base: which of its layers each of their tensors changes, and which layers are measured."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from nsc.adapters.factors import LoraFactors
from nsc.adapters.fused_layers import on_experts
from nsc.adapters.lora import Adapter, read_adapters
from nsc.adapters.modules_to_save import BaseLayers, dense_stacks, split_saved
from nsc.adapters.stack import Stack, stack_adapters
from nsc.adapters.targets import is_targeted, narrowed
from nsc.bases import structure
from nsc.bases.base_model import Base
from nsc.bases.checkpoint_keys import respelled
from nsc.bases.codes import FLOATS, quantization_settings
from nsc.bases.conv1d import transposed_weights
from nsc.bases.experts import expert_of, layer_shapes
from nsc.bases.module_names import all_match, layer_kind, prefix_of, prefixes_of, resolve
from nsc.bases.weights import stored_tensors
from nsc.bases.wrappers import prefixes_of_classes, wrapper_of
from nsc.errors import NameMismatch, NSCError

NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # of a block: a whole part of a name
FOREIGN = {  # what lies in the other tower, by what the body takes
    "pixel_values": ("text_model", "language_model"),
    "input_ids": ("vision_model", "vision_tower"),
}


class Matched(NamedTuple):
    """Adapters on a base.

    Attributes:
        adapters: task -> adapter, with what each task keeps for itself, such as its head.
        matches: task -> the adapter's module name -> the base's.
        shapes: every layer of the base that LoRA can be on -> (out, in).
        stack: what is merged, with a coefficient for each layer and task.
    """

    adapters: dict[str, Adapter]
    matches: dict[str, dict[str, str]]
    shapes: dict[str, tuple[int, int]]
    stack: Stack


def match_to_base(base: Base, adapters: Mapping[str, Adapter], keep_modules: Sequence[str] = ()) -> Matched:
    """Find the place of every tensor of ``adapters`` in the body of ``base``.

    Args:
        base: of whose body shapes are enough; weights are read only of layers that adapters fine-tuned whole.
        adapters: task -> adapter.
        keep_modules: suffixes of modules in modules_to_save that each task keeps, and that are not merged.

    Returns:
        The adapters side by side.

    Raises:
        NSCError: a subclass that names adapter and module, for anything that has no place there.
    """
    shapes = layer_shapes(base.model)
    adapters = in_new_names(base, adapters, shapes)
    matches = match_adapters(adapters, shapes)
    for task, mapping in matches.items():
        check_towers(task, mapping, str(base.model.main_input_name))
    check_prefixes(base, matches)
    outputs = base.output_layers if any(adapter.saved for adapter in adapters.values()) else {}
    kept, whole = split_saved(adapters, matches, body_of(base, outputs), keep_modules)
    shapes = shapes | {name: (layer.out_features, layer.in_features) for name, layer in outputs.items()}
    stack = stack_adapters(kept, matches, shapes, dense_stacks(base, whole))
    return Matched(kept, matches, shapes, stack)


def beside(matched: Matched, task: str, factors: Mapping[str, LoraFactors]) -> Matched:
    """Put one more adapter beside those of a merge, without a head.

    Args:
        matched: the adapters on the base, which fine-tuned no layer whole.
        task: name of the new one, which is the last.
        factors: the base's own module name -> factors.

    Returns:
        The adapters and the new one.

    Raises:
        NSCError: if an adapter has that name.
        NameMismatch: naming a layer that is not in both.
    """
    if task in matched.adapters:
        raise NSCError(f"an adapter is named {task}, as what start_from names is called in a merge; rename that task")
    if strange := sorted(matched.stack.modules.keys() ^ factors.keys()):
        which = ("none", "have") if strange[0] in matched.stack.modules else ("some", "have not")
        raise NameMismatch(
            f"start_from has {which[0]} for {strange[0]}, whose factors the adapters {which[1]}: start from a merge of"
            " adapters on the same layers"
        )
    digest = hashlib.sha256()
    for name, pair in sorted(factors.items()):
        digest.update(name.encode() + b"".join(x.contiguous().numpy().tobytes() for x in (pair.A, pair.B)))
    adapter = Adapter(task, Path(), dict(factors), {}, {}, digest.hexdigest())
    adapters = {**matched.adapters, task: adapter}
    matches = {**matched.matches, task: {name: name for name in factors}}
    return Matched(adapters, matches, matched.shapes, stack_adapters(adapters, matches, matched.shapes))


def in_new_names(base: Base, adapters: Mapping[str, Adapter], shapes: Mapping[str, Any]) -> dict[str, Adapter]:
    """Rename modules of adapters that an older transformers made, as the installed one renames weights on loading.

    LoRA on experts is brought to the matrices that the base has for them.

    Args:
        base: asked only where a name matches none of ``shapes``, or experts are among them; no weights are needed.
        adapters: task -> adapter.
        shapes: linear layers of the base by name.

    Returns:
        Task -> adapter; the same one where its names match, or none of its class's rules would make them match.
    """
    adapters = on_experts(adapters, base.model) if any(map(expert_of, shapes)) else adapters
    return {task: _renamed(base, adapter, shapes) for task, adapter in adapters.items()}


def _renamed(base: Base, adapter: Adapter, shapes: Mapping[str, Any]) -> Adapter:
    if all_match(adapter.factors, shapes):
        return adapter
    saved = {name: name.rpartition(".") for name in adapter.saved}
    for model in filter(None, (base.generating, base.blank)):
        new = respelled(model, [*adapter.factors, *(module for module, _, _ in saved.values())])
        if all_match([new[name] for name in adapter.factors], shapes):
            return replace(
                adapter,
                factors={new[name]: factors for name, factors in adapter.factors.items()},
                saved={f"{new[saved[name][0]]}.{saved[name][2]}": tensor for name, tensor in adapter.saved.items()},
            )
    return adapter


def match_adapters(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
    """Match the modules of all adapters to linear layers of the base, and check shapes and coverage.

    Args:
        adapters: task -> adapter.
        shapes: linear layers of the base -> (out, in).

    Returns:
        Task -> adapter's module name -> base's.

    Raises:
        NameMismatch: for anything that has no place, or another shape.
    """
    matches = {}
    for task, adapter in adapters.items():
        matches[task] = resolve(task, adapter.factors, shapes)
        check_shapes(adapter, matches[task], shapes)
        check_coverage(adapter, matches[task], shapes)
    return matches


def layers_on_codes(base: Base, adapters: Mapping[str, str | Path]) -> list[str]:
    """Return the layers that adapters change, where the base's checkpoint holds anything but floating numbers.

    Args:
        base: the base; its weights need not be loaded.
        adapters: task -> PEFT folder or Hub id, which are read only if there are codes.

    Returns:
        Layers of the body with LoRA; none where the checkpoint holds no codes.

    Raises:
        NSCError: a subclass, for an adapter that cannot be merged.
    """
    plain = all(tensor.dtype in FLOATS for tensor in stored_tensors(base).values())
    if plain and not quantization_settings(base.config):
        return []
    shapes = layer_shapes(base.model)
    matches = match_adapters(in_new_names(base, read_adapters(adapters), shapes), shapes)
    return list(dict.fromkeys(name for mapping in matches.values() for name in mapping.values()))


def body_of(base: Base, outputs: Mapping[str, nn.Linear] | None = None) -> BaseLayers:
    """Return the facts about a base's layers that ``split_saved`` needs.

    Args:
        base: the base; shapes are enough.
        outputs: layers behind the body that belong to the base as well, by name.

    Returns:
        Its linear layers, parameters and tied names.
    """
    model = base.model
    parameters = structure.body_parameters(model)
    shared = Counter(map(id, parameters.values()))
    tied = {name for name, parameter in parameters.items() if shared[id(parameter)] > 1}
    if names := base.tied_outputs:
        embeddings = getattr(model, "text", model).get_input_embeddings().weight  # type: ignore[operator]
        tied |= {*names, *(name for name, parameter in parameters.items() if parameter is embeddings)}
    behind = outputs or {}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in behind.items()}
    own = [f"{name}.{kind}" for name, layer in behind.items() for kind, _ in layer.named_parameters()]
    return BaseLayers(
        structure.linear_shapes(model) | shapes, [*parameters, *own], tied, transposed_weights(model), tuple(behind)
    )


def check_shapes(adapter: Adapter, mapping: Mapping[str, str], available: Mapping[str, tuple[int, int]]) -> None:
    """Refuse factors that do not fit their base module: every A is (r, in_features), every B (out_features, r).

    An A that all modules share (VeRA) must be as wide as the widest of them.

    Args:
        adapter: the adapter.
        mapping: adapter's module name -> base's.
        available: linear layers of the base -> (out, in).

    Raises:
        NameMismatch: naming the module and both shapes.
    """
    widest = max((available[mapping[name]][1] for name, f in adapter.factors.items() if f.wide), default=0)
    for name, factors in adapter.factors.items():
        weight = tuple(available[mapping[name]])
        A = factors.narrowed(weight[1]).A if factors.A.shape[1] == widest else factors.A
        update = (factors.B.shape[0], A.shape[1])
        if update != weight:
            raise NameMismatch(
                f"adapter '{adapter.name}': the update of '{name}' is {update} (out, in), the base's '{mapping[name]}' "
                f"is {weight}. Wrong base? {_trained_on(adapter)}"
            )


def check_prefixes(base: Base, matches: Mapping[str, Mapping[str, str]]) -> None:
    """Refuse module names with a prefix that no class of transformers puts before the body's.

    Args:
        base: the base; its weights need not be loaded.
        matches: task -> adapter's module name -> base's.

    Raises:
        NameMismatch: naming the adapter, the prefix and those that there are.
    """
    tasks: dict[str, str] = {}
    names: dict[str, set[str]] = {}
    for task, mapping in matches.items():
        for prefix, inside in prefixes_of(mapping).items():
            tasks.setdefault(prefix, task)
            names.setdefault(prefix, set()).update(inside)
    for prefix, task in tasks.items():
        if prefix and wrapper_of(base, prefix, names[prefix]) is None:
            known = ", ".join(f"'{name}' in {cls}" for name, cls in prefixes_of_classes(base).items())
            raise NameMismatch(
                f"adapter '{task}': its module names have '{prefix}' before the base's own, as in no class of"
                f" transformers for {base.config.model_type}, where that is {known}; take it off the keys of its"
                " safetensors file, or give the base that has it"
            )


def check_towers(adapter_name: str, mapping: Mapping[str, str], takes: str) -> None:
    """Refuse modules of another tower that would be matched to a body with other inputs.

    CLIP's text tower has layers with the names, and SigLIP's with the shapes, of the image tower.

    Args:
        adapter_name: name of the adapter, for errors.
        mapping: adapter's module name -> base's.
        takes: what the base's forward takes.

    Raises:
        NameMismatch: naming the module and its tower.
    """
    for name, base in mapping.items():
        other = [tower for tower in FOREIGN.get(takes, ()) if tower in name.split(".")]
        if other and not any(tower in base.split(".") for tower in FOREIGN[takes]):
            raise NameMismatch(
                f"adapter '{adapter_name}': '{name}' lies in the {other[0]}, but the base takes {takes} and would"
                f" take it for '{base}'; give the base whose {other[0]} was trained"
            )


def check_coverage(adapter: Adapter, mapping: Mapping[str, str], available: Iterable[str]) -> None:
    """Refuse an adapter that lacks factors for a base module that PEFT would have adapted.

    That is the sign of a base with more layers than the one the adapter was trained on. Where the config's targets are
    names of another version of transformers, they stand for every module of the kinds that have factors.

    Args:
        adapter: the adapter.
        mapping: adapter's module name -> base's.
        available: linear layers of the base.

    Raises:
        NameMismatch: naming the module.
    """
    config, resolved = adapter.config, set(mapping.values())
    if not config.get("target_modules") or not mapping:
        return
    examples = {layer_kind(base): name for name, base in mapping.items()}
    known = any(is_targeted(config, name) for name in mapping)
    prefix = prefix_of(mapping) or ""
    for base in _of_trained_part(mapping, available):
        kind = layer_kind(base)
        # A pooler, outside of blocks, comes and goes with wrappers; an expert may lack.
        if base == kind or base in resolved or expert_of(base):
            continue
        name = _numbered_like(base, examples[kind]) if kind in examples else prefix + base
        targeted = is_targeted(config, name) if known else kind in examples and not narrowed(config)
        if targeted and not {f"{name}.weight", f"{prefix}{base}.weight"} & adapter.saved.keys():
            raise NameMismatch(
                f"adapter '{adapter.name}' targets '{base}' by its config, but has no factors for it. "
                f"Is the base deeper than the one it was trained on? {_trained_on(adapter)}"
            )


def _numbered_like(base: str, name: str) -> str:
    """The name of another module of the same kind, with the numbers of this one in the places of its last ones."""
    numbers, places = NUMBER.findall(base), list(NUMBER.finditer(name))
    for number, place in zip(reversed(numbers), reversed(places), strict=False):
        name = name[: place.start()] + number + name[place.end() :]
    return name


def _of_trained_part(mapping: Mapping[str, str], available: Iterable[str]) -> list[str]:
    """The base's layers, but for those beside its language model where the adapter was trained on that by itself."""
    inside = all("language_model" in base.split(".") for base in mapping.values())
    alone = inside and not any("language_model" in name.split(".") for name in mapping)
    return [base for base in available if not alone or "language_model" in base.split(".")]


def _trained_on(adapter: Adapter) -> str:
    return f"The adapter's config names '{adapter.base}'." if adapter.base else "The adapter's config names no base."
