"""What bytes and FLOPs allow: for each kernel the larger of bytes over bandwidth and FLOPs over the rate, added up.

A prediction is no measurement. Caches, launches and everything short of the datasheet's rates are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import PASSES, Pass, linear_alone, linear_and_norm, usual_with_gradient
from layers import Layer, bare, with_peft
from shapes import Shape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Gpu:
    """What a GPU's datasheet says.

    Attributes:
        bandwidth: bytes a second.
        rate: bfloat16 FLOPs a second.
    """

    bandwidth: float
    rate: float


GPUS = {"H100": Gpu(3.35e12, 790e12), "H200": Gpu(4.8e12, 790e12)}
Kernels = list[tuple[int, int]]  # bytes and FLOPs of each


def seconds(kernels: Kernels, gpu: Gpu) -> float:
    """Return the least seconds that these kernels take, one after the other."""
    return sum(max(moved / gpu.bandwidth, flops / gpu.rate) for moved, flops in kernels)


def of_pass(work: Pass, shape: Shape) -> Kernels:
    """Return one kernel that moves every tensor once; for both passes, one each."""
    if work.step != "forward + backward":
        return [(work.moved(shape, BF16.itemsize), work.flops(shape))]
    return [kernel for step in ("forward", "backward") for kernel in of_pass(find(work.op, step), shape)]


def find(op: str, step: str) -> Pass:
    """Return the pass of this name, without a Gram."""
    return next(work for work in PASSES if (work.op, work.step, work.variant) == (op, step, ""))


def of_usual_ratio(shape: Shape) -> Kernels:
    """Return the kernels of the ratio and its gradient as one would write it in torch."""
    return counted(usual_with_gradient, *find("null_space_ratio", "forward").inputs(shape, BF16, "meta"))


def of_linear(shape: Shape, *, norm: bool) -> Kernels:
    """Return the kernels of what ``lora_down`` is compared with."""
    return counted(linear_and_norm if norm else linear_alone, *find("lora_down", "forward").inputs(shape, BF16, "meta"))


def of_bare_layer(shape: Shape) -> Kernels:
    """Return the kernels of forward and backward of the frozen linear."""
    return counted(bare(Layer(shape, BF16, "meta")), *_rows(shape))


def of_peft_layer(shape: Shape) -> Kernels:
    """Return the kernels of PEFT's layer, gradients to the coefficients included."""
    return counted(with_peft(Layer(shape, BF16, "meta")), *_rows(shape))


def of_merged_layer(shape: Shape) -> Kernels:
    """Return the kernels of this project's layer.

    They are the bare layer, u from one more pass over z, both passes of ``lora_up``, and dz once more read and written.
    """
    e, (n, d, r) = BF16.itemsize, (shape.n, shape.d, shape.r)
    down = (n * d * e + n * r * e + r * d * e, 2 * n * d * r)
    down_backward = (2 * n * d * e + n * r * e + r * d * e, 2 * n * d * r)
    up = [kernel for step in ("forward", "backward") for kernel in of_pass(find("lora_up", step), shape)]
    return [*of_bare_layer(shape), down, *up, down_backward]


def saved_by_merged(shape: Shape) -> int:
    """Return the bytes of u and c."""
    return shape.n * shape.r * BF16.itemsize + shape.r * 4


def saved_by_peft(shape: Shape) -> int:
    """Return the bytes of every adapter's output, which the gradient to its coefficient needs."""
    return len(shape.ranks) * shape.n * shape.m * BF16.itemsize


def _rows(shape: Shape) -> Iterator[Tensor]:
    return (torch.empty(shape.n, width, dtype=BF16, device="meta") for width in (shape.d, shape.m))


def counted(function: Callable[..., Any], *inputs: Any) -> Kernels:
    """Return the kernels of a call in eager torch on meta tensors: bytes in and out, FLOPs of matrix products."""
    with _Counter() as counter:
        function(*inputs)
    return counter.kernels


@dataclass
class _Counter(TorchDispatchMode):
    kernels: Kernels = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        returned = func(*args, **(kwargs or {}))
        read, written = _tensors((args, kwargs)), _tensors(returned)
        names = {x.untyped_storage()._cdata for x in read}
        is_view = all(x.untyped_storage()._cdata in names for x in written) and not func._schema.is_mutable
        if not is_view and not func.__name__.startswith(("empty", "new_empty")):
            self.kernels.append((sum(map(_bytes, read + written)), _flops(func, read)))
        return returned


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _bytes(x: Tensor) -> int:
    """Return what is behind a tensor in memory: for an expanded one, only what it repeats."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _flops(func: Any, read: list[Tensor]) -> int:
    if func.__name__.split(".")[0] not in ("mm", "addmm"):
        return 0
    left, right = read[-2:]
    return 2 * left.shape[0] * left.shape[1] * right.shape[1]
