"""One reversible swap: target linears out, MergedLoRALinear in, and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from nsc.adapters.stack import DenseStack, ModuleStack, Stack
from nsc.bases.experts import fused_experts, parameter_of, unwatched
from nsc.bases.structure import replace_module
from nsc.batch import Batch
from nsc.runtime.placement import is_plain, run_device
from nsc_kernels import MergedDenseLinear, MergedLoRALinear, Siblings
from nsc_kernels.modules import layer_plan


@contextmanager
def merged_layers(
    model: nn.Module, stack: Stack, lam: Tensor, plans: Mapping[str, str] | None = None
) -> Iterator[dict[str, MergedLoRALinear]]:
    """Put all adapters into the model, weighted by coefficients, and restore the model afterwards.

    The model is changed in place and is exactly what it was on leaving, also after an exception. A layer that adapters
    fine-tuned whole becomes a MergedDenseLinear, which is no target and shares no input; one behind the body, such as
    lm_head, stands last in the stack and is left out. Factors are cast to the dtype and device in which their layer
    computes. Experts and routers are no modules that could be replaced: their updates are added to the parameters,
    without a gradient.

    Args:
        model: the body.
        stack: the adapters.
        lam: (M, C) coefficients: one per adapter, or per rank row where the stack is ``by_rank``.
        plans: modules that do not run by their factors, as ``choose_plans`` finds them.

    Yields:
        Name -> layer that carries the adapters.
    """
    added = set(unwatched(model, stack.names))
    behind = {name for name in stack.names if is_behind(model, stack, name)}
    originals = {name: model.get_submodule(name) for name in stack.names if name not in added | behind}
    dtype = next(model.parameters()).dtype
    rows = dict(zip(stack.names, lam.detach(), strict=True))
    with copied(model, added) as held:
        layers: dict[str, Any] = {
            name: AddedUpdate(*held[name], stack.layer(name), row[: len(stack.layer(name).owned)])
            if name in added
            else _merged_layer(originals[name], stack.layer(name), row, (plans or {}).get(name, "factors"), dtype)
            for name, row in rows.items()
            if name not in behind
        }
        try:
            for name in originals:
                replace_module(model, name, layers[name])
            set_coefficients(layers, lam.detach())
            yield layers
        finally:
            for layer in layers.values():
                layer.siblings = None  # a circle of references would keep the factors in memory
            for name, original in originals.items():
                replace_module(model, name, original)


class AddedUpdate:
    """An expert's or a router's matrix, which holds the base's with the update for the coefficients that were set last.

    Args:
        stored: (m, d), a view of the parameter in the model.
        original: (m, d), what the base has there.
        layer: the adapters on it.
        lam: its row of the coefficients.
    """

    siblings = None

    def __init__(self, stored: Tensor, original: Tensor, layer: ModuleStack | DenseStack, lam: Tensor) -> None:
        self._stored, self._original, self._layer, self._lam = stored, original, layer, lam

    @property
    def lam(self) -> Tensor:
        """The coefficients, of which no gradient is taken."""
        return self._lam

    @lam.setter
    def lam(self, lam: Tensor) -> None:
        """Set the coefficients, and with them the matrix.

        Args:
            lam: one per adapter.
        """
        self._lam = lam.detach()
        self._stored.copy_(self._original.double() + self._layer.delta(self._lam).to(self._original.device))


@contextmanager
def copied(model: nn.Module, names: Collection[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Put copies in place of the parameters that hold these layers, and the parameters back afterwards.

    Args:
        model: the body.
        names: names of layers.

    Yields:
        Name -> its matrix (m, d) in the copy, to be written to, and what the base has there.
    """
    fused = fused_experts(model) if names else {}
    places = {name: parameter_of(name) for name in names}
    parameters = {key: model.get_parameter(key) for key, _ in places.values()}
    originals = {key: parameter.data for key, parameter in parameters.items()}

    def views(key: str, at: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        both = parameters[key].data[at], originals[key][at]
        return (both[0].mT, both[1].mT) if key in fused and fused[key].transposed else both

    try:
        for parameter in parameters.values():
            parameter.data = parameter.data.clone()
        yield {name: views(*place) for name, place in places.items()}
    finally:
        for key, parameter in parameters.items():
            parameter.data = originals[key]


def is_behind(model: nn.Module, stack: Stack, name: str) -> bool:
    """Return whether a layer of a stack lies behind the body, as the layer over the vocabulary does.

    Args:
        model: the body.
        stack: the adapters.
        name: name of the layer.

    Returns:
        Whether adapters fine-tuned it whole, and the body has none of that name.
    """
    return name in stack.dense and name.partition(".")[0] not in dict(model.named_children())


def set_coefficients(layers: dict[str, MergedLoRALinear], lam: Tensor | Sequence[Tensor]) -> None:
    """Point every layer at its row of the coefficients; the next forward is differentiable in them.

    Args:
        layers: name -> layer that carries the adapters.
        lam: (M, C), or one row per layer; those of layers behind the body, which are the last, are not used.
    """
    for layer, row in zip(layers.values(), lam, strict=False):
        layer.lam = row[: layer.lam.numel()].to(layer.lam.device)  # by rank, rows are as long as the longest


def share_inputs(
    model: nn.Module, layers: Mapping[str, MergedLoRALinear], targets: Sequence[str], batch: Batch
) -> None:
    """Let layers that read the very same tensor share one pass over it, as ``Siblings``.

    Which layers those are is seen in a forward. A layer that runs by its weights takes part only if it is a target,
    which needs u.

    Args:
        model: the body.
        layers: name -> layer that carries the adapters.
        targets: names of the measured modules.
        batch: rows for the forward; one row is enough.
    """
    layers = {name: layer for name, layer in layers.items() if isinstance(layer, MergedLoRALinear)}
    for names in readers(model, layers, batch)[0]:
        alike: dict[Any, list[MergedLoRALinear]] = {}
        for name in names:
            layer = layers[name]
            if layer.plan == "factors" or name in targets:
                alike.setdefault((layer.lora_A.dtype, layer.lora_A.device), []).append(layer)
        for members in alike.values():
            if len(members) > 1:
                Siblings(members)


@torch.no_grad()
def readers(
    model: nn.Module, layers: Mapping[str, nn.Module], batch: Batch
) -> tuple[list[list[str]], Mapping[str, int]]:
    """Find which layers read the very same tensor, in one forward.

    Args:
        model: the body.
        layers: name -> layer of the body.
        batch: rows for the forward; one row is enough.

    Returns:
        The layers by the tensor that they read, in the order in which they run, one that runs twice by itself; and how
        often each runs.
    """
    groups: list[list[str]] = []
    seen = WeakTensorKeyDictionary()  # a tensor that is gone must not be mistaken for a new one in its place
    runs: Counter[str] = Counter()

    def note(name: str, layer: nn.Module, args: tuple[Tensor]) -> None:
        runs[name] += 1
        if args[0] not in seen:
            groups.append(seen.setdefault(args[0], []))
        seen[args[0]].append(name)

    hooks = [layer.register_forward_pre_hook(partial(note, name)) for name, layer in layers.items()]
    try:
        model(**batch.arguments(next(model.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()
    alone = [[name] for name, times in runs.items() if times > 1]
    once = [[name for name in group if runs[name] == 1] for group in groups]
    return [group for group in [*once, *alone] if group], runs


def choose_plans(model: nn.Module, stack: Stack, plan: str, tokens: int) -> dict[str, str]:
    """Choose how each layer applies its adapters.

    Args:
        model: the body; its quantised, offloaded or sharded layers have nothing to fold into and run by factors.
        stack: the adapters.
        plan: "factors", "weights", or "auto", which takes fewer FLOPs.
        tokens: tokens of a step.

    Returns:
        Module -> "factors" or "weights".
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
    module: ModuleStack | DenseStack,
    row: Tensor,
    plan: str,
    dtype: torch.dtype,  # of the model, for a layer whose weight is stored in integers
) -> MergedLoRALinear | MergedDenseLinear:
    stored, device = next(linear.parameters()).dtype, run_device(linear)
    to: Any = {"device": device, "dtype": stored if stored.is_floating_point else dtype}
    lam = row.detach().to(device)[: len(module.owned)]
    if isinstance(module, DenseStack):
        bias = None if module.bias_deltas is None else module.bias_deltas.to(**to)
        return MergedDenseLinear(linear, module.deltas.to(**to), bias, module.present, lam)
    A, B = module.A.to(**to), module.B.to(**to)
    return MergedLoRALinear(linear, A, B, module.ranks, module.scales, lam, plan=plan, by_rank=module.by_rank)
