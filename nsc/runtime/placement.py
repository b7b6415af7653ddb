"""Where the weights of a base lie, where its inputs go, and linears whose weight is fetched whenever it is used.

accelerate's hooks bring an offloaded weight to its device for the forward only. autograd would keep that copy for the
backward, so all of them would be on the device at once. Here the copy is let go and fetched again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def input_device(model: nn.Module) -> torch.device:
    """Where the inputs of a model go: where the first of its modules with weights runs, wherever those are kept."""
    return run_device(next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None))


def run_device(module: nn.Module) -> torch.device:
    """Where a module runs: the device of accelerate's hook where there is one, or else that of its weights."""
    places = [hook.execution_device for hook in _hooks(module) if getattr(hook, "execution_device", None) is not None]
    return torch.device(places[0]) if places else next(module.parameters()).device


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is an ``nn.Linear`` with a whole, unquantised weight at hand, that others can be folded into."""
    weight = getattr(linear, "weight", None)
    return type(linear) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta and not _offloads(linear)


def reload_in_backward(model: nn.Module) -> None:
    """Make the offloaded linears of a dispatched model fetch their frozen weights anew in the backward, in place."""
    for module in model.modules():
        if type(module) is nn.Linear and (hooks := _offloads(module)) and not module.weight.requires_grad:
            # what the hook calls
            module._old_forward = partial(_forward_offloaded, module, hooks[0])  # type: ignore[assignment]


def fetched_linear(z: Tensor, bias: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
    """z: (..., d) -> z W' + b (..., m), with W (m, d) and b frozen; ``fetch`` gives W now and again in the backward."""
    return _FetchedLinear.apply(z, bias, fetch)


class _FetchedLinear(torch.autograd.Function):
    """dz = dy W, which needs the weight and nothing else."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
        ctx.fetch = fetch
        return F.linear(z, fetch(), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.fetch(), None, None


def _forward_offloaded(linear: nn.Linear, hook: Any, z: Tensor) -> Tensor:
    brought = [linear.weight]  # by the hook, for this forward

    def fetch() -> Tensor:
        return brought.pop() if brought else hook.weights_map["weight"].to(z.device, z.dtype)

    return fetched_linear(z, linear.bias, fetch)


def _offloads(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module that take its weights away after each forward."""
    return [h for h in _hooks(module) if getattr(h, "offload", False) is True and getattr(h, "weights_map", None)]


def _hooks(module: nn.Module) -> Iterator[Any]:
    hook = getattr(module, "_hf_hook", None)
    yield from getattr(hook, "hooks", [hook] if hook is not None else [])


def one_device(device: str) -> str:
    """Return the device that "auto" means: CUDA where there is one, else the CPU.

    Args:
        device: "auto", or a device, which is returned as it is.

    Returns:
        A device by name.
    """
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
