"""The ops and their passes: inputs, the bytes and FLOPs that a shape makes necessary, and who computes them.

Bytes: every tensor that must be read or written, once; of ``u`` in the ratios only the columns of a row's own adapter.
FLOPs: two for a multiply and an add. ``e`` is bytes of an element, n, d, m, R as everywhere.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from shapes import Shape, orthonormal_adapters
from timing import CUDA
from torch import Tensor

import nsc_kernels

Inputs = tuple[Any, ...]
FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"


@dataclass(frozen=True)
class Pass:
    """One pass of one op.

    Attributes:
        op: its name, and that of its module in ``nsc_kernels``.
        step: FORWARD, BACKWARD or BOTH.
        inputs: (shape, dtype, device) -> what the reference takes.
        moved: (shape, bytes of an element) -> bytes that must be read or written.
        flops: shape -> FLOPs.
        variant: "Gram" where the rows of A are not orthonormal.
    """

    op: str
    step: str
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    moved: Callable[[Shape, int], int]
    flops: Callable[[Shape], int]
    variant: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [self.op, self.variant, self.step]))

    @property
    def reference(self) -> Callable:
        """The op in plain torch; for BOTH, with its gradient by autograd."""
        suffix = "_backward_reference" if self.step == BACKWARD else "_reference"
        function = getattr(_module(self.op), self.op + suffix)
        return _with_gradient(lambda *args: function(*args)[0]) if self.step == BOTH else function


def _module(op: str) -> Any:
    return importlib.import_module(f"nsc_kernels.{op}")


# Inputs


def _z(s: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(s.n, s.d, dtype=dtype, device=device)


def _a(s: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return orthonormal_adapters(s.d, s.ranks).to(device, dtype, copy=True)


def _b(s: Shape, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(s.m, s.r, dtype=dtype, device=device)


def _wide(rows: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(rows, columns, dtype=dtype, device=device)


def _c(s: Shape, device: str) -> Tensor:
    return torch.rand(s.r, device=device) + 0.5


def _routing(s: Shape, device: str) -> tuple[None, Tensor, Tensor, Tensor]:
    """Return what the merge gives a ratio: no Gram (orthonormal rows), each row's adapter, offsets, weights of 1/n."""
    adapter = torch.arange(s.n, device=device) * len(s.ranks) // s.n
    offsets = torch.tensor([0, *s.ranks]).cumsum(0).to(device)
    return None, adapter, offsets, torch.full((s.n,), 1 / s.n, device=device)


