"""One reversible swap: target linears out, MergedLoRALinear in, and back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from nsc.costs import layer_plan
from nsc.places import is_plain, run_device
from nsc.stack import ModuleStack, Stack
from nsc_kernels import MergedLoRALinear


@contextmanager
def merged_layers(
    model: nn.Module, stack: Stack, lam: Tensor, plans: Mapping[str, str] | None = None
) -> Iterator[dict[str, MergedLoRALinear]]:
    """The model with every module of ``stack`` carrying all adapters, weighted by the rows of ``lam`` (M, K).

    plans: of modules that are not to run by their factors, as ``choose_plans`` finds them.
    The model is changed in place and is exactly what it was on leaving, also after an exception. Factors are cast to
    the dtype and device in which the layer that they join computes.
    """
    originals = {name: model.get_submodule(name) for name in stack.names}
    dtype = next(model.parameters()).dtype
    layers = {
        name: _merged_layer(originals[name], stack.modules[name], row, (plans or {}).get(name, "factors"), dtype)
        for name, row in zip(stack.names, lam.unbind(0), strict=True)
    }
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield layers
    finally:
        for name, original in originals.items():
            replace_module(model, name, original)


def set_coefficients(layers: dict[str, MergedLoRALinear], lam: Tensor) -> None:
    """Point every layer at its row of ``lam`` (M, K), so that the next forward is differentiable in it."""
    for layer, row in zip(layers.values(), lam.unbind(0), strict=True):
        layer.lam = row.to(layer.spread.device)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``name`` points."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def choose_plans(model: nn.Module, stack: Stack, plan: str, tokens: int) -> dict[str, str]:
    """Module -> "factors" or "weights": ``plan`` itself, or with "auto" what takes fewer FLOPs for so many tokens.

    A layer that is quantised, offloaded or sharded has no weight to fold into and runs by its factors.
    """
    plans = {}
    for name, module in stack.modules.items():
        linear = model.get_submodule(name)
        (m, R), d = module.B.shape, module.A.shape[1]
        best = layer_plan(tokens, d, m, R) if plan == "auto" else plan
        plans[name] = best if is_plain(linear) else "factors"
    return plans


def _merged_layer(
    linear: nn.Module,
    module: ModuleStack,
    row: Tensor,
    plan: str,
    dtype: torch.dtype,  # of the model, for a layer whose weight is stored in integers
) -> MergedLoRALinear:
    stored, device = next(linear.parameters()).dtype, run_device(linear)
    dtype = stored if stored.is_floating_point else dtype
    A, B = (t.to(device=device, dtype=dtype) for t in (module.A, module.B))
    return MergedLoRALinear(linear, A, B, module.ranks, module.scales, row.detach().to(device), plan=plan)
