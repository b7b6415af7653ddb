"""Shapes that merging meets, from decode to prefill, and small ones for a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from timing import CUDA
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """``n`` rows entering a linear of (m, d) that carries adapters of these ranks.

    Attributes:
        model: whose linear it is.
        rows: what the n rows are.
        n: rows.
        d: inputs.
        m: outputs.
        ranks: of the adapters.
        compiled: whether torch.compile is timed too: each costs seconds of compilation.
    """

    model: str
    rows: str
    n: int
    d: int
    m: int
    ranks: tuple[int, ...]
    compiled: bool = False

    @property
    def name(self) -> str:
        """The model and its rows."""
        return f"{self.model}, {self.rows}"

    @property
    def r(self) -> int:
        """R, the columns of u."""
        return sum(self.ranks)

    @property
    def own(self) -> int:
        """The columns of u that belong to one row's adapter."""
        return self.r // len(self.ranks)


SIX, EIGHT, TWENTY = (16,) * 6, (16,) * 8, (16,) * 20
TARGET = Shape("LLaMA-3-8B", "32768 rows", 32768, 4096, 4096, SIX, compiled=True)  # 268 MB of bfloat16
PREFILL = Shape("LLaMA-3-8B", "prefill of 4096", 4096, 4096, 4096, SIX, compiled=True)
GPU_SHAPES = [
    TARGET,
    PREFILL,
    Shape("LLaMA-3-8B", "decode of 8", 8, 4096, 4096, SIX),
    Shape("LLaVA-1.5-7B", "8 x (576 + 64)", 5120, 4096, 4096, SIX),
    Shape("LLaMA-3-70B", "prefill of 4096", 4096, 8192, 8192, SIX),
    Shape("LLaMA-3-70B", "decode of 8", 8, 8192, 8192, SIX),
    Shape("ViT-B/16", "32 x 197", 6304, 768, 768, TWENTY, compiled=True),
    Shape("CLIP ViT-L/14", "32 x 257", 8224, 1024, 1024, EIGHT),
]
CPU_SHAPES = [
    Shape("ViT-B/16", "1 x 197", 197, 768, 768, TWENTY, compiled=True),
    Shape("LLaMA-3-8B", "decode of 8", 8, 4096, 4096, SIX, compiled=True),
]
SHAPES = GPU_SHAPES if CUDA else CPU_SHAPES


@lru_cache(maxsize=8)
def orthonormal_adapters(d: int, ranks: tuple[int, ...]) -> Tensor:
    """Return adapters, (R, d) float32 on the CPU, whose rows are orthonormal each, as the merge runs them."""
    return torch.cat([torch.linalg.qr(torch.randn(d, r))[0].T for r in ranks])
