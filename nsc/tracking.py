"""The null-space ratio of every LoRA layer while somebody else's code trains it.

    om(z) = |(I - P) z| / |z|        P projects onto the rows of A, z is what enters A

``track`` turns each plain ``lora_A`` of a PEFT model into a ``WatchedLinear``, in place and on that instance only: the
same module, parameters, hooks and state dict, with another ``forward``, which takes ``u = A z`` and ``|z|^2`` from one
pass over z. Forward hooks of the model say when a forward begins and ends, and what its attention mask was.
``RatioTracker.remove`` undoes all of it.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 (fine-tuning compresses what A does not see).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import TrainerCallback

from nsc.errors import AdapterError, UnsupportedAdapter
from nsc_kernels import gram_inverse, lora_down, ratio_from_energy


class WatchedLinear(nn.Linear):
    """A ``lora_A`` that also appends the ratios of the rows it is given, (...,), to ``seen`` while that is a list."""

    seen: list[Tensor] | None
    differentiable: bool

    def forward(self, z: Tensor) -> Tensor:
        """z: (..., d) -> u: (..., r), as ``nn.Linear`` without bias."""
        u, energy = lora_down(z, self.weight)
        # A checkpointed block runs again in the backward, unseen, and must show autograd the same operations.
        if self.differentiable or self.seen is not None:
            with torch.set_grad_enabled(self.differentiable and torch.is_grad_enabled()):
                # A in the dtype autocast gave it: only so is u' G u the energy of a projection.
                rows = ratio_from_energy(energy, u, gram_inverse(self.weight.to(u.dtype)))
            if self.seen is not None:
                self.seen.append(rows)
        return u


class RatioTracker:
    """What ``track`` returns: the ratios of the last forward, and their means over the training forwards since a read.

    Layers are named as in the base model, with ``.adapter`` appended for one that is not PEFT's ``default``.
    layers: name -> the watched ``lora_A``.  skipped: name -> why it has no ratio.
    Leave its ``with`` block, or call ``remove``, to restore the model.
    """

    def __init__(
        self, model: nn.Module, found: Mapping[str, nn.Linear], skipped: Mapping[str, str], differentiable: bool
    ) -> None:
        self.skipped = dict(skipped)
        names = _arguments(model)
        self._mask_at = names.index("attention_mask") if names else sys.maxsize
        self.layers = {name: _watch(linear, differentiable) for name, linear in found.items()}
        device = next(iter(self.layers.values())).weight.device
        self._totals = torch.zeros(2, len(found), device=device)  # sums of ratios and numbers of rows
        self._ran: list[str] = []
        self._values = torch.empty(0)
        begin, end = model.register_forward_pre_hook, model.register_forward_hook
        self._handles = [begin(self._begin), end(self._end, with_kwargs=True)]

    @property
    def ratios(self) -> dict[str, Tensor]:
        """Layer -> 0-d mean over the rows of the last forward, for the layers that ran in it.

        Empty before the first. With ``differentiable`` it has a gradient to A, and through z to the layers before.
        """
        return dict(zip(self._ran, self._values.unbind(), strict=True))

    def mean(self) -> Tensor:
        """0-d mean of ``ratios`` over layers. Raises ValueError while there are none."""
        if not self._ran:
            raise ValueError("no LoRA layer has run yet: call the very model that was given to track()")
        return self._values.mean()

    def read(self) -> dict[str, float]:
        """Layer -> mean over all rows of the training forwards since the last ``read``, which starts anew.

        A forward in ``eval()`` mode does not enter. Waits for the device once, for all layers together.
        """
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        return {name: total / n for name, total, n in zip(self.layers, sums, counts, strict=True) if n}

    def remove(self) -> None:
        """Make the model what it was before ``track``; a second call does nothing. What was measured stays readable."""
        if self._handles:
            for layer in self.layers.values():
                del layer.seen, layer.differentiable
                layer.__class__ = nn.Linear  # type: ignore[assignment]
        while self._handles:
            self._handles.pop().remove()

    def __enter__(self) -> RatioTracker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def _begin(self, model: nn.Module, args: tuple) -> None:
        for layer in self.layers.values():
            layer.seen = []

    def _end(self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any) -> None:
        seen = {name: layer.seen for name, layer in self.layers.items() if layer.seen}
        for layer in self.layers.values():
            layer.seen = None
        for name, rows in seen.items():
            _refuse_lost_gradient(name, self.layers[name], rows)
        if seen:
            mask = args[self._mask_at] if len(args) > self._mask_at else kwargs.get("attention_mask")
            self._keep({name: _sum_and_count(rows, mask) for name, rows in seen.items()}, model.training)

    def _keep(self, sums: dict[str, Tensor], training: bool) -> None:
        device = next(iter(sums.values())).device
        both = torch.stack([x.to(device) for x in sums.values()], dim=1)
        self._ran, self._values = list(sums), both[0] / both[1]
        if training:
            nothing = both.new_zeros(2)
            self._totals = self._totals.to(device)
            self._totals += torch.stack([sums.get(name, nothing).detach().to(device) for name in self.layers], dim=1)


def track(model: nn.Module, *, differentiable: bool = False) -> RatioTracker:
    """Measure the null-space ratio of every LoRA layer of ``model`` in each of its forwards, at no extra pass over z.

    z is what enters ``lora_A``: with LoRA dropout and in ``train()`` mode, what dropout left of the rows. A row whose
    ``attention_mask`` (b, L) is 0 does not count; without such a mask, or where it is not one number for each row of z,
    all rows do. Outputs, gradients, parameters and state dict stay those of the model.

    Args:
        model: a ``PeftModel``, or any module with PEFT LoRA layers in it: the very one that will be called. It may be
            wrapped by ``torch.compile``, or by accelerate, before or after.
        differentiable: whether ``ratios`` and ``mean()`` have a gradient, for a term of the loss.

    Returns:
        A ``RatioTracker``, whose ``with`` block restores the model at its end.

    Raises:
        AdapterError: there is no LoRA layer.
        UnsupportedAdapter: there are only such as compute more or less than ``s B A z`` from a linear A. Beside others
            they are skipped, with a warning.
        ValueError: the model is tracked already, or has an encoder and a decoder, each with its own padding.

    Source: https://arxiv.org/abs/2603.26317, Eq. 3.
    """
    model = getattr(model, "_orig_mod", model)
    if "decoder_input_ids" in _arguments(model):
        raise ValueError("encoder and decoder differ in padding: track(model.get_encoder()), or the decoder, alone")
    found, skipped = _find(model)
    for name, reason in skipped.items():
        warnings.warn(f"{name} has no null-space ratio: {reason}", stacklevel=2)
    return RatioTracker(model, found, skipped, differentiable)


def untrack(model: nn.Module) -> None:
    """Remove every tracker from ``model``, such as that of a training that was cut short; there need not be one."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    for owner in (getattr(hook, "__self__", None) for hook in hooks):
        if isinstance(owner, RatioTracker):
            owner.remove()