def _ratio(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    z = _z(s, dtype, device)
    return z, F.linear(z, _a(s, dtype, device)), *_routing(s, device)


def _ratio_backward(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    inputs = _ratio(s, dtype, device)
    _, captured, inverse_norm = _module("null_space_ratio").null_space_ratio_reference(*inputs)
    return torch.ones((), device=device), *inputs, captured, inverse_norm, True, True


def _with_gram(inputs: Callable[..., Inputs], position: int) -> Callable[..., Inputs]:
    """Return the inputs with a Gram inverse (R, R) at ``position``: the identity, as fast as any other."""

    def run(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
        made = inputs(s, dtype, device)
        return *made[:position], torch.eye(s.r, device=device), *made[position + 1 :]

    return run


def _energy(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    z, u, *routing = _ratio(s, dtype, device)
    return z.float().square().sum(-1), u, *routing


def _energy_backward(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    inputs = _energy(s, dtype, device)
    _, captured = _module("ratio_from_energy").ratio_from_energy_reference(*inputs)
    return torch.ones((), device=device), *inputs, captured


def _down(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _z(s, dtype, device), _a(s, dtype, device), True


def _down_backward(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    du, de = _wide(s.n, s.r, dtype, device), torch.randn(s.n, device=device)
    return _z(s, dtype, device), du, de, _z(s, dtype, device), _a(s, dtype, device)


def _moments(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    _, task, _, weight = _routing(s, device)
    return _z(s, dtype, device), _a(s, dtype, device), task, weight, None, len(s.ranks)


def _up(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    rows = (_wide(s.n, width, dtype, device) for width in (s.m, s.r))
    return *rows, _c(s, device), _b(s, dtype, device)


def _fold(s: Shape, dtype: torch.dtype, device: str) -> Inputs:
    return _wide(s.m, s.d, dtype, device), _b(s, dtype, device), _c(s, device), _a(s, dtype, device)


def _and_gradient(inputs: Callable[..., Inputs]) -> Callable[..., Inputs]:
    return lambda *args: (*inputs(*args), True)


# Bytes: 8 an index or a float64 (moments), 4 a float32 (weight, energy, q/s, 1/|z|, c)


def _ratio_bytes(s: Shape, e: int) -> int:
    return s.n * (s.d * e + s.own * e + 8 + 4 + 4 + 4)


def _ratio_backward_bytes(s: Shape, e: int) -> int:
    return s.n * (2 * s.d * e + s.own * e + s.r * e + 8 + 4 + 4 + 4)


def _ratio_both_bytes(s: Shape, e: int) -> int:
    return _ratio_bytes(s, e) + _ratio_backward_bytes(s, e)


def _energy_bytes(s: Shape, e: int) -> int:
    return s.n * (s.own * e + 4 + 8 + 4 + 4)


def _energy_backward_bytes(s: Shape, e: int) -> int:
    return s.n * (s.own * e + s.r * e + 4 + 8 + 4 + 4 + 4)


def _down_bytes(s: Shape, e: int) -> int:
    return s.n * s.d * e + s.r * s.d * e + s.n * s.r * e + 4 * s.n


def _down_backward_bytes(s: Shape, e: int) -> int:
    return 3 * s.n * s.d * e + s.n * s.r * e + 4 * s.n + s.r * s.d * e


def _moments_bytes(s: Shape, e: int) -> int:
    return _down_bytes(s, e) + s.n * (8 + 4) + 8 * len(s.ranks) * s.r**2


def _up_bytes(s: Shape, e: int) -> int:
    return 2 * s.n * s.m * e + s.n * s.r * e + s.m * s.r * e + 4 * s.r


def _up_backward_bytes(s: Shape, e: int) -> int:
    return s.n * s.m * e + 2 * s.n * s.r * e + s.m * s.r * e + 8 * s.r


def _fold_bytes(s: Shape, e: int) -> int:
    return (2 * s.m * s.d + s.m * s.r + s.r * s.d) * e + 4 * s.r


def _fold_backward_bytes(s: Shape, e: int) -> int:
    return (s.m * s.d + 2 * s.m * s.r + s.r * s.d) * e + 8 * s.r


def _ratio_flops(s: Shape) -> int:
    return 2 * s.n * (s.d + s.own)


def _gram_flops(s: Shape) -> int:
    return 2 * s.n * (s.d + s.own + s.own**2)


def _down_flops(s: Shape) -> int:
    return 2 * s.n * s.d * (s.r + 1)


def _moments_flops(s: Shape) -> int:
    return _down_flops(s) + s.n * s.r * (s.r + 1)


RATIO, ENERGY, DOWN, UP, FOLD = "null_space_ratio", "ratio_from_energy", "lora_down", "lora_up", "lora_fold"
MOMENTS = "lora_moments"
PASSES = [
    Pass(RATIO, FORWARD, _ratio, _ratio_bytes, _ratio_flops),
    Pass(RATIO, BACKWARD, _ratio_backward, _ratio_backward_bytes, _ratio_flops),
    Pass(RATIO, BOTH, _ratio, _ratio_both_bytes, lambda s: 2 * _ratio_flops(s)),
    Pass(RATIO, FORWARD, _with_gram(_ratio, 2), _ratio_bytes, _gram_flops, "Gram"),
    Pass(RATIO, BACKWARD, _with_gram(_ratio_backward, 3), _ratio_backward_bytes, _gram_flops, "Gram"),
    Pass(ENERGY, FORWARD, _energy, _energy_bytes, lambda s: 2 * s.n * s.own),
    Pass(ENERGY, BACKWARD, _energy_backward, _energy_backward_bytes, lambda s: 2 * s.n * s.own),
    Pass(DOWN, FORWARD, _down, _down_bytes, _down_flops),
    Pass(DOWN, BACKWARD, _down_backward, _down_backward_bytes, _down_flops),
    Pass(MOMENTS, FORWARD, _moments, _moments_bytes, _moments_flops),
    Pass(UP, FORWARD, _up, _up_bytes, lambda s: 2 * s.n * s.m * s.r),
    Pass(UP, BACKWARD, _and_gradient(_up), _up_backward_bytes, lambda s: 2 * s.n * s.r * (s.m + 1)),
    Pass(FOLD, FORWARD, _fold, _fold_bytes, lambda s: 2 * s.m * s.d * s.r),
    Pass(FOLD, BACKWARD, _and_gradient(_fold), _fold_backward_bytes, lambda s: 2 * s.m * s.r * (s.d + 1)),
]


# Providers


def providers(work: Pass, shape: Shape) -> dict[str, Callable]:
    """Return the ways to compute a pass by name; without a GPU the op is its reference, and ``triton`` is missing."""
    found: dict[str, Callable] = {"reference": work.reference}
    if shape.compiled and not work.variant:
        found["compiled"] = _Compiled(work)
    if work.step == BOTH:
        found["usual"] = usual_with_gradient
    if (work.op, work.step) == ("lora_down", FORWARD):
        found |= {"linear": linear_alone, "linear + norm": linear_and_norm}
    if work.op == MOMENTS:
        found["usual"] = usual_moments
    if CUDA:
        found["triton"] = _triton(work)
    return found


def _triton(work: Pass) -> Callable:
    if work.step == BOTH:
        return _with_gradient(_public_ratio)
    return getattr(_module(work.op), "_backward_op" if work.step == BACKWARD else "_forward_op")


class _Compiled:
    """``torch.compile`` of the reference for these very shapes, made at the first call."""

    def __init__(self, work: Pass) -> None:
        self.work = work
        self.function: Callable | None = None

    def __call__(self, *args: Any) -> Any:
        if self.function is None:
            torch.compiler.reset()
            self.function = self._compile()
        return self.function(*args)

    def _compile(self) -> Callable:
        if self.work.step != BOTH:
            return torch.compile(self.work.reference, fullgraph=True, dynamic=False)
        reference = getattr(_module(self.work.op), self.work.op + "_reference")
        return _with_gradient(torch.compile(lambda *args: reference(*args)[0], fullgraph=True, dynamic=False))


def _with_gradient(value: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function of (z, u, ...) that gives ``value`` and its gradients to z and u by autograd."""

    def run(z: Tensor, u: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        z, u = z.detach().requires_grad_(), u.detach().requires_grad_()
        result = value(z, u, *given)
        return result.detach(), *torch.autograd.grad(result, (z, u))

    return run


def _public_ratio(z: Tensor, u: Tensor, gram_inverse: Tensor | None, *routed: Tensor) -> Tensor:
    adapter, offsets, weight = routed
    return nsc_kernels.null_space_ratio(z, u, gram_inverse, adapter=adapter, offsets=offsets, weight=weight)


def usual_ratio(z: Tensor, u: Tensor, _gram: None, adapter: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted ratio in the fewest lines of torch, as ``baseline.py`` does: the targets' "eager PyTorch"."""
    dtype = torch.promote_types(z.dtype, torch.float32)
    columns = torch.arange(u.shape[1], device=u.device)
    own = (columns >= offsets[adapter, None]) & (columns < offsets[adapter + 1, None])
    captured = (u.to(dtype) * own).square().sum(-1) / z.to(dtype).square().sum(-1).clamp_min(1e-8)
    return (weight * (1 - captured).clamp_min(1e-8).sqrt()).sum()


usual_with_gradient = _with_gradient(usual_ratio)


def usual_moments(
    z: Tensor, lora_A: Tensor, task: Tensor, weight: Tensor, _other: None, tasks: int
) -> tuple[Tensor, ...]:
    """Return what ``lora_moments`` does in the fewest lines of torch: the rows of a task are taken out of u."""
    u, energy = F.linear(z, lora_A), z.float().square().sum(-1)
    rows = [task == k for k in range(tasks)]
    second = torch.stack([u[own].float().T @ (u[own].float() * weight[own, None]) for own in rows])
    return u, energy, second, second.new_empty(0)


def linear_alone(z: Tensor, lora_A: Tensor, _energy: bool) -> tuple[Tensor]:
    """Return what ``lora_down`` does, without the energy."""
    return (F.linear(z, lora_A),)


def linear_and_norm(z: Tensor, lora_A: Tensor, _energy: bool) -> tuple[Tensor, Tensor]:
    """Return what ``lora_down`` does, by two kernels; the norm is not squared."""
    return F.linear(z, lora_A), torch.linalg.vector_norm(z, dim=-1, dtype=torch.float32)
