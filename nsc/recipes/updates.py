"""What a merge adds to the base, whatever made it: the weighted sum by coefficients, or a recipe's combination.

Export, proof and report know nothing else of a merge than its layers and the update of each, made when asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsc.adapters.factors import LoraFactors
from nsc.adapters.stack import DenseStack, ModuleStack, Stack
from nsc.methods import LowRank


class Merged(Protocol):
    """The updates of a merge, layer by layer."""

    @property
    def names(self) -> list[str]:
        """The layers that are merged, in the base's order."""

    @property
    def whole(self) -> list[str]:
        """Those that adapters fine-tuned whole."""

    def update(self, name: str) -> LowRank | Tensor:
        """Return what is added to a layer's weight.

        Args:
            name: of the layer.

        Returns:
            Factors, or dense (m, d), with every scale in it.
        """

    def bias_update(self, name: str) -> Tensor | None:
        """Return what is added to a layer's bias.

        Args:
            name: of the layer.

        Returns:
            (m,), or None where nothing is added.
        """

    def in_model(self) -> tuple[Stack, Tensor]:
        """Return the whole merge as ``merged_layers`` runs it in a model.

        Returns:
            A stack and its coefficients.
        """


class WeightedSum:
    """The merge sum_k lam_k s_k B_k A_k in every layer; it implements ``Merged``.

    Args:
        stack: the adapters.
        coefficients: lam (M, K), or one for each rank row, in the shape of ``Stack.owned``.

    Attributes:
        names: the layers that are merged, in the base's order.
        whole: those that adapters fine-tuned whole.
    """

    def __init__(self, stack: Stack, coefficients: Tensor) -> None:
        self.stack, self.coefficients = stack, coefficients
        self.names, self.whole = stack.names, list(stack.dense)
        self.rows = dict(zip(self.names, coefficients, strict=True))

    def update(self, name: str) -> LowRank | Tensor:
        """Add up one layer.

        Args:
            name: of the layer.

        Returns:
            The factors ``[lam_k s_k B_k] [A_k]``, or the dense sum of a layer fine-tuned whole; float64.
        """
        layer, row = self.stack.layer(name), self.rows[name]
        if isinstance(layer, DenseStack):
            return layer.delta(row)
        return LowRank(layer.B.double() * layer.column_weights(row), layer.A.double())

    def bias_update(self, name: str) -> Tensor | None:
        """Add up the bias of a layer fine-tuned whole.

        Args:
            name: of the layer.

        Returns:
            (m,) float64; None for a layer of LoRA factors or without bias.
        """
        layer = self.stack.layer(name)
        return layer.bias_delta(self.rows[name]) if isinstance(layer, DenseStack) else None

    def in_model(self) -> tuple[Stack, Tensor]:
        """Return the adapters themselves, and the coefficients.

        Returns:
            ``stack`` and ``coefficients``.
        """
        return self.stack, self.coefficients


class FixedFactors:
    """A merge whose factors are no function of the adapters and coefficients alone; it implements ``Merged``.

    Args:
        factors: layer -> its update.
        rest: what the layers without factors get, in the base's order with all others.

    Attributes:
        factors: as given, rounded to float32, in which they are written and recorded.
        names: the layers that are merged, in the base's order.
        whole: those that adapters fine-tuned whole.
    """

    def __init__(self, factors: Mapping[str, LowRank], rest: Merged) -> None:
        self.factors = {
            name: LowRank(*(part.detach().cpu().float().double() for part in factors[name])) for name in factors
        }
        self.names, self.whole, self._rest = rest.names, rest.whole, rest

    def update(self, name: str) -> LowRank | Tensor:
        """Return what is added to a layer's weight.

        Args:
            name: of the layer.

        Returns:
            Its factors, or the dense sum of a layer fine-tuned whole; float64.
        """
        return self.factors[name] if name in self.factors else self._rest.update(name)

    def bias_update(self, name: str) -> Tensor | None:
        """Return what is added to the bias of a layer fine-tuned whole.

        Args:
            name: of the layer.

        Returns:
            (m,) float64; None for a layer of LoRA factors or without bias.
        """
        return self._rest.bias_update(name)

    def in_model(self) -> tuple[Stack, Tensor]:
        """Make all updates, as one adapter.

        Returns:
            The stack of that adapter, and its coefficients (M, 1), which are 1.
        """
        return run_as_one(self)


def fitted(stack: Stack, factors: Mapping[str, tuple[Tensor, Tensor]]) -> FixedFactors:
    """Return the merge by factors that were fitted.

    Args:
        stack: the adapters, none of which fine-tuned a layer whole.
        factors: layer -> A (r, d), B (m, r).

    Returns:
        The merge.
    """
    parts = {name: LowRank(B, A) for name, (A, B) in factors.items()}
    return FixedFactors(parts, WeightedSum(stack, torch.zeros(stack.owned.shape)))


