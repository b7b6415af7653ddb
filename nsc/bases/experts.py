"""Mixture-of-experts blocks: parameters that hold a matrix for each expert, and the router beside them.

transformers 5 keeps the experts of a block in 3-D parameters, (E, out, in), or (E, in, out) in families that store
weights transposed. Everywhere else in nsc a layer is one matrix, so the matrix of expert 3 of ``mlp.experts.down_proj``
is the layer ``mlp.experts.down_proj[3]``. What transformers 4 calls ``mlp.experts.3.gate_proj`` and
``mlp.experts.3.up_proj`` are the upper and lower rows of ``mlp.experts.gate_up_proj[3]``; which names become which rows
is asked of transformers' own conversion.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from nsc.bases.checkpoint_keys import conversion_rules
from nsc.bases.structure import linear_shapes

with suppress(ImportError):  # transformers 4 has no rules, and every expert is modules of its own
    from transformers.core_model_loading import Concatenate, MergeModulelist, rename_source_key

_LAYER = re.compile(r"(?P<parameter>.+)\[(?P<expert>\d+)\]")


@dataclass(frozen=True)
class FusedExperts:
    """A parameter that holds a matrix for each expert.

    Attributes:
        count: number E of experts.
        shape: (out, in) of each matrix.
        transposed: whether it is stored as (E, in, out), not (E, out, in).
        marked: whether its module says so itself (``is_transposed``), by which PEFT goes.
    """

    count: int
    shape: tuple[int, int]
    transposed: bool
    marked: bool


class Place(NamedTuple):
    """Where a tensor of a checkpoint, or of an adapter, lies in a fused parameter.

    Attributes:
        parameter: name of the parameter, with whatever prefix the tensor's name had.
        expert: number of the expert.
        part: which of ``parts`` equal blocks of rows of that expert's matrix it is.
        parts: how many blocks there are.
    """

    parameter: str
    expert: int
    part: int
    parts: int


class Part(NamedTuple):
    """A part of a checkpoint's tensor, ``tensor[at]``, that is rows of one layer.

    Attributes:
        layer: name of the layer.
        at: index of the part in the tensor; () for all of it.
        rows: which rows of the layer it is.
        transposed: whether it is stored as (in, out).
    """

    layer: str
    at: tuple[int, ...]
    rows: slice
    transposed: bool


def layer_of(parameter: str, expert: int) -> str:
    """Return the name of the layer that an expert's matrix in a fused parameter is.

    Args:
        parameter: name of the parameter.
        expert: number of the expert.

    Returns:
        Such as ``mlp.experts.down_proj[3]``.
    """
    return f"{parameter}[{expert}]"


def expert_of(layer: str) -> tuple[str, int] | None:
    """Return the parameter and the expert that a layer's name means.

    Args:
        layer: name of a layer.

    Returns:
        Name of the parameter and number of the expert; None for a module.
    """
    match = _LAYER.fullmatch(layer)
    return (match["parameter"], int(match["expert"])) if match else None


def fused_experts(model: nn.Module) -> dict[str, FusedExperts]:
    """Return the parameters of a body that hold a matrix for each expert.

    Args:
        model: the body; the meta device is enough.

    Returns:
        Name of the parameter -> what it holds, in the order in which their modules register them.
    """
    found = {}
    for name, module in model.named_modules():
        own = {key: p for key, p in _own_parameters(module) if p.ndim == 3 and p.shape[0] > 1}
        marked = bool(getattr(module, "is_transposed", False))
        transposed = marked or _is_transposed(own)
        for key, p in own.items():
            shape = (p.shape[2], p.shape[1]) if transposed else (p.shape[1], p.shape[2])
            found[f"{name}.{key}"] = FusedExperts(p.shape[0], shape, transposed, marked)
    return found


def parameter_of(layer: str) -> tuple[str, tuple[int, ...]]:
    """Return the parameter that holds a layer's matrix, and where in it.

    Args:
        layer: name of a layer.

    Returns:
        Name of the parameter, and an index; () for a module's whole weight.
    """
    place = expert_of(layer)
    return (place[0], (place[1],)) if place else (f"{layer}.weight", ())


def holder_of(layer: str) -> str:
    """Return the module that holds a layer's matrix.

    Args:
        layer: name of a layer.

    Returns:
        Name of the module; of an expert, that of all experts of its block.
    """
    place = expert_of(layer)
    return place[0].rpartition(".")[0] if place else layer


def unwatched(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Return the layers that are no linear modules, so that their inputs cannot be watched: experts' and routers.

    Args:
        model: the body; the meta device is enough.
        layers: names of layers.

    Returns:
        Those names, in the order given.
    """
    routers = router_shapes(model)
    return [layer for layer in layers if layer in routers or expert_of(layer)]


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of all layers of a body that LoRA can be on: linears, experts' matrices, and routers.

    Args:
        model: the body; the meta device is enough.

    Returns:
        Name -> (out, in), linears first, each kind in the model's own order.
    """
    experts = {layer_of(name, e): f.shape for name, f in fused_experts(model).items() for e in range(f.count)}
    return linear_shapes(model) | router_shapes(model) | experts


def router_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of the routers beside fused experts that are not run as linear modules.

    Args:
        model: the body; the meta device is enough.

    Returns:
        Name of the module -> (out, in) of its weight.
    """
    blocks = {name.rpartition(".")[0].rpartition(".")[0] for name in fused_experts(model)}
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[0] not in blocks:
            continue
        runs_otherwise = isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward
        weight = module.weight if runs_otherwise else dict(_own_parameters(module)).get("weight")
        if isinstance(weight, Tensor) and weight.ndim == 2:
            found[name] = (weight.shape[0], weight.shape[1])
    return found


