"""Gram factors of LoRA down-projections: what the null-space ratio needs to know of ``A``, computed once.

    A A' = L L'        G = (A A')^-1 = L^-T L^-1        A~ = L^-1 A (orthonormal rows)        B~ = B L,  B~ A~ = B A

Everything is float64. A rank-deficient ``A`` (zero, duplicated or dependent rows) uses its true row space instead: with
``A = U S V'`` cut at ``eps * r * S[0]``, ``L`` becomes ``U S`` and ``L^-1`` becomes ``S^-1 U'``, padded with zeros to
``(r, r)``. ``eps`` is that of the accumulation, float32 or better: a direction below it cannot be seen by ``u = A z``.

Paper: https://arxiv.org/abs/2603.26317, Eq. 4 (Fast NSC).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from nsc_kernels._op import refuse_tangents

CHOLESKY_CONDITION = 1e4  # above it a Gram has lost half of float64's digits: factor A itself instead
CHUNK_BYTES = 1 << 26  # float64 copies of A made at once


@dataclass(frozen=True)
class GramFactor:
    """The factors of one down-projection ``A`` of shape (r, d), all in float64.

    Attributes:
        rank: dimension of the row space of A.
        condition: largest over smallest singular value on the row space; inf for an all-zero A.
        inverse: (r, r), ``(A A')^-1``, or the pseudo-inverse where A is rank-deficient.
        whiten: (r, r) ``W``: the first ``rank`` rows of ``W A`` are orthonormal, the others zero.
        unwhiten: (r, r) ``L``, with ``L W A == A``.
    """

    rank: int
    condition: float
    inverse: Tensor
    whiten: Tensor
    unwhiten: Tensor


class GramCache:
    """A cache that factors every ``A`` once, and again only when its values change.

    An entry is kept with a copy of the ``A`` it was made from and served only while both are equal, so neither an
    optimiser step, ``load_state_dict``, nor a write through ``.data`` can leave a stale inverse behind. On CUDA that
    comparison waits for the device; ask for all modules in one call where it matters. An entry goes when its ``A``
    goes. All ``A`` of one rank are factored in one batched Cholesky, in float64; a rank-deficient or ill-conditioned
    ``A`` by its SVD.

    Example:
        >>> cache, z, A = GramCache(), torch.randn(32, 64), torch.nn.Parameter(torch.randn(8, 64))
        >>> null_space_ratio(z, z @ A.T, cache.inverse(A)).mean().backward()  # A.grad: the whole closed form

    Source: https://arxiv.org/abs/2603.26317, Eq. 4 (Fast NSC).
    """

    def __init__(self) -> None:
        self._entries = WeakIdKeyDictionary()

    def factor(self, lora_A: Sequence[Tensor]) -> list[GramFactor]:
        """Return the factors of many down-projections.

        Args:
            lora_A: each (r, d), of any rank, width, floating dtype and device.

        Returns:
            One entry for each ``A``, in the order given.

        Raises:
            ValueError: if an ``A`` is not a floating matrix or holds NaN or infinity; the message names its position.
        """
        tensors = [a.detach() for a in lora_A]
        stale = [i for i, a in enumerate(lora_A) if not self._is_fresh(a)]
        for i, entry in zip(stale, _factor_all([tensors[i] for i in stale], stale), strict=True):
            self._entries[lora_A[i]] = entry
        return [self._entries[a][1] for a in lora_A]

    def inverse(self, *lora_A: Tensor) -> Tensor:
        """Return the block-diagonal inverse Gram of stacked adapters, as the ratios take it.

        Args:
            lora_A: each (r, d), of any rank and floating dtype, on one device.

        Returns:
            (R, R), R the sum of ranks, in float32 (float64 if an ``A`` is). Differentiable in every ``A`` that requires
            a gradient: with ``u = z A'`` computed by autograd as well, the backward of
            ``null_space_ratio(z, u, cache.inverse(A))`` gives ``A`` the whole closed-form gradient. A rank-deficient
            ``A`` gives its pseudo-inverse.

        Raises:
            ValueError: if none is given, or as ``factor``.
            NotImplementedError: if an ``A`` carries a tangent of forward-mode differentiation.
        """
        if not lora_A:
            raise ValueError("inverse() needs at least one lora_A")
        refuse_tangents("GramCache.inverse", lora_A)
        factors = self.factor(lora_A)
        dtype = torch.promote_types(max((a.dtype for a in lora_A), key=lambda d: torch.finfo(d).bits), torch.float32)
        blocks = [
            _DifferentiableInverse.apply(a, f.inverse) if a.requires_grad else f.inverse
            for a, f in zip(lora_A, factors, strict=True)
        ]
        return torch.block_diag(*blocks).to(dtype)

    def whiten(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
        """Return factors of the same product whose down-projection has orthonormal rows.

        Args:
            lora_A: (r, d), any floating dtype.
            lora_B: (m, r), any floating dtype.

        Returns:
            ``A~`` (r, d) and ``B~`` (m, r) with ``B~ A~ == B A``, each formed in float64 and returned in the dtype of
            its factor. The rows of ``A~`` are orthonormal, or zero beyond the rank of A. No gradient.

        Raises:
            ValueError: if the ranks differ, or as ``factor``.
        """
        if lora_B.ndim != 2 or lora_B.shape[1] != lora_A.shape[0]:
            raise ValueError(f"lora_B {tuple(lora_B.shape)} does not follow lora_A {tuple(lora_A.shape)}: ranks differ")
        (factor,) = self.factor([lora_A])
        whitened_A = (factor.whiten @ lora_A.detach().double()).to(lora_A.dtype)
        return whitened_A, (lora_B.detach().double() @ factor.unwhiten).to(lora_B.dtype)

    def clear(self) -> None:
        """Forget the factors of every ``A``."""
        self._entries.clear()

    def _is_fresh(self, a: Tensor) -> bool:
        entry = self._entries.get(a)
        if entry is None:
            return False
        copy = entry[0]
        same_kind = copy.shape == a.shape and copy.dtype == a.dtype and copy.device == a.device
        return same_kind and torch.equal(copy, a.detach())


class _DifferentiableInverse(torch.autograd.Function):
    """The inverse Gram with dA = -G (S + S') G A for an incoming S, exact on the row space of a rank-deficient A."""

    @staticmethod
    def forward(ctx, lora_A: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(lora_A, inverse)
        return inverse.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        lora_A, inverse = ctx.saved_tensors
        grad = grad.to(inverse.dtype)
        return -(inverse @ (grad + grad.T) @ inverse @ lora_A.to(inverse.dtype)).to(lora_A.dtype), None


def gram_inverse(*lora_A: Tensor) -> Tensor:
    """Return the block-diagonal inverse Gram of stacked adapters, without a cache or a wait for the device.

    Meant for an ``A`` that changes in every step, and for use inside ``torch.compile``. A rank-deficient ``A`` gives
    NaN; ``GramCache.inverse`` serves those.

    Args:
        lora_A: each (r, d), of any rank and floating dtype, on one device.

    Returns:
        (R, R), R the sum of ranks, by a float64 Cholesky, in float32 (float64 if an ``A`` is). Differentiable in every
        ``A``.

    Raises:
        ValueError: if none is given.

    Example:
        >>> z, A = torch.randn(32, 64), torch.nn.Parameter(torch.randn(8, 64))
        >>> null_space_ratio(z, z @ A.T, gram_inverse(A)).mean().backward()  # A.grad: the whole closed form

    Source: https://arxiv.org/abs/2603.26317, Eq. 4 (Fast NSC).
    """
    if not lora_A:
        raise ValueError("gram_inverse() needs at least one lora_A")
    dtype = torch.float64 if any(a.dtype == torch.float64 for a in lora_A) else torch.float32
    return torch.block_diag(*[_plain_inverse(a) for a in lora_A]).to(dtype)


def _plain_inverse(lora_A: Tensor) -> Tensor:
    with torch.autocast(lora_A.device.type, enabled=False):
        a = lora_A.double()
        lower, info = torch.linalg.cholesky_ex(a @ a.mT)
        identity = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
        whiten = torch.linalg.solve_triangular(lower, identity, upper=False)
        inverse = whiten.mT @ whiten
        return torch.where(info == 0, inverse, math.nan)


def _factor_all(lora_A: list[Tensor], positions: list[int]) -> list[tuple[Tensor, GramFactor]]:
    """Return a copy of every ``A`` and its factors; ``positions`` name them in messages."""
    for position, a in zip(positions, lora_A, strict=True):
        if a.ndim != 2 or not a.is_floating_point():
            raise ValueError(
                f"lora_A number {position} must be a floating (r, d) matrix, not {a.dtype} {tuple(a.shape)}"
            )
    groups: dict[tuple, list[int]] = defaultdict(list)
    for i, a in enumerate(lora_A):
        groups[(a.shape[0], a.device)].append(i)
    entries: dict[int, tuple[Tensor, GramFactor]] = {}
    for members in groups.values():
        gram, copies = _grams([lora_A[i] for i in members])
        finite = torch.isfinite(gram).flatten(1).all(1).tolist()
        if not all(finite):
            raise ValueError(f"lora_A number {positions[members[finite.index(False)]]} holds NaN or infinity")
        for i, copy, factor in zip(members, copies, _cholesky_factors(gram), strict=True):
            entries[i] = (copy, factor or _singular_factor(copy))
    return [entries[i] for i in range(len(lora_A))]


def _grams(lora_A: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return (b, r, r) float64 Grams of matrices of one rank, and copies of these; float64 is made a chunk at a time.

    Widths may differ. Copies share the memory of their chunk: one launch makes them all.
    """
    rank, device = lora_A[0].shape[0], lora_A[0].device
    gram = torch.empty(len(lora_A), rank, rank, dtype=torch.float64, device=device)
    copies = list(lora_A)
    by_width: dict[tuple, list[int]] = defaultdict(list)
    for i, a in enumerate(lora_A):
        by_width[(a.shape[1], a.dtype)].append(i)
    for (width, _), members in by_width.items():
        size = max(1, CHUNK_BYTES // (8 * max(1, rank * width)))
        for start in range(0, len(members), size):
            chunk = members[start : start + size]
            rows = torch.stack([lora_A[i] for i in chunk])
            for i, copy in zip(chunk, rows.unbind(0), strict=True):
                copies[i] = copy
            exact = rows.double()
            gram[torch.tensor(chunk, device=device)] = exact @ exact.mT
    return gram, copies


def _cholesky_factors(gram: Tensor) -> list[GramFactor | None]:
    """Factor all Grams in one batched Cholesky; None where one is too ill-conditioned to be trusted."""
    count, rank = gram.shape[:2]
    if rank == 0:
        return [GramFactor(0, math.inf, g, g, g) for g in gram]
    eigenvalues = torch.linalg.eigvalsh(gram).clamp_min(0)
    smallest, largest = eigenvalues[:, 0].sqrt().tolist(), eigenvalues[:, -1].sqrt().tolist()
    sound = [s > 0 and largest_i <= CHOLESKY_CONDITION * s for s, largest_i in zip(smallest, largest, strict=True)]
    lower, _ = torch.linalg.cholesky_ex(gram)
    identity = torch.eye(rank, dtype=gram.dtype, device=gram.device).expand(count, rank, rank)
    whiten = torch.linalg.solve_triangular(lower, identity, upper=False)
    inverse = whiten.mT @ whiten
    matrices = zip(inverse.unbind(0), whiten.unbind(0), lower.unbind(0), strict=True)
    return [
        GramFactor(rank, largest[i] / smallest[i], *factors) if sound[i] else None for i, factors in enumerate(matrices)
    ]


def _singular_factor(lora_A: Tensor) -> GramFactor:
    """Factor ``A`` by its own SVD, whose small singular values a Gram would have squared away."""
    r = lora_A.shape[0]
    left, sigma, _ = torch.linalg.svd(lora_A.double(), full_matrices=False)
    eps = torch.finfo(torch.promote_types(lora_A.dtype, torch.float32)).eps
    rank = int((sigma > eps * r * sigma[:1]).sum()) if sigma.numel() else 0
    whiten, unwhiten = torch.zeros(2, r, r, dtype=torch.float64, device=lora_A.device)
    whiten[:rank] = left[:, :rank].mT / sigma[:rank, None]
    unwhiten[:, :rank] = left[:, :rank] * sigma[:rank]
    condition = float(sigma[0] / sigma[rank - 1]) if rank else math.inf
    return GramFactor(rank, condition, whiten.mT @ whiten, whiten, unwhiten)
