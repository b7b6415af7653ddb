"""The factors of a merged adapter: exact by concatenation, or truncated to a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsc.adapters.stack import Stack
from nsc.adapters.tensor_file import TRIM_EVERY, Spill, trim_memory
from nsc.config import START, MergeConfig
from nsc.errors import NSCError
from nsc.methods import LowRank
from nsc.methods.protocol import decomposed
from nsc.recipes.updates import Merged, WeightedSum

DENSE_REMEDY = "no exact adapter holds it; give --rank to truncate it, or --full for the whole model"
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the range finder


@dataclass(frozen=True)
class MergedFactors:
    """The merged update ``B @ A`` of one layer, with every scale folded in.

    Attributes:
        A: (R, d) float32.
        B: (m, R) float32.
        error: relative Frobenius error of a truncation; 0 for the exact concatenation.
    """

    A: Tensor
    B: Tensor
    error: float = 0.0


def merged_factors(merged: Merged, rank: int | None = None, spill: Spill | None = None) -> dict[str, MergedFactors]:
    """Make the factors of every layer that carries LoRA.

    Args:
        merged: the merge.
        rank: rank of the best approximation; None for the exact factors.
        spill: where the factors lie instead of in memory.

    Returns:
        Layer -> its factors.

    Raises:
        NSCError: for a rank below 1, and for a dense update without a rank.
    """
    if rank is not None and rank < 1:
        raise NSCError(f"rank must be 1 or more, not {rank}")
    whole = set(merged.whole)
    made = {}
    for number, name in enumerate(merged.names):
        if name not in whole:
            factors = _factors(name, merged.update(name), rank)
            made[name] = replace(factors, A=spill.put(factors.A), B=spill.put(factors.B)) if spill else factors
        if number % TRIM_EVERY == 0:
            trim_memory()
    return made


def padded(factors: Mapping[str, MergedFactors]) -> dict[str, MergedFactors]:
    """Give all layers one rank, by rows and columns of zeros, which change no product.

    PEFT and vLLM read a rank for each module, but llama.cpp scales all modules by one, and SGLang takes no other.

    Args:
        factors: layer -> its factors.

    Returns:
        Layer -> factors of the largest rank.
    """
    top = max((len(f.A) for f in factors.values()), default=0)
    return {name: f if len(f.A) == top else _padded(f, top - len(f.A)) for name, f in factors.items()}


def padding_bytes(factors: Mapping[str, MergedFactors]) -> int:
    """Return how many bytes of zeros ``padded`` adds to a file.

    Args:
        factors: layer -> its factors.

    Returns:
        Bytes, in float32.
    """
    top = max((len(f.A) for f in factors.values()), default=0)
    return sum((top - len(f.A)) * (f.A.shape[1] + len(f.B)) * f.A.element_size() for f in factors.values())


def exact_or_nearest(merged: Merged, ranks: Mapping[str, int]) -> dict[str, MergedFactors]:
    """Make the factors of every layer: its own where the update has any, else those of its best approximation.

    Args:
        merged: the merge.
        ranks: layer -> rank of the approximation of a dense update.

    Returns:
        Layer -> its factors.
    """
    factors = {}
    for name in merged.names:
        update = merged.update(name)
        factors[name] = _factors(name, update, None if isinstance(update, LowRank) else ranks[name])
    return factors


def factors_to_fit(stack: Stack, config: MergeConfig) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Make the factors at which fitting starts, from the sum of the adapters at their start coefficients.

    Args:
        stack: the adapters, with the merge that is started from, if any, as the last.
        config: granularity, start, start_from and rank.

    Returns:
        Layer -> A (r, d), B (m, r) in float32; None where no factors are fitted.

    Raises:
        NSCError: if adapters fine-tuned a layer whole.
    """
    if config.granularity != "factors":
        return None
    if config.start_from is None:
        return starting_factors(WeightedSum(stack, torch.full(stack.owned.shape, config.start)), config.factor_rank)
    alone = stack.only(START)
    ranks = {name: config.factor_rank or sum(module.ranks[:-1]) for name, module in stack.modules.items()}
    return starting_factors(WeightedSum(alone, torch.ones(alone.owned.shape)), ranks)


def starting_factors(merged: Merged, rank: int | Mapping[str, int] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Make factors from which an adapter can be fitted: the best approximation of a merge, split evenly.

    Args:
        merged: the merge.
        rank: rank of the factors, or of each layer's; None for what a layer's update has, which is the most.

    Returns:
        Layer -> A (r, d), B (m, r) in float32.

    Raises:
        NSCError: if adapters fine-tuned a layer whole.
    """
    if merged.whole:
        raise NSCError(
            f"adapters fine-tuned {', '.join(merged.whole[:3])} whole, and factors are fitted to layers with LoRA"
            " alone: keep those layers for their own tasks with keep_modules, or give granularity rank"
        )
    start = {}
    for name in merged.names:
        update = merged.update(name)
        most = len(update.A) if isinstance(update, LowRank) else min(update.shape)
        wanted = rank[name] if isinstance(rank, Mapping) else rank
        found = _factors(name, update, min(wanted or most, most))
        start[name] = found.A, found.B
    return start


def _padded(factors: MergedFactors, rows: int) -> MergedFactors:
    return replace(factors, A=pad(factors.A, (0, 0, 0, rows)), B=pad(factors.B, (0, rows)))


def _factors(name: str, update: LowRank | Tensor, rank: int | None) -> MergedFactors:
    if rank is not None:
        return _truncated(update, rank) if isinstance(update, LowRank) else _leading(update.double(), rank)
    if not isinstance(update, LowRank):
        raise NSCError(f"the update of {name} is dense: {DENSE_REMEDY}")
    return MergedFactors(update.A.float().cpu(), update.B.float().cpu())


def _truncated(update: LowRank, rank: int) -> MergedFactors:
    """Nothing of size (m, d) is ever formed."""
    u, sigma, v = decomposed(update)
    error = sigma[rank:].norm() / sigma.norm().clamp_min(torch.finfo(sigma.dtype).tiny)
    return _balanced(u[:, :rank], sigma[:rank], v[:, :rank].mT, error)


def _leading(update: Tensor, rank: int) -> MergedFactors:
    """Of a dense update (m, d), by a randomised range finder of fixed seed: no SVD of anything of size (m, d).

    The error is the true one, whatever the finder missed: what is kept is a projection of the update, so the squares of
    both norms differ by the square of the rest. https://arxiv.org/abs/0909.4061, Algorithms 4.4 and 5.1.
    """
    kept = min(rank, *update.shape)
    width = min(kept + OVERSAMPLING, *update.shape)
    probe = torch.randn(update.shape[1], width, dtype=update.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(update @ probe.to(update.device))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(update @ torch.linalg.qr(update.mT @ basis)[0])[0]
    u, sigma, vh = torch.linalg.svd(basis.mT @ update, full_matrices=False)
    u, sigma, vh = basis @ u[:, :kept], sigma[:kept], vh[:kept]
    total = update.square().sum()
    lost = (total - sigma.square().sum()).clamp_min(0) / total.clamp_min(torch.finfo(update.dtype).tiny)
    return _balanced(u, sigma, vh, lost.sqrt())


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, error: Tensor) -> MergedFactors:
    """The root of each singular value on either side."""
    root = sigma.sqrt()
    return MergedFactors((root[:, None] * vh).float().cpu(), (u * root).float().cpu(), error.item())
