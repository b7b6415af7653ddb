"""Shapes that merging meets, and the bytes that an op cannot avoid moving for them."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """``n`` rows of width ``d`` entering a linear with adapters of these ranks."""

    name: str
    n: int
    d: int
    ranks: tuple[int, ...]

    @property
    def r(self) -> int:
        """R, the columns of u."""
        return sum(self.ranks)


SMALL = [Shape("tiny", 64, 128, (4, 4)), Shape("vit-rows", 197, 768, (16,) * 4)]
LARGE = [
    Shape("llama-6x16", 16384, 4096, (16,) * 6),
    Shape("vit-20x16", 50432, 768, (16,) * 20),
    Shape("wide-1x128", 8192, 16384, (128,)),
]
SHAPES = LARGE if torch.cuda.is_available() else SMALL


def ratio_inputs(shape: Shape, dtype: torch.dtype, device: str, *, gram: bool) -> tuple[Tensor | None, ...]:
    """z, u, gram_inverse, adapter, offsets, weight: rows sorted by adapter, all of weight 1/n, A's rows orthonormal."""
    torch.manual_seed(0)
    z = torch.randn(shape.n, shape.d, device=device)
    down = torch.cat([torch.linalg.qr(torch.randn(shape.d, r, device=device))[0].T for r in shape.ranks])
    adapter = torch.arange(shape.n, device=device) * len(shape.ranks) // shape.n
    offsets = torch.tensor([0, *shape.ranks], device=device).cumsum(0)
    weight = torch.full((shape.n,), 1 / shape.n, device=device)
    gram_inverse = torch.eye(shape.r, device=device) if gram else None
    return z.to(dtype), (z @ down.T).to(dtype), gram_inverse, adapter, offsets, weight


def ratio_bytes(shape: Shape, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of one pass, each tensor moved once: z, a row's own columns of u, and index, weight and results per row."""
    wide, own = shape.n * shape.d * dtype.itemsize, shape.n * shape.r // len(shape.ranks) * dtype.itemsize
    per_row = shape.n * (8 + 4 + 4 + 4)
    return {"forward": wide + own + per_row, "backward": 2 * wide + own + shape.n * shape.r * dtype.itemsize + per_row}
