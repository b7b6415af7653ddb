"""Merged experts and routers: factors as PEFT keeps LoRA on parameters, updates as checkpoints hold experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import peft
from packaging.version import Version
from torch import Tensor

from nsc.adapters.fused_layers import SWAPPED_SINCE
from nsc.adapters.target_parameters import INNER, packed
from nsc.bases.base_model import Base
from nsc.bases.experts import FusedExperts, Part, expert_of, fused_experts, layer_of, router_shapes
from nsc.errors import NSCError
from nsc.recipes.merged_factors import MergedFactors
from nsc.recipes.updates import Merged, dense

PARAMETERS_SINCE = Version("0.17")  # of PEFT
# Last parts of module names that PEFT, on a base with experts, takes for transformers 4's experts and routers.
TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")


@dataclass(frozen=True)
class ParameterFactors:
    """The factors of one parameter.

    Attributes:
        module: name of the module in the keys of the adapter.
        A: (E r, in).
        B: (out, r E).
        rank: r.
    """

    module: str
    A: Tensor
    B: Tensor
    rank: int


def split_by_parameter(
    base: Base, factors: Mapping[str, MergedFactors]
) -> tuple[dict[str, MergedFactors], dict[str, ParameterFactors]]:
    """Separate the factors that PEFT keeps on modules from those that it keeps on parameters.

    Args:
        base: the base; its weights need not be loaded.
        factors: layer -> its factors.

    Returns:
        Module -> its factors, and full name of the parameter -> its factors.

    Raises:
        NSCError: if the installed PEFT knows no LoRA on parameters; or as ``Base.model``, for experts.
    """
    try:
        fused, routers = fused_experts(base.model), router_shapes(base.model)
    except NSCError:  # a recorded merge is repeated without its base
        if any(map(expert_of, factors)):
            raise
        return dict(factors), {}
    stacked = [name for name in fused if any(layer_of(name, e) in factors for e in range(fused[name].count))]
    found = {name: _packed(_module(name, stacked), name, fused[name], factors) for name in stacked}
    modules = {}
    for name, f in factors.items():
        if name in routers or (fused and name.rpartition(".")[2] in TAKEN_FOR_EXPERTS):
            found[f"{name}.weight"] = ParameterFactors(name, f.A, f.B, len(f.A))
        elif not expert_of(name):
            modules[name] = f
    if found and Version(peft.__version__) < PARAMETERS_SINCE:
        raise NSCError(
            f"PEFT {peft.__version__} knows no LoRA on parameters, such as {next(iter(found))}: install PEFT"
            f" {PARAMETERS_SINCE} or newer, or give --full for the whole model"
        )
    return modules, found


def part_updates(merged: Merged, parts: Sequence[Part]) -> Iterator[tuple[tuple[int, ...], Tensor]]:
    """Return what a merge adds to the parts of a tensor that are rows of experts.

    Args:
        merged: the merge.
        parts: where they lie.

    Yields:
        Index of the part in the tensor, and what is added to it, float64 on the CPU, as it is stored.
    """
    for part in parts:
        update = dense(merged.update(part.layer))[part.rows]
        yield part.at, update.mT if part.transposed else update


def _module(parameter: str, stacked: list[str]) -> str:
    """The module of a parameter's keys: parameters that are registered later are wrapped around it."""
    holder = parameter.rpartition(".")[0]
    siblings = [name for name in stacked if name.rpartition(".")[0] == holder]
    return holder + INNER * (len(siblings) - 1 - siblings.index(parameter))


def _packed(
    module: str, parameter: str, experts: FusedExperts, factors: Mapping[str, MergedFactors]
) -> ParameterFactors:
    """All experts together; those that no adapter touches get zeros."""
    pairs = {e: factors.get(layer_of(parameter, e)) for e in range(experts.count)}
    some = next(f for f in pairs.values() if f)
    sides = [(f.A, f.B) if f else (some.A[:0], some.B[:, :0]) for f in pairs.values()]
    return ParameterFactors(module, *packed([(B.mT, A.mT) for A, B in sides] if _is_turned(experts) else sides))


def _is_turned(experts: FusedExperts) -> bool:
    """Whether the installed PEFT has A over the outputs of these matrices."""
    if Version(peft.__version__) < SWAPPED_SINCE:
        return not experts.transposed
    return experts.marked != experts.transposed
