"""PEFT's layout of LoRA on parameters (``target_parameters``), such as those that hold all experts of a block.

One pair of factors serves all E experts: A (E r, in), whose rows come expert by expert, and B (out, r E), whose
columns come rank by rank. Its keys are those of the module that holds the parameter. Several parameters of one module
are wrapped around each other, the one registered last outermost, and each ``base_layer`` in a key is one step inwards.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.patterns import pattern_matches

INNER = ".base_layer"
REGISTERED_LAST = ("down", "output", "w2", "fc2")  # what leads out of an expert, in every family of transformers


def wrapped_parameters(config: Mapping[str, Any], modules: Iterable[str]) -> dict[str, str]:
    """Find the parameter that each pair of factors is on, where it is on one.

    Args:
        config: adapter_config.json.
        modules: names of modules in the keys of the adapter.

    Returns:
        Module -> full name of the parameter, such as ``model.layers.0.mlp.experts.down_proj``; modules with plain LoRA
        are left out.

    Raises:
        ValueError: saying which module has more or fewer factors than its config targets parameters.
    """
    targets = config.get("target_parameters") or []
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise ValueError("target_parameters is no list of names")
    depths: dict[str, int] = {}
    for module in modules:
        holder, depth = _holder(module)
        depths[holder] = max(depths.get(holder, 0), depth)
    found: dict[str, str] = {}
    for holder, depth in depths.items():
        named = [key for key in map(_split, targets) if _is_on(key, holder, config)]
        whole = [key for key in named if key[0]]  # a name alone may be one of another module's
        parameters = registered_order(whole if len({*whole}) == depth + 1 else named)
        if parameters and len(parameters) != depth + 1:
            listed = ", ".join(parameters)
            raise ValueError(f"target_parameters names {listed} of '{holder}', which has {depth + 1} pairs of factors")
        found |= {holder + INNER * (depth - i): f"{holder}.{name}" for i, name in enumerate(parameters)}
    return found


def registered_order(parameters: Iterable[Any]) -> list[str]:
    """Return parameters of one module in the order in which transformers' modules register them.

    Args:
        parameters: their names, or pairs of module and name.

    Returns:
        The names, innermost wrapper first.
    """
    names = {name if isinstance(name, str) else name[1] for name in parameters}
    return sorted(names, key=lambda name: (name.startswith(REGISTERED_LAST), name))


def unpacked(A: Tensor, B: Tensor, rank: int) -> list[tuple[Tensor, Tensor]]:
    """Split factors on a parameter into those of each expert.

    Args:
        A: (E r, in).
        B: (out, r E).
        rank: r.

    Returns:
        A (r, in) and B (out, r) of each of the E experts.
    """
    count = len(A) // rank
    return [(a, B[:, expert::count]) for expert, a in enumerate(A.split(rank))]


def packed(factors: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
    """Put the factors of experts together, with zeros up to the largest rank; the inverse of ``unpacked``.

    Args:
        factors: A (r_e, in) and B (out, r_e) of each of the E experts.

    Returns:
        A (E r, in), B (out, r E), and r.
    """
    rank = max(len(a) for a, _ in factors)
    A = torch.cat([_padded(a, rank) for a, _ in factors])
    B = torch.stack([_padded(b.mT, rank).mT for _, b in factors], dim=2)  # (out, r, E)
    return A, B.flatten(1), rank


def _padded(rows: Tensor, rank: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(rank - len(rows), rows.shape[1])])


def _holder(module: str) -> tuple[str, int]:
    """The module that holds the parameter, and how many wrappers lie around this one."""
    holder = re.sub(rf"({re.escape(INNER)})+$", "", module)
    return holder, (len(module) - len(holder)) // len(INNER)


def _split(target: str) -> tuple[str, str]:
    module, _, name = target.rpartition(".")
    return module, name


def _is_on(target: tuple[str, str], holder: str, config: Mapping[str, Any]) -> bool:
    """Whether a target names a parameter of this module, by PEFT's rule: the full name ends with the target's."""
    module, _ = target
    if module:
        return f".{holder}".endswith(f".{module}")
    modules = config.get("target_modules") or []  # of a name alone, any module may have such a parameter
    if isinstance(modules, str):
        return not pattern_matches(rf"(?:{modules})\Z", holder)
    return not any(f".{holder}".endswith(f".{name}") for name in modules)
