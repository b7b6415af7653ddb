"""Linear layers that adapters fine-tuned whole (modules_to_save): merged as differences, or kept, or refused.

A task's own head lies outside the body, where no gradient arrives, and is always kept. What lies inside is merged by
coefficients of its own, W0 + sum_k lam_k (W_k - W0), and refused by name where it is no such layer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.stack import DenseStack
from nsc.bases import structure
from nsc.bases.base_model import Base
from nsc.bases.module_names import resolve_saved
from nsc.bases.weights import read_layers
from nsc.errors import NameMismatch, NSCError

KEEP = "keep it for its own task with keep_modules, or retrain with LoRA on that layer instead"


@dataclass(frozen=True)
class BaseLayers:
    """The layers of a base's body.

    Attributes:
        linears: name -> (out, in).
        parameters: names of all parameters.
        tied: names of parameters, also outside the body, that share one tensor with another parameter.
        transposed: weights that the base stores as (in, out).
        behind: those of the linears that lie behind the body, such as lm_head.
    """

    linears: Mapping[str, tuple[int, int]]
    parameters: Sequence[str]
    tied: Collection[str] = ()
    transposed: Collection[str] = ()
    behind: Collection[str] = ()


def split_saved(
    adapters: Mapping[str, Adapter], matches: Mapping[str, Mapping[str, str]], body: BaseLayers, keep: Sequence[str]
) -> tuple[dict[str, Adapter], dict[str, dict[str, Tensor]]]:
    """Separate the modules_to_save tensors that each task keeps from those that are merged.

    Args:
        adapters: task -> adapter.
        matches: task -> adapter's module name -> base's.
        body: the layers of the base.
        keep: suffixes of modules that are not merged.

    Returns:
        Adapters with what each task keeps, and task -> parameter of the body -> what it was fine-tuned to.

    Raises:
        NameMismatch: with the reason, for a tensor that can be neither kept nor merged.
        NSCError: for a suffix that matches nothing.
    """
    kept: dict[str, Adapter] = {}
    merged: dict[str, dict[str, Tensor]] = {}
    known = {name.rpartition(".")[0] for adapter in adapters.values() for name in adapter.saved}
    if strange := [suffix for suffix in keep if not any(f".{name}".endswith(f".{suffix}") for name in known)]:
        raise NSCError(
            f"keep_modules names {strange[0]}, but modules_to_save of these adapters holds"
            f" {', '.join(sorted(known)) or 'nothing'}"
        )
    for task, adapter in adapters.items():
        names = [n for n in adapter.saved if not _is_kept(n, keep)]
        inside = {n: p for n, p in resolve_saved(task, names, matches[task], body.parameters).items() if p}
        _refuse_tied(task, names, inside, body)
        merged[task] = {p: adapter.saved[n] for n, p in inside.items()}
        _require_linears(task, merged[task], body)
        kept[task] = replace(
            adapter,
            saved={n: x for n, x in adapter.saved.items() if n not in inside},
            behind=next((name for name in body.behind if f"{name}.weight" in merged[task]), None),
        )
    _refuse_lora_beside(merged, matches)
    return kept, merged


def dense_stacks(base: Base, merged: Mapping[str, Mapping[str, Tensor]]) -> dict[str, DenseStack]:
    """Return the differences of the layers that adapters fine-tuned whole, from the base's own checkpoint.

    Args:
        base: whose checkpoint is read, if there is any such layer.
        merged: task -> parameter -> tensor.

    Returns:
        Module -> differences in at least float32.

    Raises:
        NSCError: if the checkpoint cannot be read.
    """
    modules = sorted({name.rpartition(".")[0] for parameters in merged.values() for name in parameters})
    stored = read_layers(base, modules) if modules else {}
    return {module: _dense_stack(module, merged, stored) for module in modules}


def parameters_of(dense: Mapping[str, DenseStack]) -> list[str]:
    """Return the names of the parameters that are merged.

    Args:
        dense: module -> differences.

    Returns:
        Parameter names.
    """
    biases = [f"{name}.bias" for name, stack in dense.items() if stack.bias_deltas is not None]
    return [f"{name}.weight" for name in dense] + biases


def _dense_stack(module: str, merged: Mapping[str, Mapping[str, Tensor]], stored: Mapping[str, Tensor]) -> DenseStack:
    present = [f"{module}.weight" in parameters for parameters in merged.values()]

    def differences(name: str) -> Tensor | None:
        if name not in stored:
            return None
        found = [parameters[name] for parameters in merged.values() if name in parameters]
        dtype = torch.promote_types(found[0].dtype, torch.promote_types(stored[name].dtype, torch.float32))
        return torch.stack([(tensor.double() - stored[name].double()).to(dtype) for tensor in found])

    weight = differences(f"{module}.weight")
    assert weight is not None  # every linear has one
    return DenseStack(weight, differences(f"{module}.bias"), present)


def _is_kept(name: str, keep: Sequence[str]) -> bool:
    module = name.rpartition(".")[0]
    return any(f".{module}".endswith(f".{suffix}") for suffix in keep)


def _refuse_tied(task: str, names: Sequence[str], inside: Mapping[str, str], body: BaseLayers) -> None:
    for name in names:
        there = inside.get(name) or next((t for t in body.tied if name == t or name.endswith(f".{t}")), None)
        if there in body.tied:
            raise NameMismatch(
                f"adapter {task}: modules_to_save holds {name}, which the base ties to another parameter: merged, it"
                f" would change both, or untie them; {KEEP}"
            )


def _require_linears(task: str, parameters: Mapping[str, Tensor], body: BaseLayers) -> None:
    for name, tensor in parameters.items():
        module, _, kind = name.rpartition(".")
        where = f"adapter {task}: modules_to_save holds {name}"
        if module not in body.linears:
            raise NameMismatch(f"{where}, which is no linear layer of the base (an embedding, a norm...); {KEEP}")
        if f"{module}.weight" in body.transposed:
            raise NameMismatch(f"{where}, whose weight the base stores transposed (Conv1D); {KEEP}")
        m, d = body.linears[module]
        expected = {"weight": (m, d), "bias": (m,)}.get(kind)
        if tuple(tensor.shape) != expected:
            raise NameMismatch(
                f"{where} of shape {tuple(tensor.shape)}, but the base's is {expected}: no difference can be taken;"
                f" {KEEP}"
            )
        lacking = [p for p in (f"{module}.weight", f"{module}.bias") if p in body.parameters and p not in parameters]
        if lacking:
            raise NameMismatch(f"{where} without {lacking[0]}, which the base has; save the whole layer")


def _refuse_lora_beside(merged: Mapping[str, Mapping[str, Tensor]], matches: Mapping[str, Mapping[str, str]]) -> None:
    lora = {base: task for task, mapping in matches.items() for base in mapping.values()}
    for task, parameters in merged.items():
        for name in parameters:
            if other := lora.get(name.rpartition(".")[0]):
                raise NameMismatch(
                    f"adapter {task} fine-tuned {name.rpartition('.')[0]} whole, adapter {other} by LoRA: one layer is"
                    f" merged in one way; {KEEP}"
                )


def without_body(model: nn.Module, adapter: Adapter) -> Adapter:
    """Return an adapter without the layers inside the body that its task keeps, which are no head.

    Args:
        model: the body.
        adapter: the adapter.

    Returns:
        The adapter; what is left in ``saved`` is its head.

    Raises:
        NSCError: if the adapter fine-tuned the base's own layer over the vocabulary, by which its outputs differ.
    """
    if adapter.behind:
        raise NSCError(
            f"adapter {adapter.name} fine-tuned {adapter.behind} whole, so the base's own cannot say what it says of"
            " its tokens: merge by nsc, or by a method that learns and searches nothing"
        )
    ends = tuple(f".{name}" for name in structure.linear_shapes(model))
    kept = [name for name in adapter.saved if f".{name.rpartition('.')[0]}".endswith(ends)]
    return replace(adapter, saved={name: x for name, x in adapter.saved.items() if name not in kept})
