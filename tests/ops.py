"""The table of op cases that drives the tests of both ratios, and the float64 oracle they are held against."""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from nsc_kernels import lora_down, null_space_ratio, ratio_from_energy
from nsc_kernels._op import INTERPRET

DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


@dataclass(frozen=True)
class Case:
    """One call: ``n`` rows of width ``d`` against adapters of these ranks."""

    n: int
    d: int
    ranks: tuple[int, ...]
    dtype: torch.dtype = F32
    gram: bool = True
    weighted: bool = False
    strided: bool = False

    def __str__(self) -> str:
        flags = [flag for flag in ("gram", "weighted", "strided") if getattr(self, flag)]
        ranks = ",".join(map(str, self.ranks))
        return "-".join([f"n{self.n}", f"d{self.d}", f"r{ranks}", str(self.dtype).removeprefix("torch."), *flags])

    @property
    def routed(self) -> bool:
        """Whether rows are told which adapter is theirs."""
        return len(self.ranks) > 1

    def launches(self, device: str) -> int:
        """How many kernels a forward on this device must launch: one where Triton runs, else none."""
        return int((device == "cuda" or INTERPRET) and self.dtype != F64 and self.n > 0)


CASES = [
    Case(1, 64, (3,)),
    Case(3, 7, (1,), F64),
    Case(3, 7, (3,), gram=False),
    Case(17, 129, (16,), gram=False),
    Case(17, 129, (16,), BF16),
    Case(17, 129, (33,), F64, weighted=True),
    Case(17, 300, (33,), weighted=True),
    Case(130, 64, (16, 3, 16)),
    Case(130, 64, (16, 3, 16), BF16, gram=False, weighted=True),
    Case(17, 300, (1, 0, 33, 3), F64, weighted=True),
    Case(17, 300, (1, 0, 33, 3), weighted=True, strided=True),
    Case(17, 300, (1, 0, 33, 3), F16, gram=False, strided=True),
    Case(3, 2500, (16, 16), BF16, weighted=True, strided=True),
    Case(3, 64, (0,)),
    Case(3, 64, (0, 0), weighted=True),
    Case(0, 64, (3,)),
    Case(0, 64, (3, 3), weighted=True),
]
DEGENERATE = [Case(17, 1, (1,)), Case(17, 7, (16, 33)), Case(17, 7, (16, 33), BF16)]  # om = 0: no row is out of sight
SMALL = [Case(3, 7, (3,), F64, gram=False), Case(5, 9, (2, 0, 3), F64, weighted=True), Case(4, 9, (4,), F64)]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call, and beside them ``down``, (R, d) float64, the adapters that the oracle projects on."""

    z: Tensor
    u: Tensor
    gram_inverse: Tensor | None
    adapter: Tensor | None
    offsets: Tensor | None
    weight: Tensor | None
    down: Tensor
    rows: Tensor  # (n,) the adapter of each row, also where the call is not told
    spans: tuple[tuple[int, int], ...]

    @property
    def kwargs(self) -> dict[str, Tensor | None]:
        """Everything after z and u."""
        names = ("gram_inverse", "adapter", "offsets", "weight")
        return {name: getattr(self, name) for name in names}

    @property
    def flat(self) -> tuple[Tensor | None, ...]:
        """The arguments of the registered operator."""
        return self.z, self.u, *self.kwargs.values()


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    """Random inputs for ``case``; every third row has weight 0."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *case.ranks]).cumsum(0)
    spans = tuple(pairwise(offsets.tolist()))
    down = torch.randn(int(offsets[-1]), case.d, generator=generator, dtype=F64) / case.d**0.5
    if not case.gram:
        down = torch.cat([torch.linalg.qr(down[i:j].T)[0].T for i, j in spans])
    z = torch.randn(case.n, case.d, generator=generator, dtype=F64).to(case.dtype)
    u = (z.double() @ down.T).to(case.dtype)
    rows = torch.randint(len(case.ranks), (case.n,), generator=generator)
    weight = torch.rand(case.n, generator=generator) * (torch.arange(case.n) % 3 != 0)
    if case.strided:
        z, u = strided(z), strided(u)
    inputs = Inputs(
        z,
        u,
        gram_inverses(down, spans).to(torch.promote_types(case.dtype, F32)) if case.gram else None,
        rows if case.routed else None,
        offsets if case.routed else None,
        weight.to(torch.promote_types(case.dtype, F32)) if case.weighted else None,
        down,
        rows,
        spans,
    )
    return replace(inputs, **{k: v.to(device) for k, v in vars(inputs).items() if isinstance(v, Tensor)})


def strided(x: Tensor) -> Tensor:
    """The same values, rows one element further apart than they are long."""
    wide = torch.full((x.shape[0], x.shape[1] + 1), torch.nan, dtype=x.dtype)
    wide[:, :-1] = x
    return wide[:, :-1]


def gram_inverses(down: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """(R, R) block-diagonal pseudo-inverses of A_k A_k^T."""
    return torch.block_diag(*[torch.linalg.pinv(down[i:j] @ down[i:j].T, rtol=1e-10) for i, j in spans])


def oracle(z: Tensor, down: Tensor, rows: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """(n,) |(I - P) z| / |z| in the dtype of ``z``, P from a singular value decomposition: neither Gram nor u."""
    beyond = []
    for i, j in spans:
        basis = torch.linalg.svd(down[i:j], full_matrices=False)
        kept = basis.Vh[basis.S > 1e-10]
        beyond.append(z - (z @ kept.T) @ kept)
    left = torch.stack(beyond)[rows, torch.arange(len(z), device=z.device)]
    return torch.linalg.vector_norm(left, dim=-1) / torch.linalg.vector_norm(z, dim=-1)


def torch_own(z: Tensor, down: Tensor, gram: Tensor, rows: Tensor, spans: tuple[tuple[int, int], ...]) -> Tensor:
    """(n,) the ratio as one would write it in torch, computed in the dtype of ``z`` from u = z A^T on."""
    u, gram = z @ down.to(z.dtype).T, gram.to(z.dtype)
    spans_of_rows = torch.tensor(spans, device=z.device)[rows]
    columns = torch.arange(u.shape[1], device=z.device)
    v = u * ((columns >= spans_of_rows[:, :1]) & (columns < spans_of_rows[:, 1:]))
    return (1 - (v @ gram * v).sum(-1) / z.square().sum(-1)).clamp(0, 1).sqrt()


def max_abs(x: Tensor) -> float:
    """The largest magnitude; 0 of nothing, and NaN is larger than anything."""
    return x.abs().nan_to_num(torch.inf).max().item() if x.numel() else 0.0


def by_energy(z: Tensor, u: Tensor, gram_inverse: Tensor | None = None, **rest: Tensor | None) -> Tensor:
    """``ratio_from_energy`` as a function of z: the energy comes from ``lora_down``, here of no adapter at all."""
    _, energy = lora_down(z, z.new_empty(0, z.shape[-1]))
    return ratio_from_energy(energy, u, gram_inverse, **rest)


RATIOS = {"null_space_ratio": null_space_ratio, "ratio_from_energy": by_energy}
