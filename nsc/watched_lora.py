"""LoRA layers whose down-projection also measures the null-space ratio of its rows, in place and reversibly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nsc.errors import AdapterError, UnsupportedAdapter
from nsc_kernels import gram_inverse, lora_down, ratio_from_energy


class WatchedLinear(nn.Linear):
    """A ``lora_A`` that also measures the null-space ratio of the rows that it is given.

    Attributes:
        seen: takes the ratios (...,) of every call while it is a list; None outside a forward of the model.
        differentiable: whether the ratios have a gradient.
    """

    seen: list[Tensor] | None
    differentiable: bool

    def forward(self, z: Tensor) -> Tensor:
        """Return what ``nn.Linear`` without bias returns, and append the ratios of the rows to ``seen``.

        Args:
            z: (..., d).

        Returns:
            u = z A^T, (..., r).
        """
        u, energy = lora_down(z, self.weight)
        # A checkpointed block runs again in the backward, unseen, and must show autograd the same operations.
        if self.differentiable or self.seen is not None:
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                # A in the dtype autocast gave it: only so is u' G u the energy of a projection.
                rows = ratio_from_energy(energy, u, gram_inverse(self.weight.to(u.dtype)))
            if self.seen is not None:
                self.seen.append(rows)
        return u


def watchable_layers(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Find the down-projections of a model whose null-space ratio can be measured.

    Args:
        model: any module with PEFT LoRA layers in it.

    Returns:
        Name -> the ``lora_A``, and name -> why a layer has no ratio. Names are those of the base model, with
        ``.adapter`` appended for an adapter that is not PEFT's ``default``.

    Raises:
        AdapterError: if there is no LoRA layer.
        UnsupportedAdapter: if every LoRA layer computes something else than ``s B A z`` with a linear A.
        ValueError: if a layer is watched already.
    """
    watchable: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for path, layer in layers:
        for adapter, linear in [*layer.lora_A.items(), *layer.lora_embedding_A.items()]:
            reason = _reason_to_skip(layer, adapter, linear)
            if reason is None:
                watchable[_name(path, adapter)] = linear
            else:
                skipped[_name(path, adapter)] = reason
    if not layers:
        raise AdapterError("the model has no LoRA layer: make it one with peft.get_peft_model first")
    if not watchable:
        raise UnsupportedAdapter("; ".join(f"{name} has no null-space ratio: {why}" for name, why in skipped.items()))
    return watchable, skipped


def _name(path: str, adapter: str) -> str:
    layer = path.replace("_orig_mod.", "").rpartition("base_model.model.")[2]
    return ".".join(part for part in (layer, adapter) if part and part != "default") or adapter


def _reason_to_skip(layer: Any, adapter: str, linear: Any) -> str | None:
    if isinstance(linear, WatchedLinear):
        raise ValueError("the model is tracked already: use that tracker, or call untrack(model) first")
    if layer.use_dora.get(adapter) or adapter in getattr(layer, "lora_variant", ()):
        return "its adapter is a variant, such as DoRA, that computes more than s B A z"
    if type(linear) is not nn.Linear or linear.bias is not None:
        return f"its A is a {type(linear).__name__}, not a plain nn.Linear without bias"
    if "forward" in vars(linear):
        return "its A has a custom forward, as accelerate gives it in a model spread over devices"
    return None


def watch(linear: nn.Linear, differentiable: bool) -> WatchedLinear:
    """Turn a plain ``lora_A`` into a ``WatchedLinear``, in place.

    Args:
        linear: a ``lora_A`` from ``watchable_layers``.
        differentiable: whether its ratios have a gradient.

    Returns:
        The same module.
    """
    linear.__class__ = WatchedLinear
    watched = cast(WatchedLinear, linear)
    watched.seen, watched.differentiable = None, differentiable
    return watched


def unwatch(layer: WatchedLinear) -> None:
    """Turn a ``WatchedLinear`` back into the ``nn.Linear`` that it was, in place.

    Args:
        layer: as ``watch`` returned it.
    """
    del layer.seen, layer.differentiable
    layer.__class__ = nn.Linear  # type: ignore[assignment]


def refuse_lost_gradient(name: str, layer: WatchedLinear, seen: Sequence[Tensor]) -> None:
    """Refuse a reentrant checkpoint: it runs the forward without gradient, so its ratios can train nothing.

    Args:
        name: of the layer, for the message.
        layer: the layer.
        seen: the ratios of its calls in one forward.

    Raises:
        ValueError: if the ratios should have a gradient and have none.
    """
    wanted = layer.differentiable and layer.weight.requires_grad and torch.is_grad_enabled()
    if wanted and not all(rows.requires_grad for rows in seen):
        raise ValueError(
            f"the ratio of {name} has no gradient: with differentiable=True, enable gradient checkpointing with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
