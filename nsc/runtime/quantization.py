"""Frozen weights in fewer bits, for learning only: nothing quantised is ever written.

transformers quantises while it loads, by torchao (int8 and fp8, one scale per output) or bitsandbytes (nf4). Their
matrix products are not used: a linear dequantises its weight to the dtype of its input in the forward and again in the
backward, so the gradient to the input is that of the same linear. (The CPU kernel of bitsandbytes 0.50 gives no
gradient, and its int8 rounds the inputs too.)
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from nsc.errors import NSCError
from nsc.runtime.placement import fetched_linear, replace_forward

LIBRARIES = {"int8": "torchao", "fp8": "torchao", "nf4": "bitsandbytes"}


def quantization_config(weights: str) -> Any:
    """Return the ``quantization_config`` for ``from_pretrained`` of transformers.

    Args:
        weights: a key of ``LIBRARIES``: int8, fp8 or nf4.

    Returns:
        A ``TorchAoConfig`` or ``BitsAndBytesConfig``.

    Raises:
        NSCError: if the library that it needs is missing or too old.
    """
    try:
        return _nf4() if weights == "nf4" else _by_row(weights)
    except ImportError as error:
        raise NSCError(
            f"weights {weights} need {LIBRARIES[weights]}, which cannot be imported ({error}): install the extra"
            " nsc-merging[quantized], or give weights full"
        ) from error


def dequantise_where_used(model: nn.Module) -> None:
    """Make the quantised linears of a model compute with their weights in the dtype of the input.

    Args:
        model: a base that transformers loaded with a ``quantization_config``; changed in place.

    Raises:
        NSCError: if no linear is quantised, since transformers may ignore the config silently.
    """
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and type(m.weight) is not nn.Parameter]
    if not linears:
        raise NSCError("no linear of the base was quantised; give weights full, or another version of transformers")
    for linear in linears:
        replace_forward(linear, partial(_forward, linear))


def dequantised(linear: nn.Linear) -> Tensor:
    """Return the weight that the bits of a quantised linear stand for.

    Args:
        linear: one that torchao or bitsandbytes quantised.

    Returns:
        (m, d) floating.
    """
    weight: Any = linear.weight
    if not hasattr(weight, "quant_state"):
        return weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)


def _forward(linear: nn.Linear, z: Tensor) -> Tensor:
    bias = None if linear.bias is None else linear.bias.to(z.dtype)
    return fetched_linear(z, bias, lambda: dequantised(linear).to(z.dtype))


def _by_row(weights: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig())


def _nf4() -> Any:
    import bitsandbytes  # noqa: F401  # transformers notices its absence only later, with another error
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