def dense(update: LowRank | Tensor) -> Tensor:
    """Return an update as a dense matrix.

    Args:
        update: factors, or (m, d).

    Returns:
        (m, d) float64 on the CPU.
    """
    return (update.B.double() @ update.A.double() if isinstance(update, LowRank) else update.double()).cpu()


def norm(update: LowRank | Tensor) -> Tensor:
    """Return the Frobenius norm of an update, of whose factors no product (m, d) is formed.

    Args:
        update: factors, or (m, d).

    Returns:
        The norm, float64.
    """
    if isinstance(update, Tensor):
        return update.double().norm()
    B, A = update.B.double(), update.A.double()
    return ((B.mT @ B) * (A @ A.mT)).sum().clamp_min(0).sqrt()


def distance(written: LowRank | Tensor, expected: LowRank | Tensor) -> Tensor:
    """Return the Frobenius norm of the difference of two updates of one layer.

    Factors are compared without any product (m, d): B'A' - B A = (B' - B) A' + B (A' - A).

    Args:
        written: factors B', A', or (m, d).
        expected: factors B, A of any rank, or (m, d).

    Returns:
        The norm, float64; of two factored updates that differ in their bases, exact to 1e-8 of the updates' norms.
    """
    if isinstance(written, Tensor) or isinstance(expected, Tensor):
        return (dense(written) - dense(expected)).norm()
    rank = max(len(written.A), len(expected.A))
    (B1, A1), (B0, A0) = (_with_rank(update, rank) for update in (written, expected))
    if torch.equal(A1, A0):
        return norm(LowRank(B1 - B0, A1))
    return norm(LowRank(torch.cat([B1 - B0, B0], 1), torch.cat([A1, A1 - A0])))


def _with_rank(update: LowRank, rank: int) -> tuple[Tensor, Tensor]:
    more = rank - len(update.A)
    return pad(update.B.double().cpu(), (0, more)), pad(update.A.double().cpu(), (0, 0, 0, more))


def parameter_update(merged: Merged, parameter: str) -> Tensor | None:
    """Return what a merge adds to one parameter of the base.

    Args:
        merged: the merge.
        parameter: LAYER.weight or LAYER.bias, of a layer that is merged.

    Returns:
        (m, d) or (m,) float64 on the CPU; None for a bias that the merge leaves alone.
    """
    name, _, kind = parameter.rpartition(".")
    if kind == "weight":
        return dense(merged.update(name))
    update = merged.bias_update(name)
    return None if update is None else update.double().cpu()


def whole_updates(merged: Merged) -> dict[str, Tensor]:
    """Return what a merge adds to the layers that adapters fine-tuned whole.

    Args:
        merged: the merge.

    Returns:
        LAYER.weight or LAYER.bias -> what is added, float64 on the CPU.
    """
    parameters = [f"{name}.{kind}" for name in merged.whole for kind in ("weight", "bias")]
    updates = {name: parameter_update(merged, name) for name in parameters}
    return {name: update for name, update in updates.items() if update is not None}


def as_stack(updates: Mapping[str, LowRank | Tensor], biases: Mapping[str, Tensor] | None = None) -> Stack:
    """Put updates into one adapter of scale 1, to run them in a model.

    Args:
        updates: layer -> factors, or dense (m, d).
        biases: layer -> (m,), of layers whose update is dense.

    Returns:
        The stack of that adapter, whose one task is "merged".
    """
    modules, whole, biases = {}, {}, biases or {}
    for name, update in updates.items():
        if isinstance(update, LowRank):
            modules[name] = ModuleStack((update.A,), (update.B,), (len(update.A),), (1.0,), (None,), gram_inverse=None)
        else:
            bias = biases.get(name)
            whole[name] = DenseStack(update[None], None if bias is None else bias[None], [True])
    return Stack(("merged",), modules, whole, tuple(updates))


def as_lora(updates: Mapping[str, LowRank]) -> dict[str, LoraFactors]:
    """Write updates as an adapter holds them.

    Args:
        updates: layer -> its update.

    Returns:
        Layer -> factors of scale 1, rounded to float32, on the CPU.
    """
    parts = {name: (update.A.float().cpu(), update.B.float().cpu()) for name, update in updates.items()}
    return {name: LoraFactors(A, B, 1.0) for name, (A, B) in parts.items()}


def run_as_one(merged: Merged) -> tuple[Stack, Tensor]:
    """Make all updates of a merge, as one adapter.

    Args:
        merged: the merge.

    Returns:
        The stack of that adapter, and its coefficients (M, 1), which are 1.
    """
    biases = {name: update for name in merged.whole if (update := merged.bias_update(name)) is not None}
    stack = as_stack({name: merged.update(name) for name in merged.names}, biases)
    return stack, torch.ones(len(stack.names), 1)
