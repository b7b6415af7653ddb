"""What a merge adds to the base, whatever made it: the weighted sum by coefficients, or another method's combination.

Export, proof and report know nothing else of a merge: its layers, and the update of each, made when it is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from nsc.adapters.stack import DenseStack, ModuleStack, Stack
from nsc.methods import LowRank


class Merged(Protocol):
    """The updates of a merge, by layer."""

    @property
    def names(self) -> list[str]:
        """Of all layers that are merged, in the base's own order."""

    @property
    def whole(self) -> list[str]:
        """Those among them that adapters fine-tuned whole."""

    def update(self, name: str) -> LowRank | Tensor:
        """What is added to a layer's weight, with every scale in it: factors, or dense (m, d)."""

    def bias_update(self, name: str) -> Tensor | None:
        """(m,): what is added to its bias; None where there is nothing."""

    def in_model(self) -> tuple[Stack, Tensor]:
        """All of it as ``merged_layers`` runs it in a model: a stack and its coefficients."""


class WeightedSum:
    """sum_k lam_k s_k B_k A_k in every layer. coefficients: (M, K), or of rank rows, as ``Stack.owned`` has them."""

    def __init__(self, stack: Stack, coefficients: Tensor) -> None:
        self.stack, self.coefficients = stack, coefficients
        self.rows = dict(zip(stack.names, coefficients, strict=True))

    @property
    def names(self) -> list[str]:
        """Of the stack."""
        return self.stack.names

    @property
    def whole(self) -> list[str]:
        """Of the stack."""
        return list(self.stack.dense)

    def update(self, name: str) -> LowRank | Tensor:
        """``[lam_k s_k B_k] [A_k]``, or the sum of the differences of a layer fine-tuned whole; float64."""
        layer, row = self.stack.layer(name), self.rows[name]
        if isinstance(layer, DenseStack):
            return layer.delta(row)
        return LowRank(layer.B.double() * layer.column_weights(row), layer.A.double())

    def bias_update(self, name: str) -> Tensor | None:
        """Of a layer fine-tuned whole."""
        layer = self.stack.layer(name)
        return layer.bias_delta(self.rows[name]) if isinstance(layer, DenseStack) else None

    def in_model(self) -> tuple[Stack, Tensor]:
        """The adapters themselves, and the coefficients."""
        return self.stack, self.coefficients


def dense(update: LowRank | Tensor) -> Tensor:
    """(m, d) float64 on the CPU."""
    return (update.B @ update.A if isinstance(update, LowRank) else update.double()).cpu()


def parameter_update(merged: Merged, parameter: str) -> Tensor | None:
    """(m, d) or (m,) float64 on the CPU for a layer's weight or bias, None where the merge leaves it alone."""
    name, _, kind = parameter.rpartition(".")
    if kind == "weight":
        return dense(merged.update(name))
    update = merged.bias_update(name)
    return None if update is None else update.double().cpu()


def whole_updates(merged: Merged) -> dict[str, Tensor]:
    """Parameter that adapters fine-tuned whole -> what the merge adds to it, float64 on the CPU."""
    parameters = [f"{name}.{kind}" for name in merged.whole for kind in ("weight", "bias")]
    found = {name: parameter_update(merged, name) for name in parameters}
    return {name: update for name, update in found.items() if update is not None}


def as_stack(updates: Mapping[str, LowRank | Tensor], biases: Mapping[str, Tensor] | None = None) -> Stack:
    """Updates as one adapter of scale 1, to run them in a model: factors, or dense (m, d) with biases (m,)."""
    modules, whole, biases = {}, {}, biases or {}
    for name, update in updates.items():
        if isinstance(update, LowRank):
            modules[name] = ModuleStack(update.A, update.B, (len(update.A),), (1.0,), (None,), gram_inverse=None)
        else:
            bias = biases.get(name)
            whole[name] = DenseStack(update[None], None if bias is None else bias[None], [True])
    return Stack(("merged",), modules, whole, tuple(updates))


def run_as_one(merged: Merged) -> tuple[Stack, Tensor]:
    """All updates in memory as one adapter with the coefficient 1."""
    biases = {name: update for name in merged.whole if (update := merged.bias_update(name)) is not None}
    stack = as_stack({name: merged.update(name) for name in merged.names}, biases)
    return stack, torch.ones(len(stack.names), 1)
