"""The null-space ratio of every LoRA layer of a model while other code trains it.

    om(z) = |(I - P) z| / |z|        P projects onto the rows of A, z is what enters A

``track`` turns each plain ``lora_A`` of a PEFT model into a ``WatchedLinear``, in place and on that instance only: the
same module, parameters, hooks and state dict, with another ``forward``, which takes ``u = A z`` and ``|z|^2`` from one
pass over z. Forward hooks of the model tell when a forward begins and ends, and what its attention mask was.
``RatioTracker.remove`` undoes all of it.

Paper: https://arxiv.org/abs/2603.26317, Eq. 3 (fine-tuning compresses what A does not see).
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from nsc.watched_lora import WatchedLinear, refuse_lost_gradient, unwatch, watch, watchable_layers


class RatioTracker:
    """The ratios of a model's last forward, and their means over its training forwards since the last ``read``.

    ``track`` makes it. Leave its ``with`` block, or call ``remove``, to restore the model. Layers are named as in the
    base model, with ``.adapter`` appended for an adapter that is not PEFT's ``default``.

    Attributes:
        layers: name -> the watched ``lora_A``.
        skipped: name -> why that layer has no ratio.

    Args:
        model: the module whose forwards are measured.
        watchable: name -> a plain ``lora_A``, which is turned into a ``WatchedLinear``.
        skipped: name -> why that layer has no ratio.
        differentiable: whether the ratios have a gradient.
    """

    def __init__(
        self, model: nn.Module, watchable: Mapping[str, nn.Linear], skipped: Mapping[str, str], differentiable: bool
    ) -> None:
        self.skipped = dict(skipped)
        names = _arguments(model)
        self._mask_at = names.index("attention_mask") if names else sys.maxsize
        self.layers: dict[str, WatchedLinear] = {
            name: watch(linear, differentiable) for name, linear in watchable.items()
        }
        device = next(iter(self.layers.values())).weight.device
        self._totals = torch.zeros(2, len(watchable), device=device)  # sums of ratios and numbers of rows
        self._ran: list[str] = []
        self._values = torch.empty(0)
        begin, end = model.register_forward_pre_hook, model.register_forward_hook
        self._handles = [begin(self._begin), end(self._end, with_kwargs=True)]

    @property
    def ratios(self) -> dict[str, Tensor]:
        """The mean ratio over the rows of the last forward, a 0-d tensor for each layer that ran in it.

        Empty before the first forward. With ``differentiable`` the ratios have a gradient to A, and through z to the
        layers before.
        """
        return dict(zip(self._ran, self._values.unbind(), strict=True))

    def mean(self) -> Tensor:
        """Return the mean of ``ratios`` over layers.

        Returns:
            A 0-d tensor, with a gradient if the tracker is ``differentiable``.

        Raises:
            ValueError: if no LoRA layer has run yet.
        """
        if not self._ran:
            raise ValueError("no LoRA layer has run yet: call the very model that was given to track()")
        return self._values.mean()

    def read(self) -> dict[str, float]:
        """Return the mean ratio over all rows of the training forwards since the last ``read``, and start anew.

        Forwards in ``eval()`` mode do not count. Waits for the device once, for all layers together.

        Returns:
            Layer -> mean, for the layers that have run.
        """
        sums, counts = self._totals.tolist()
        self._totals.zero_()
        return {name: total / n for name, total, n in zip(self.layers, sums, counts, strict=True) if n}

    def remove(self) -> None:
        """Restore the model to what it was before ``track``; what was measured stays readable.

        A second call does nothing.
        """
        if self._handles:
            for layer in self.layers.values():
                unwatch(layer)
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
            refuse_lost_gradient(name, self.layers[name], rows)
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
    """Measure the null-space ratio of every LoRA layer of a model in each of its forwards, without another pass over z.

    z is what enters ``lora_A``: with LoRA dropout and in ``train()`` mode, what dropout left of the rows. A row whose
    ``attention_mask`` (b, L) is 0 does not count; without such a mask, or where it is not one number for each row of z,
    all rows count. Outputs, gradients, parameters and state dict stay those of the model.

    Args:
        model: a ``PeftModel``, or any module with PEFT LoRA layers in it: the very module that will be called. It may
            be wrapped by ``torch.compile`` or by accelerate, before or after.
        differentiable: whether ``ratios`` and ``mean()`` have a gradient, for a term of the loss.

    Returns:
        A ``RatioTracker``, whose ``with`` block restores the model at its end.

    Raises:
        AdapterError: if there is no LoRA layer.
        UnsupportedAdapter: if every LoRA layer computes something else than ``s B A z`` with a linear A. If only some
            do, those are skipped with a warning.
        ValueError: if the model is tracked already, or has an encoder and a decoder, each with its own padding.

    Example:
        >>> with track(model) as tracker:
        ...     model(**batch).loss.backward()
        >>> tracker.ratios  # {"model.layers.0.self_attn.q_proj": tensor(0.9), ...}

    Source: https://arxiv.org/abs/2603.26317, Eq. 3.
    """
    model = getattr(model, "_orig_mod", model)
    if "decoder_input_ids" in _arguments(model):
        raise ValueError("encoder and decoder differ in padding: track(model.get_encoder()), or the decoder, alone")
    watchable, skipped = watchable_layers(model)
    for name, reason in skipped.items():
        warnings.warn(f"{name} has no null-space ratio: {reason}", stacklevel=2)
    return RatioTracker(model, watchable, skipped, differentiable)


def untrack(model: nn.Module) -> None:
    """Remove every tracker from a model, such as that of a training that was interrupted.

    Args:
        model: it need not be tracked.
    """
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    for owner in (getattr(hook, "__self__", None) for hook in hooks):
        if isinstance(owner, RatioTracker):
            owner.remove()


class NullSpaceCallback(TrainerCallback):
    """A ``Trainer`` callback that logs the ratio of every LoRA layer beside every training loss.

    It logs ``null_space_ratio/LAYER``, the mean over the rows of all training forwards of this process since the last
    log, and ``null_space_ratio``, the mean over layers. It tracks the model from the beginning of training to its end.

    Attributes:
        tracker: the tracker in use, or None outside a training.

    Args:
        tracker: a tracker to be read only; by default the callback makes and removes its own.
    """

    def __init__(self, tracker: RatioTracker | None = None) -> None:
        self.tracker = tracker
        self._own = tracker is None

    def add_to(self, trainer: Any) -> None:
        """Put this callback before all others of a ``Trainer``, so that TensorBoard, W&B and the like see the ratios.

        Given as ``Trainer(callbacks=[...])`` it comes after those: then only the console and ``state.log_history`` show
        the ratios.

        Args:
            trainer: a transformers ``Trainer``.
        """
        trainer.callback_handler.callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Start tracking, unless a tracker was given.

        Args:
            args, state, control, kwargs: not used.
            model: the model that will be trained.

        Raises:
            NSCError, ValueError: as ``track``.
        """
        if self._own:
            self.on_train_end(args, state, control)  # of a training that was cut short
            self.tracker = track(model)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model, unless the tracker was given.

        Args:
            args, state, control, kwargs: not used.
        """
        if self._own and self.tracker is not None:
            self.tracker.remove()
            self.tracker = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the ratios to a log of the training loss.

        Args:
            args, control, kwargs: not used.
            state: of the ``Trainer``; the ratios are added to the last entry of its ``log_history``, too.
            logs: what will be logged; without "loss" it is left alone.
        """
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
    """Return the names of the model's arguments in order, or none if ``attention_mask`` is not one of them."""
    for candidate in (model, getattr(model, "get_base_model", lambda: model)()):
        names = list(inspect.signature(candidate.forward).parameters)
        if "attention_mask" in names:
            return names
    return []


def _sum_and_count(seen: Sequence[Tensor], mask: Any) -> Tensor:
    """Return (2,): the sum of the ratios of the rows that count, and their number.

    seen holds the ratios (...,) of every call; a mask that is not one number for each row is not used.
    """
    total = seen[0].new_zeros(2)
    for rows in seen:
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.numel() == rows.numel():
            keep = mask.to(rows.device).reshape(rows.shape) != 0
            total = total + torch.stack([torch.where(keep, rows, 0.0).sum(), keep.sum()])
        else:
            total = total + torch.stack([rows.sum(), rows.new_full((), rows.numel())])
    return total
