"""A frozen linear layer carrying many LoRA adapters at once, each with its own coefficient.

    y = base(z) + (u * c) B'        u = z A'        c = lam_k s_k on the segment of adapter k

Only ``lam`` trains. With frozen factors autograd keeps ``u`` and the frozen matrices for the backward, nothing else:

    v = dy B        dlam_k = s_k sum over rows and segment k of (u * v)        dz = base'(dy) + (c * v + dL/du) A

Layers that read the same tensor, such as q, k and v, can share the pass over it, forward and backward: ``Siblings``.

That is plan "factors". Plan "weights" makes W = W0 + B diag(c) A in every forward instead, so that only the frozen
layer's own products run over the rows in the forward and for dz; and dc from dW = dy' z or, where R is small, from
u * v as above. Both plans compute the same. For n rows they add to the FLOPs of the frozen layer, forward and backward,

    factors: 4 n R (d + m)          weights: 2 R d m + min(2 n d m + 2 R d m, 2 n R (d + m))

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model W0 + sum_k lam_k B_k A_k).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nsc_kernels.lora_down import lora_fork
from nsc_kernels.lora_fold import lora_fold
from nsc_kernels.lora_up import coefficient_gradient, lora_up

PLANS = ("factors", "weights")
WORTH = 0.1  # of the frozen layer's FLOPs, forward and backward


def extra_flops(plan: str, n: int, d: int, m: int, R: int) -> int:
    """Return the FLOPs that the adapters of a merged layer add to those of the frozen layer, forward and backward.

    Args:
        plan: one of ``PLANS``.
        n: rows, such as the tokens of a step.
        d: inputs of the layer.
        m: outputs of the layer; 0 with plan "factors" for a layer of which only u is needed.
        R: the ranks of all adapters on the layer, added up.

    Returns:
        Two for each multiplication and addition.
    """
    if plan == "factors":
        return 4 * n * R * (d + m)
    return 2 * R * d * m + min(_gradient_flops(n, d, m, R))


def _gradient_flops(n: int, d: int, m: int, R: int) -> tuple[int, int]:
    """Of dc where the weight is folded: from dW, and from rows."""
    return 2 * (n + R) * d * m, 2 * n * R * (d + m)


def layer_plan(n: int, d: int, m: int, R: int) -> str:
    """Return "weights" where it saves at least a tenth of the frozen layer's FLOPs, else "factors".

    "weights" holds a second weight until the backward, so it must be worth it. With d = m it is for many rows, of
    adapters whose ranks add up to a tenth of the width or more.

    Args:
        n, d, m, R: as ``extra_flops`` takes them.

    Returns:
        One of ``PLANS``.
    """
    saved = extra_flops("factors", n, d, m, R) - extra_flops("weights", n, d, m, R)
    return "weights" if saved > 0 and saved >= WORTH * 4 * n * d * m else "factors"


class MergedLoRALinear(nn.Module):
    """A frozen linear layer plus K stacked adapters, weighted by ``lam``.

    Only ``lam`` trains. The factors are buffers that are left out of the state dict; they are cast to the dtype of z in
    every forward. The coefficients are computed in their own dtype, also under autocast.

    Attributes:
        lora_A: (R, d), buffer; a view of a shared one where the layer has ``siblings``.
        lora_B: (m, R), buffer.
        spread: buffer, (K, R), or (R, R) by rank: ``lam @ spread`` is the weight of each column of u.
        offsets: (K + 1,) int, buffer: adapter k owns columns ``offsets[k]:offsets[k + 1]`` of u.
        base, lam, watch, plan: as given; ``lam`` and ``watch`` may be replaced between forwards.
        folded: (m, d) W of plan "weights" inside ``folded_once``, else None.
        siblings: the ``Siblings`` that the layer belongs to, or None.

    Args:
        base: any module mapping (..., d) to (..., m), left as it is; an ``nn.Linear`` for plan "weights".
        lora_A: (R, d) the adapters' down-projections, stacked.
        lora_B: (m, R) the adapters' up-projections side by side.
        ranks: r_k of each adapter, R in sum; 0 where an adapter does not touch this layer.
        scales: s_k of each adapter, alpha over r.
        lam: (K,) coefficients, an ``nn.Parameter`` or a row of a larger one; with ``by_rank`` (R,).
        watch: called in every forward before the base layer runs, with u (..., R) and the energy ``|z|^2`` (...,), for
            ``ratio_from_energy``.
        plan: "factors" or "weights", see ``layer_plan``.
        by_rank: whether there is a coefficient for every row of lora_A instead of every adapter.

    Raises:
        ValueError: if the shapes do not fit together, or the plan is unknown or does not suit the base.

    Example:
        >>> base = torch.nn.Linear(64, 48).requires_grad_(False)
        >>> lam = torch.nn.Parameter(torch.full((2,), 0.4))
        >>> A, B = torch.randn(20, 64), torch.randn(48, 20)  # of ranks 4 and 16, side by side
        >>> layer = MergedLoRALinear(base, A, B, ranks=(4, 16), scales=(1.0, 2.0), lam=lam)
        >>> layer(torch.randn(32, 64)).sum().backward()  # lam.grad: (2,)

    Source: https://arxiv.org/abs/2603.26317, Eq. 5.
    """

    lora_A: Tensor
    lora_B: Tensor
    spread: Tensor
    offsets: Tensor

    def __init__(
        self,
        base: nn.Module,
        lora_A: Tensor,  # (R, d)
        lora_B: Tensor,  # (m, R)
        ranks: Sequence[int],  # K of them
        scales: Sequence[float],  # K of them
        lam: Tensor,  # (K,)
        watch: Callable[[Tensor, Tensor], None] | None = None,
        plan: str = "factors",
        by_rank: bool = False,
    ) -> None:
        super().__init__()
        _check_shapes(lora_A, lora_B, ranks, scales, lam, by_rank)
        if plan not in PLANS:
            raise ValueError(f"plan must be factors or weights, not {plan!r}")
        if plan == "weights" and type(base) is not nn.Linear:
            raise ValueError(f"plan weights needs an nn.Linear as base, not {type(base).__name__}; use plan factors")
        self.plan = plan
        self.base = base
        self.watch = watch
        self.siblings: Siblings | None = None
        self.folded: Tensor | None = None
        self._buffer: Tensor | None = None  # of ``folded``, whose address recorded graphs keep
        self.lam = lam
        offsets = [0, *accumulate(ranks)]
        spread = torch.zeros(len(ranks), offsets[-1], dtype=lam.dtype)
        for k, scale in enumerate(scales):
            spread[k, offsets[k] : offsets[k + 1]] = scale
        if by_rank:
            spread = torch.diag(spread.sum(0))
        self.register_buffer("lora_A", lora_A, persistent=False)
        self.register_buffer("lora_B", lora_B, persistent=False)
        self.register_buffer("spread", spread.to(lora_A.device), persistent=False)
        self.register_buffer("offsets", torch.tensor(offsets, device=lora_A.device), persistent=False)

    def forward(self, z: Tensor) -> Tensor:
        """Return the output of the merged layer, after ``watch`` has been called.

        Args:
            z: (..., d), any floating dtype that the base takes.

        Returns:
            (..., m) in the dtype of the base's output. Differentiable in z and ``lam``.
        """
        lora_B, c = self.lora_B.to(z.dtype), self._weights()
        z, u = self._down(z)
        if self.plan == "factors":
            return lora_up(self.base(z), u, c, lora_B)  # type: ignore[arg-type]  # this plan makes it
        lora_A, (m, d) = self.lora_A.to(z.dtype), self.weight.shape
        folded = self.folded
        if folded is None:
            folded = lora_fold(self.weight, lora_B, c.detach(), lora_A)
        if not c.requires_grad:
            return F.linear(z, folded, self.bias)
        from_weight, from_rows = _gradient_flops(z.shape[:-1].numel(), d, m, len(c))
        if from_weight <= from_rows:
            return F.linear(z, _CoefficientGradient.apply(folded, lora_B, c, lora_A.mT), self.bias)
        y = F.linear(z, folded, self.bias)
        u = lora_fork(z.detach(), lora_A, energy=False)[1] if u is None else u.detach()
        return _CoefficientGradient.apply(y, u, c, lora_B)

    def _weights(self) -> Tensor:
        """The weight of each column of u, (R,)."""
        with torch.autocast(self.lam.device.type, enabled=False):  # it would round the coefficients
            return self.lam @ self.spread

    @torch.no_grad()
    def _fold(self) -> None:
        """Set ``folded`` by the coefficients as they are."""
        if self._buffer is None:
            self._buffer = torch.empty_like(self.weight)
        A, B = self.lora_A.to(self.weight.dtype), self.lora_B.to(self.weight.dtype)
        self.folded = lora_fold(self.weight, B, self._weights(), A, out=self._buffer)

    @property
    def weight(self) -> Tensor:
        """The weight of the base alone (m, d), as PEFT's layers show it.

        torch's MultiheadAttention reads it and never runs the layer.
        """
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base (m,), or None."""
        return self.base.bias  # type: ignore[return-value]

    def _down(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return z for the base layer, and u where it is needed; ``watch`` has been called."""
        if self.siblings is not None and (shared := self.siblings.down(self, z)) is not None:
            return shared
        if self.watch is None and self.plan == "weights":
            return z, None
        z, u, energy = lora_fork(z, self.lora_A.to(z.dtype), energy=self.watch is not None)
        if self.watch is not None:
            self.watch(u, energy)  # type: ignore[arg-type]  # it was asked for
        return z, u


@contextmanager
def folded_once(layers: Sequence[MergedLoRALinear]) -> Iterator[None]:
    """Fold each layer of plan "weights" once, for all forwards inside, which differ in nothing but speed.

    The folded weights stay where they are from one use to the next, so that recorded graphs can read them.

    Args:
        layers: whose ``lam`` is set already, and keeps its value until the end; layers of plan "factors" stay as they
            are.

    Yields:
        Nothing.

    Example:
        >>> with folded_once(layers):  # of a model
        ...     for rows in passes:
        ...         model(rows).sum().backward()
    """
    folding = [layer for layer in layers if layer.plan == "weights"]
    try:
        for layer in folding:
            layer._fold()
        yield
    finally:
        for layer in folding:
            layer.folded = None


class _CoefficientGradient(torch.autograd.Function):
    """Y + (U * c) W', made before with c detached, and its gradient to c; W' is lora_B (m, R) as ``lora_up`` has it.

    Y is the output of a layer, with u of its rows; or its folded weight, with lora_B for u and A' for lora_B.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, u: Tensor, c: Tensor, lora_B: Tensor) -> Tensor:
        ctx.save_for_backward(u, c, lora_B)
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        u, c, lora_B = ctx.saved_tensors
        return dy, None, coefficient_gradient(dy, u.to(dy.dtype), c, lora_B.to(dy.dtype)).to(c.dtype), None


class Siblings:
    """Layers that read the very same tensor, such as q, k and v, and share one pass over it, forward and backward.

    When the first layer is entered, u of all layers is made and every ``watch`` called; the gradients that return
    through all of them are added to dz in one pass. Each of the other layers checks that it is given that same tensor,
    unchanged, and works alone if not. Nothing is kept once all layers have run.

    Attributes:
        members: the layers, as given.
        lora_A: (sum of R, d), of which every layer's ``lora_A`` becomes a view.
        ends: set to True by a watcher that will end the forward here; then only u of watched layers is made.

    Args:
        members: the layers in the order in which they run.

    Raises:
        ValueError: if the layers' ``lora_A`` do not agree in width, dtype and device.

    Example:
        >>> siblings = Siblings([q_proj, k_proj, v_proj])  # each a MergedLoRALinear
    """

    def __init__(self, members: Sequence[MergedLoRALinear]) -> None:
        if len({(x.lora_A.shape[1], x.lora_A.dtype, x.lora_A.device) for x in members}) != 1:
            raise ValueError("siblings read one tensor: their lora_A must agree in width, dtype and device")
        self.members = list(members)
        self.lora_A = torch.cat([x.lora_A for x in members])  # (sum of R, d)
        for member, lora_A in zip(members, self.lora_A.split(_widths(members)), strict=True):
            member.lora_A = lora_A
            member.siblings = self
        self.ends = False
        self.clear()

    def clear(self) -> None:
        """Forget the tensor that was read, after a forward that did not reach all layers."""
        self._read: tuple[Tensor, int] | None = None
        self._handed: Tensor | None = None
        self._u: dict[MergedLoRALinear, Tensor] = {}

    def down(self, member: MergedLoRALinear, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return what one layer needs of the shared pass, making that pass if the layer is the first.

        Args:
            member: the layer that runs.
            z: (..., d), the tensor that it was given.

        Returns:
            z for its base layer and its u (..., R), or None if it must make its own.
        """
        if member is self.members[0]:
            self._fork(z)
        handed, read = self._handed, self._read
        if handed is None or read is None or read[0] is not z or read[1] != _version(z) or member not in self._u:
            return None
        u = self._u.pop(member)
        if not self._u:
            self.clear()
        return handed, u

    def _fork(self, z: Tensor) -> None:
        self.clear()
        watched = [x for x in self.members if x.watch is not None]
        wanted = watched if self.ends else self.members
        lora_A = self.lora_A if wanted is self.members else torch.cat([x.lora_A for x in wanted])
        handed, u, energy = lora_fork(z, lora_A.to(z.dtype), energy=bool(watched))
        parts = dict(zip(wanted, u.split(_widths(wanted), dim=-1), strict=True))
        for x in watched:
            x.watch(parts[x], energy)  # type: ignore[misc, arg-type]  # both are there
        self._read, self._handed, self._u = (z, _version(z)), handed, parts


def _widths(layers: Sequence[MergedLoRALinear]) -> list[int]:
    return [layer.lora_A.shape[0] for layer in layers]


def _version(z: Tensor) -> int:
    """Return how often z has been written to; inference tensors do not count that."""
    return 0 if z.is_inference() else z._version


def _check_shapes(
    lora_A: Tensor, lora_B: Tensor, ranks: Sequence[int], scales: Sequence[float], lam: Tensor, by_rank: bool
) -> None:
    if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
        raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} must be (R, d) and (m, R)")
    if sum(ranks) != lora_A.shape[0]:
        raise ValueError(f"ranks {list(ranks)} add up to {sum(ranks)}, but lora_A has {lora_A.shape[0]} rows")
    length = lora_A.shape[0] if by_rank else len(ranks)
    if len(ranks) != len(scales) or lam.shape != (length,):
        of = "of length R" if by_rank else "of one length K"
        raise ValueError(f"{len(ranks)} ranks, {len(scales)} scales and lam {tuple(lam.shape)} must be {of}")
