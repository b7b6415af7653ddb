"""Merging methods as they are usually written: every update dense, every SVD d-sized. What nsc's are measured against.

    D (K, m, d) = s_k B_k A_k  ->  (m, d)

They give what nsc gives, which tests hold at small shapes. TSV-M, Iso-C and Iso-CTS leave singular vectors of zeros
out, as nsc does: with them the result is arbitrary. Linear, LoRA-LEGO and RobustMerge work on factors and have no dense
formulation.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Dense = Callable[[Tensor], Tensor]


def dense_updates(A: list[Tensor], B: list[Tensor], scales: list[float]) -> Tensor:
    """Return the dense updates D, (K, m, d)."""
    return torch.stack([s * b @ a for s, b, a in zip(scales, B, A, strict=True)])


def task_arithmetic(D: Tensor) -> Tensor:
    """Sum the updates. https://arxiv.org/abs/2212.04089"""
    return D.sum(0)


def ties(D: Tensor, density: float = 0.2) -> Tensor:
    """Trim each update, elect a sign by sum, and average what agrees with it. https://arxiv.org/abs/2306.01708"""
    size = D[0].numel()
    drop = size - int(size * density)
    if drop:
        threshold = D.abs().flatten(1).kthvalue(drop, dim=1).values
        D = D * (D.abs() >= threshold[:, None, None])
    return disjoint_mean(D)


def disjoint_mean(D: Tensor) -> Tensor:
    """Return the mean of the non-zero entries that have the elected sign."""
    elected = D.sum(0).sign()
    majority = elected.sum().sign()
    elected = torch.where(elected == 0, majority, elected)
    agree = torch.where(elected > 0, D > 0, D < 0)
    return (D * agree).sum(0) / agree.sum(0).clamp_min(1)


def masked(D: Tensor, drop: float, keep: Tensor | None) -> Tensor:
    """Drop entries at random, and rescale the others."""
    keep = torch.rand(D.shape, device=D.device) >= drop if keep is None else keep
    return D * keep / (1 - drop)


def dare(D: Tensor, drop: float = 0.9, keep: Tensor | None = None) -> Tensor:
    """Drop entries at random, rescale the others, and sum. https://arxiv.org/abs/2311.03099"""
    return masked(D, drop, keep).sum(0)


def dare_ties(D: Tensor, drop: float = 0.9, keep: Tensor | None = None) -> Tensor:
    """Drop entries at random, rescale the others, elect a sign, and average what agrees with it."""
    return disjoint_mean(masked(D, drop, keep))


def emr(D: Tensor) -> Tensor:
    """Return the unified update: the largest magnitude with the elected sign. https://arxiv.org/abs/2405.17461"""
    elected = torch.where(D.mean(0) > 0, 1.0, -1.0).to(D)
    return elected * (D.abs() * (D * elected > 0)).amax(0)


def fr(D: Tensor, ratio: float = 0.7) -> Tensor:
    """Mask spectra by distance from the middle of the grid, not shifted. https://arxiv.org/abs/2411.16815"""
    h, w = D.shape[-2:]
    y, x = (torch.arange(n, device=D.device) - n // 2 for n in (h, w))
    distance = (y[:, None] ** 2 + x**2).sqrt()
    low, high = min(h, w) // 10, ratio * min(h, w)
    weight = (distance <= low).to(D.dtype) + ((distance >= low) & (distance <= high)).to(D.dtype)
    return torch.fft.ifft2(torch.fft.fft2(D) * weight).real.sum(0)


def truncated_svd(D: Tensor, rank: int) -> Tensor:
    """Return the best approximation of the sum of this rank, as PEFT's ``svd`` does."""
    U, S, Vh = torch.linalg.svd(D.sum(0), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def tsv(D: Tensor) -> Tensor:
    """Make the bases of the first 1/K of each task's triplets orthogonal. https://arxiv.org/abs/2412.00081"""
    share = min(D.shape[1:]) // len(D)
    triplets = [[part[..., :share] for part in true_triplets(update)] for update in D]
    U, S, V = (torch.cat(parts, -1) for parts in zip(*triplets, strict=True))
    return (orthogonal(U) * S) @ orthogonal(V).T


def cart(D: Tensor, fraction: float = 0.12, prior: float = 2.0) -> Tensor:
    """Add each task's distance from the mean, at low rank, to the mean. https://arxiv.org/abs/2412.12153"""
    mean, rank = D.mean(0), max(1, int(fraction * min(D.shape[1:])))
    merged = mean.clone()
    for update in D:
        U, S, Vh = torch.linalg.svd(update - mean, full_matrices=False)
        merged += prior * (U[:, :rank] * S[:rank]) @ Vh[:rank]
    return merged


def iso_c(D: Tensor) -> Tensor:
    """Make all singular values of the sum their mean. https://arxiv.org/abs/2502.04959"""
    U, S, V = true_triplets(D.sum(0))
    return S.mean() * U @ V.T


def iso_cts(D: Tensor, common: float = 0.8) -> Tensor:
    """Take most directions from the sum, the others from what these leave of each task; all get one singular value."""
    U, S, V = true_triplets(D.sum(0))
    own = round((len(S) - int(common * len(S))) / len(D))
    shared = len(S) - own * len(D)
    parts = [(U[:, :shared], S[:shared], V[:, :shared])]
    for update in D:
        rest = torch.linalg.svd(update - parts[0][0] @ (parts[0][0].T @ update), full_matrices=False)
        parts.append((rest.U[:, :own], rest.S[:own], rest.Vh[:own].T))
    U, S, V = (torch.cat(side, -1) for side in zip(*parts, strict=True))
    return S.mean() * orthogonal(U) @ orthogonal(V).T


def knots(D: Tensor, merge: Dense = task_arithmetic) -> Tensor:
    """Merge the tasks' parts of S V' in the basis U of [D_1 .. D_K]. https://arxiv.org/abs/2410.19735"""
    U, S, Vh = torch.linalg.svd(torch.cat(list(D), 1), full_matrices=False)
    kept = tolerance(S, D) < S
    parts = (S[kept, None] * Vh[kept]).chunk(len(D), 1)
    return U[:, kept] @ merge(torch.stack(parts))


def true_triplets(X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S and V without singular values that are zero up to rounding."""
    U, S, Vh = torch.linalg.svd(X, full_matrices=False)
    kept = tolerance(S, X) < S
    return U[:, kept], S[kept], Vh[kept].T


def tolerance(S: Tensor, X: Tensor) -> Tensor:
    """Return the value below which a singular value of X is rounding."""
    return S[0] * max(X.shape) * torch.finfo(X.dtype).eps


def orthogonal(X: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh
