"""The torch side that several ops share: dtypes, rows in the form the kernels need, and refusals at the boundary."""

from collections.abc import Sequence

import torch
from torch import Tensor


def accumulator_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of sums over these tensors, and of what is computed from the sums.

    Args:
        tensors: of any floating dtypes.

    Returns:
        float64 if any of the tensors is float64, else float32.
    """
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def autocast_to(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Cast tensors as ``F.linear`` would under autocast.

    Args:
        tensors: on one device.

    Returns:
        The tensors in autocast's dtype where it is enabled; float64 stays as it is.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)


def shaped(x: Tensor, shape: Sequence[int]) -> Tensor:
    """Return ``x`` in another shape, without a step for autograd where it has that shape already.

    Args:
        x: of any shape.
        shape: of as many elements.

    Returns:
        ``x`` itself, or a reshape of it.
    """
    return x if tuple(x.shape) == tuple(shape) else x.reshape(shape)


def unit_stride(x: Tensor) -> Tensor:
    """Return ``x`` with a contiguous last dimension, as the kernels need it.

    Args:
        x: of any strides.

    Returns:
        ``x`` itself, or a contiguous copy of it.
    """
    return x if x.stride(-1) == 1 else x.contiguous()


def expect(name: str, x: Tensor, shape: Sequence[int], meaning: str, like: Tensor, *, integer: bool = False) -> None:
    """Refuse an argument unless its shape, device and kind of dtype fit.

    Only metadata is looked at, so the check never waits for a device.

    Args:
        name: how the message names the argument.
        x: the argument.
        shape: the shape that it must have.
        meaning: what that shape means, in words for the message.
        like: a tensor on the device where ``x`` must be.
        integer: whether ``x`` must hold integers; else it must be floating point.

    Raises:
        ValueError: with the argument, what it must be, what it is, and the remedy.
    """
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but z is on {like.device}; move it there first")
    if integer and (x.is_floating_point() or x.is_complex() or x.dtype == torch.bool):
        raise ValueError(f"{name} must hold integers, got {x.dtype}; convert it with .long()")
    if not integer and not x.is_floating_point():
        raise ValueError(f"{name} must be floating point, got {x.dtype}; convert it with .float()")
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)}, {meaning}, got {tuple(x.shape)}")


def row_operands(z: Tensor, lora_A: Tensor) -> tuple[Tensor, Tensor]:
    """Refuse rows and a down-projection that do not fit together, and cast both as ``F.linear`` would.

    Args:
        z: (..., d) with d >= 1.
        lora_A: (R, d).

    Returns:
        z and lora_A, in autocast's dtype where it is enabled.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit together.
    """
    if z.dim() == 0 or z.shape[-1] == 0:
        raise ValueError(f"z must be (..., d) with d >= 1, got shape {tuple(z.shape)}")
    expect("z", z, z.shape, "rows of width d", z)
    expect("lora_A", lora_A, (lora_A.shape[:1] or (0,)) + z.shape[-1:], "one row for each column of u", z)
    z, lora_A = autocast_to(z, lora_A)
    if z.dtype != lora_A.dtype:
        raise ValueError(f"z is {z.dtype} but lora_A is {lora_A.dtype}; convert one with .to(), or use autocast")
    return z, lora_A
