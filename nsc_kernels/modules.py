"""A frozen linear layer carrying many LoRA adapters at once, each with its own coefficient.

    y = base(z) + (u * c) B'        u = z A'        c = lam_k s_k on the segment of adapter k

Only ``lam`` trains. With frozen factors autograd keeps ``u`` and the frozen matrices for the backward, nothing else:

    v = dy B        dlam_k = s_k sum over rows and segment k of (u * v)        dz = base'(dy) + (c * v + dL/du) A

Layers that read the same tensor, such as q, k and v, can share the pass over it, forward and backward: ``Siblings``.

That is plan "factors". Plan "weights" makes W = W0 + B diag(c) A in every forward instead, and dc from dW = dy' z:
fewer FLOPs where the ranks add up to more than about a quarter of the width. Both compute the same.

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model W0 + sum_k lam_k B_k A_k).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc_kernels.lora_down import lora_fork
from nsc_kernels.lora_fold import lora_fold
from nsc_kernels.lora_up import lora_up


class MergedLoRALinear(nn.Module):
    """``base`` plus K stacked adapters, weighted by ``lam``.

    base: any module mapping (..., d) to (..., m), left as it is.  lora_A: (R, d).  lora_B: (m, R).  ranks: r_k of each
    adapter, R in sum, 0 where an adapter does not touch this layer.  scales: s_k, alpha over r, of each adapter.
    lam: (K,) coefficients; an ``nn.Parameter``, or a row of a larger one; with ``by_rank`` (R,), one for every row of
    lora_A.  watch: called in every forward, before the
    base layer runs, with u (..., R) and the energy ``|z|^2`` (...,), for ``ratio_from_energy``.  plan: "factors", or
    "weights", for which base must be an ``nn.Linear``. Raises ValueError when the shapes do not follow one another.
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
        if plan not in ("factors", "weights"):
            raise ValueError(f"plan must be factors or weights, not {plan!r}")
        if plan == "weights" and type(base) is not nn.Linear:
            raise ValueError(f"plan weights needs an nn.Linear as base, not {type(base).__name__}; use plan factors")
        self.plan = plan
        self.base = base
        self.watch = watch
        self.siblings: Siblings | None = None
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
        """z: (..., d) -> (..., m)."""
        lora_B = self.lora_B.to(z.dtype)
        with torch.autocast(z.device.type, enabled=False):  # it would round the coefficients
            c = self.lam @ self.spread  # (R,)
        z, u = self._down(z)
        if self.plan == "factors":
            return lora_up(self.base(z), u, c, lora_B)  # type: ignore[arg-type]  # this plan makes it
        weight = lora_fold(self.base.weight, lora_B, c, self.lora_A.to(z.dtype))  # type: ignore[arg-type]
        return F.linear(z, weight, self.base.bias)  # type: ignore[arg-type]  # it is an nn.Linear

    @property
    def weight(self) -> Tensor:
        """The base's alone, as PEFT's layers have it: torch's MultiheadAttention reads it and never runs the layer."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """Likewise."""
        return self.base.bias  # type: ignore[return-value]

    def _down(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        """z for the base layer, and u where anybody wants it. The watch has been called."""
        if self.siblings is not None and (shared := self.siblings.down(self, z)) is not None:
            return shared
        if self.watch is None and self.plan == "weights":
            return z, None
        z, u, energy = lora_fork(z, self.lora_A.to(z.dtype), energy=self.watch is not None)
        if self.watch is not None:
            self.watch(u, energy)  # type: ignore[arg-type]  # it was asked for
        return z, u


class Siblings:
    """Layers that read the very same tensor: one pass over it makes u of them all, and one the gradient that returns.

    members: in the order in which they run; their ``lora_A`` become views of one buffer. When the first is entered, u
    of all is made and every watch called. Each of the others checks that it is given that same tensor, and else works
    alone. ``ends``: set by a watcher that will end the forward here; then only u of watched members is made. Nothing is
    kept once all members have run; ``clear`` is for a forward that did not get so far. Raises ValueError when the
    members do not agree in width, dtype and device.
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
        """Forget the tensor that was read."""
        self._read: tuple[Tensor, int] | None = None
        self._handed: Tensor | None = None
        self._u: dict[MergedLoRALinear, Tensor] = {}

    def down(self, member: MergedLoRALinear, z: Tensor) -> tuple[Tensor, Tensor] | None:
        """z for the base layer of ``member`` and its u, or None where it must make its own."""
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
    """Counts writes into z; inference tensors do not count them."""
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