class ExpertNames:
    """Names of experts' tensors, in adapters and checkpoints, read as the installed transformers converts them.

    Args:
        model: the body; the meta device is enough.
    """

    def __init__(self, model: nn.Module) -> None:
        self._renamings, self._converters = conversion_rules(model)
        self._stacked = {source: place for rule in self._converters for source, place in _stacked(rule).items()}

    def renamed(self, key: str) -> str:
        """Return what a key is called in the installed transformers, which may fuse its tensor with others.

        Args:
            key: key of a tensor.

        Returns:
            Its new name; of a tensor that is converted, the old one in new spelling.
        """
        return rename_source_key(key, self._renamings, [])[0] if self._renamings else key

    def is_converted(self, key: str) -> bool:
        """Return whether transformers changes the values of a tensor when it loads it.

        Args:
            key: key of a tensor.

        Returns:
            Whether it does more than to rename it.
        """
        return bool(self._converters) and rename_source_key(key, self._renamings, self._converters)[1] is not None

    def place(self, key: str) -> Place | None:
        """Return the place of one expert's own tensor.

        Args:
            key: such as ``layers.0.mlp.experts.3.gate_proj.weight``.

        Returns:
            Its place; None for a tensor that is not stacked with those of other experts.
        """
        if not self._stacked:
            return None
        name, source = rename_source_key(key, self._renamings, self._converters)
        if source not in self._stacked:
            return None
        pattern, part, parts = self._stacked[source]
        match = pattern.search(self.renamed(key))
        return Place(name, int(match[1]), part, parts) if match else None


def parts_of(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Part]]:
    """Find the experts' matrices in a checkpoint, whose files hold them fused or one by one.

    Args:
        model: the body; the meta device is enough.
        shapes: key of the checkpoint -> shape of its tensor.

    Returns:
        Key -> the parts of its tensor, one for each layer that it holds.
    """
    if not (fused := fused_experts(model)):
        return {}
    names = ExpertNames(model)
    found: dict[str, list[Part]] = {}
    for key, shape in shapes.items():
        if place := names.place(key):
            parameter = _inside(place.parameter, fused)
            rows = slice(place.part * shape[0], (place.part + 1) * shape[0])
            parts = [Part(layer_of(parameter, place.expert), (), rows, False)] if parameter else []
        elif len(shape) == 3 and (parameter := _inside(names.renamed(key), fused)):
            parts = _stacked_parts(parameter, fused[parameter], shape, names.is_converted(key))
        else:
            continue
        found |= {key: parts} if parts else {}
    return found


def _stacked_parts(parameter: str, fused: FusedExperts, shape: tuple[int, ...], converted: bool) -> list[Part]:
    """A part for each expert; none where the shape does not tell whether the matrices are stored transposed."""
    (m, d), stored = fused.shape, shape[1:]
    if shape[0] != fused.count or stored not in ((m, d), (d, m)) or (m == d and converted):
        return []
    transposed = fused.transposed if m == d else stored == (d, m)
    return [Part(layer_of(parameter, e), (e,), slice(None), transposed) for e in range(fused.count)]


def _inside(name: str, fused: Mapping[str, FusedExperts]) -> str | None:
    """The parameter of the body that a name means, whatever prefix it has."""
    while name not in fused:
        _, dot, name = name.partition(".")
        if not dot:
            return None
    return name


def _stacked(rule: Any) -> dict[str, tuple[re.Pattern[str], int, int]]:
    """Source pattern -> a pattern of its keys with the expert's number as a group, which part it is, of how many.

    None of a conversion that does more than to stack experts, and to put their gate projection above the other.
    """
    stack, *rest = rule.operations
    stacks = isinstance(stack, MergeModulelist) and stack.dim == 0 and len(rule.target_patterns) == 1
    joins = len(rest) == 1 and isinstance(rest[0], Concatenate) and rest[0].dim == 1
    sources = list(rule.source_patterns)
    if not stacks or not (joins or (not rest and len(sources) == 1)):
        return {}
    return {s: (re.compile(s.replace("*", r"(\d+)")), part, len(sources)) for part, s in enumerate(sources)}


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters that a module holds itself, unless it is one of torch's own kinds, such as a convolution."""
    if not any(kind.__module__.startswith("torch.nn") for kind in type(module).__mro__ if kind is not nn.Module):
        yield from module.named_parameters(recurse=False)


def _is_transposed(own: Mapping[str, nn.Parameter]) -> bool:
    """Whether an unmarked module stores (E, in, out): the columns of its last are then the rows of its first."""
    up, down = own.get("gate_up_proj"), own.get("down_proj")
    return up is not None and down is not None and up.shape[1] == down.shape[2] and up.shape[2] != down.shape[1]
