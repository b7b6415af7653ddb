"""One linear layer with six adapters, written three ways: bare (none of them), this project's, and PEFT's."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import peft
import torch
from peft.tuners.lora import LoraLayer
from shapes import Shape
from torch import Tensor, nn

from nsc_kernels import MergedLoRALinear

SCALE = 2.0


@dataclass(frozen=True)
class Step:
    """A layer's forward and backward: z (n, d), dy (n, m) -> y, dz, and the gradients to ``trained``.

    Attributes:
        module: the layer.
        trained: parameters that get a gradient.
        before: called first in every forward.
    """

    module: nn.Module
    trained: Sequence[nn.Parameter] = ()
    before: Callable[[], None] = lambda: None

    def __call__(self, z: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
        z = z.detach().requires_grad_()
        self.before()
        y = self.module(z)
        return y.detach(), *torch.autograd.grad(y, (z, *self.trained), dy)

    def saved_bytes(self, z: Tensor, dy: Tensor) -> int:
        """Return the bytes that autograd keeps for the backward beside parameters and buffers, each storage once."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self(z, dy)
        owned = {x.untyped_storage().data_ptr() for x in (*self.module.parameters(), *self.module.buffers())}
        return sum(size for pointer, size in kept.items() if pointer not in owned)


class Layer:
    """The frozen weight, the stacked factors and the coefficients that all three ways of writing the layer share.

    Attributes:
        weight: (m, d).
        lora_A: (R, d).
        lora_B: (m, R).
        lam: (K,) in at least float32, the only parameter that trains.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.ranks, widest = shape.ranks, torch.promote_types(dtype, torch.float32)
        self.weight = torch.randn(shape.m, shape.d, device=device, dtype=dtype) / shape.d**0.5
        self.lora_A = torch.randn(shape.r, shape.d, device=device, dtype=dtype) / shape.d**0.5
        self.lora_B = torch.randn(shape.m, shape.r, device=device, dtype=dtype) / 4
        self.lam = nn.Parameter(0.2 + 0.1 * torch.arange(len(shape.ranks), device=device, dtype=widest))

    def double(self) -> Layer:
        """Return the same values in float64."""
        copy = object.__new__(Layer)
        copy.ranks = self.ranks
        for name in ("weight", "lora_A", "lora_B"):
            setattr(copy, name, getattr(self, name).double())
        copy.lam = nn.Parameter(self.lam.detach().double())
        return copy

    def linear(self) -> nn.Linear:
        """Return the frozen base layer."""
        m, d = self.weight.shape
        base = nn.Linear(d, m, bias=False, device="meta").requires_grad_(False)
        base.weight = nn.Parameter(self.weight, requires_grad=False)
        return base


def bare(layer: Layer) -> Step:
    """Return the frozen ``nn.Linear`` alone, with no gradient but to z."""
    return Step(layer.linear())


def merged(layer: Layer) -> Step:
    """Return this project's layer."""
    scales = [SCALE] * len(layer.ranks)
    module = MergedLoRALinear(layer.linear(), layer.lora_A, layer.lora_B, layer.ranks, scales, layer.lam)
    return Step(module, [layer.lam])


def with_peft(layer: Layer) -> Step:
    """Return PEFT's layer with every adapter active; a tensor in ``scaling`` makes it differentiable in ``lam``."""
    carrier, names = nn.ModuleDict({"proj": layer.linear()}), [f"task{k}" for k in range(len(layer.ranks))]
    for name, rank in zip(names, layer.ranks, strict=True):
        config = peft.LoraConfig(r=rank, lora_alpha=SCALE * rank, target_modules=["proj"])
        with warnings.catch_warnings():  # PEFT warns of the second adapter, but one call for each is how to add many
            warnings.simplefilter("ignore")
            peft.inject_adapter_in_model(config, carrier, adapter_name=name)
    module = carrier["proj"]
    assert isinstance(module, LoraLayer)
    module.set_adapter(names)
    parts = layer.lora_A.split(layer.ranks), layer.lora_B.split(layer.ranks, dim=1)
    for name, A, B in zip(names, *parts, strict=True):
        module.lora_A[name].weight = nn.Parameter(A, requires_grad=False)
        module.lora_B[name].weight = nn.Parameter(B.contiguous(), requires_grad=False)

    def weigh() -> None:
        module.scaling.update(zip(names, (SCALE * layer.lam).unbind(0), strict=True))

    return Step(module, [layer.lam], weigh)


def layer_work(shape: Shape, e: int, adapters: bool) -> tuple[int, int]:
    """Return bytes and FLOPs of forward and backward.

    In each pass z and y (or their gradients) and every matrix are moved once.
    """
    matrices = shape.m * shape.d + (shape.r * (shape.d + shape.m) if adapters else 0)
    return 2 * e * (shape.n * (shape.d + shape.m) + matrices), 4 * shape.n * matrices


def exact_layer(layer: Layer, z: Tensor, dy: Tensor) -> list[Tensor]:
    """Return y, dz and dlam by one float64 matrix, to compare providers with: y = z (W + sum lam_k s_k B_k A_k)'."""
    layer, z, dy = layer.double(), z.double(), dy.double()
    pairs = zip(layer.lora_B.split(layer.ranks, dim=1), layer.lora_A.split(layer.ranks), strict=True)
    products = [SCALE * B @ A for B, A in pairs]
    weight = layer.weight + sum(lam * p for lam, p in zip(layer.lam.detach(), products, strict=True))
    dweight = dy.T @ z
    return [z @ weight.T, dy @ weight, torch.stack([(dweight * p).sum() for p in products])]


PROVIDERS = {"bare": bare, "merged": merged, "peft": with_peft}