class NullSpaceCallback(TrainerCallback):
    """Logs ``null_space_ratio/LAYER``, and ``null_space_ratio`` for their mean, beside every training loss.

    Each is the mean over the rows of all training forwards since the last log, of this process. Tracks the model from
    the beginning of a training to its end; a ``tracker`` that it is given is only read. ``tracker``: the one in use.
    """

    def __init__(self, tracker: RatioTracker | None = None) -> None:
        self.tracker = tracker
        self._own = tracker is None

    def add_to(self, trainer: Any) -> None:
        """Put this before all other callbacks of a ``Trainer``, so that TensorBoard, W&B and the like see the ratios.

        With ``Trainer(callbacks=[...])`` it comes after those: only the console and ``state.log_history`` have them.
        """
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start tracking. Raises as ``track``."""
        if self._own:
            self.on_train_end(args, state, control)  # of a training that was cut short
            self.tracker = track(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model."""
        if self._own and self.tracker is not None:
            self.tracker.remove()
            self.tracker = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the ratios to ``logs`` and to the entry of ``state.log_history`` that was made of them."""
        if self.tracker is None or "loss" not in (logs or {}):
            return
        means = self.tracker.read()
        if not means:
            warnings.warn("no LoRA layer was seen to run: nn.DataParallel hides them, torchrun does not", stacklevel=2)
            return
        entries = {f"null_space_ratio/{name}": value for name, value in means.items()}
        entries["null_space_ratio"] = sum(means.values()) / len(means)
        logs.update(entries)
        state.log_history[-1].update(entries)


def _arguments(model: nn.Module) -> list[str]:
    """The model's arguments by name, in order, if ``attention_mask`` is one; a plain ``PeftModel`` passes them on."""
    for candidate in (model, getattr(model, "get_base_model", lambda: model)()):
        names = list(inspect.signature(candidate.forward).parameters)
        if "attention_mask" in names:
            return names
    return []


def _find(model: nn.Module) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Name -> the ``lora_A`` to watch, and name -> why not."""
    found: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    layers = [(path, layer) for path, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    for path, layer in layers:
        for adapter, linear in [*layer.lora_A.items(), *layer.lora_embedding_A.items()]:
            reason = _reason_to_skip(layer, adapter, linear)
            if reason is None:
                found[_name(path, adapter)] = linear
            else:
                skipped[_name(path, adapter)] = reason
    if not layers:
        raise AdapterError("the model has no LoRA layer: make it one with peft.get_peft_model first")
    if not found:
        raise UnsupportedAdapter("; ".join(f"{name} has no null-space ratio: {why}" for name, why in skipped.items()))
    return found, skipped


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
        return "its A has a forward of its own, as accelerate gives to a model spread over devices"
    return None


def _watch(linear: nn.Linear, differentiable: bool) -> WatchedLinear:
    linear.__class__ = WatchedLinear
    watched = cast(WatchedLinear, linear)
    watched.seen, watched.differentiable = None, differentiable
    return watched


def _refuse_lost_gradient(name: str, layer: WatchedLinear, seen: Sequence[Tensor]) -> None:
    """A reentrant checkpoint runs the forward without gradient: what was seen of it can train nothing."""
    wanted = layer.differentiable and layer.weight.requires_grad and torch.is_grad_enabled()
    if wanted and not all(rows.requires_grad for rows in seen):
        raise ValueError(
            f"the ratio of {name} has no gradient: with differentiable=True, enable gradient checkpointing with "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )


def _sum_and_count(seen: Sequence[Tensor], mask: Any) -> Tensor:
    """(2,): the sum of the ratios of the rows that count, and their number. seen: (...,) each, mask: (b, L) or any."""
    total = seen[0].new_zeros(2)
    for rows in seen:
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == rows.numel():
            keep = mask.to(rows.device).reshape(rows.shape) != 0
            total = total + torch.stack([torch.where(keep, rows, 0.0).sum(), keep.sum()])
        else:
            total = total + torch.stack([rows.sum(), rows.new_full((), rows.numel())])
    return total
