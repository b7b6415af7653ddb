"""Where the weights of a base are and where its inputs go, and linears that fetch their weight whenever they use it.

accelerate's hooks bring an offloaded weight to its device for the forward. autograd would keep that copy for the
backward, so that all copies would be on the device at once. Here the copy is freed, and fetched again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc.errors import NSCError, one_line


def input_device(model: nn.Module) -> torch.device:
    """Return where the inputs of a model belong: where its first module with weights runs, wherever those are kept.

    Args:
        model: a base, perhaps dispatched by accelerate.

    Returns:
        The device.
    """
    return run_device(next(m for m in model.modules() if next(m.parameters(recurse=False), None) is not None))


def run_device(module: nn.Module) -> torch.device:
    """Return where a module runs.

    Args:
        module: one with parameters.

    Returns:
        The device of accelerate's hook where there is one, or else that of the parameters.
    """
    places = [hook.execution_device for hook in _hooks(module) if getattr(hook, "execution_device", None) is not None]
    return torch.device(places[0]) if places else next(module.parameters()).device


def is_plain(linear: nn.Module) -> bool:
    """Say whether updates can be folded into a module's weight.

    Args:
        linear: any module.

    Returns:
        Whether it is an ``nn.Linear`` with a whole weight on its device, neither quantised nor offloaded.
    """
    weight = getattr(linear, "weight", None)
    return type(linear) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta and not _offloads(linear)


def reload_in_backward(model: nn.Module) -> None:
    """Make the offloaded linears of a model fetch their frozen weights again in the backward.

    Args:
        model: a base dispatched by accelerate; changed in place.
    """
    for module in model.modules():
        if type(module) is nn.Linear and (hooks := _offloads(module)) and not module.weight.requires_grad:
            replace_forward(module, partial(_forward_offloaded, module, hooks[0]))


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module another forward, around which accelerate's hook still runs where there is one.

    Args:
        module: changed in place.
        forward: takes and returns what the module's own does.
    """
    # accelerate keeps the forward that its hook wraps in _old_forward.
    setattr(module, "_old_forward" if hasattr(module, "_hf_hook") else "forward", forward)


def fetched_linear(z: Tensor, bias: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
    """Apply a frozen linear whose weight is not kept between forward and backward.

    Args:
        z: (..., d) the inputs.
        bias: (m,) the frozen bias, if there is one.
        fetch: returns the frozen weight W (m, d) in the dtype and on the device of ``z``; called in the forward, and
            again in the backward.

    Returns:
        (..., m): ``z W^T + bias``.
    """
    return _FetchedLinear.apply(z, bias, fetch)


class _FetchedLinear(torch.autograd.Function):
    """A linear whose backward, dz = dy W, needs the weight and no activation."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, bias: Tensor | None, fetch: Callable[[], Tensor]) -> Tensor:
        ctx.fetch = fetch
        return F.linear(z, fetch(), bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return dy @ ctx.fetch(), None, None


def _forward_offloaded(linear: nn.Linear, hook: Any, z: Tensor) -> Tensor:
    brought = [linear.weight]  # on the device for this forward, by the hook

    def fetch() -> Tensor:
        return brought.pop() if brought else hook.weights_map["weight"].to(z.device, z.dtype)

    return fetched_linear(z, linear.bias, fetch)


def _offloads(module: nn.Module) -> list[Any]:
    """Return accelerate's hooks that take a module's weights off the device after each forward."""
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

    Raises:
        NSCError: if there is no such device, or it holds no values.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except Exception as error:  # each backend raises its own kinds
        raise NSCError(f"device {device} cannot be used ({one_line(error)}); give cpu, or auto") from error
    return device
