"""Conv1D, the linear layer of GPT-2's family, which stores its weight transposed: run as an ``nn.Linear``.

So every layer that is measured, merged or folded is an ``nn.Linear`` (m, d). Only files, and what is loaded onto the
model by other libraries, know the stored form (d, m).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from nsc.bases.structure import replace_module
from nsc.errors import NSCError


def run_as_linears(model: nn.Module) -> None:
    """Replace every Conv1D of a model by an ``nn.Linear`` with the same weight, transposed, and the same bias.

    Args:
        model: changed in place.

    Raises:
        NSCError: naming a layer that accelerate brings to where it is used.
    """
    for name, stored in [(name, m) for name, m in model.named_modules() if isinstance(m, Conv1D)]:
        if hasattr(stored, "_hf_hook"):
            raise NSCError(f"{name} is a Conv1D, which is not offloaded: leave device_map out, or give one device")
        linear: Any = nn.Linear(1, 1, device="meta")
        linear.in_features, linear.out_features = stored.weight.shape
        weight = stored.weight.detach().T.contiguous()
        linear.weight = nn.Parameter(weight, requires_grad=stored.weight.requires_grad)
        stored.weight.data, linear.bias = weight.T, stored.bias
        linear.__dict__["stored"] = stored  # no submodule: its parameters are the linear's
        replace_module(model, name, linear)


def transposed_weights(model: nn.Module) -> set[str]:
    """Return the weights of a body that its checkpoint holds transposed.

    Args:
        model: the body.

    Returns:
        Names of parameters.
    """
    return {f"{name}.weight" for name, module in model.named_modules() if "stored" in module.__dict__}


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Put every Conv1D back, as transformers itself built the model.

    Args:
        model: changed in place.

    Yields:
        Nothing; each Conv1D runs as a linear afterwards.
    """
    linears = {name: module for name, module in model.named_modules() if "stored" in module.__dict__}
    for name, linear in linears.items():
        stored = linear.__dict__["stored"]
        stored.weight.data = linear.weight.data.T  # which may have moved to another device
        replace_module(model, name, stored)
    try:
        yield
    finally:
        for name, linear in linears.items():
            replace_module(model, name, linear)
