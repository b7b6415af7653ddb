"""The head of a task: what turns the body's last hidden states into the task's output, run as the modules that it is.

transformers' own class for the task, such as BertForSequenceClassification, is built with something in its body's place
that hands over given states; so poolers, several layers and activations are followed as that class has them. Which
states it pools is read off the gradient of its output, and checked: "first" or "last" token of a sample, their "mean",
or, of images, whatever it does with "all" of them.

Where a task has no output at all, its pooled states stand for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions as BodyOutput

from nsc.bases.base_model import Base, quiet_loading
from nsc.bases.heads import Head
from nsc.bases.structure import is_causal, replace_module
from nsc.bases.weights import read_parameters, stored_tensors
from nsc.errors import NSCError, first_line
from nsc.runtime.placement import input_device

UNLIKELY = 7919  # a number of outputs that is no other size of a model, to see where that number stands
PROBE = 5  # tokens of the sample by which pooling is seen


@dataclass(frozen=True)
class TaskHead:
    """The head of one task.

    Attributes:
        pooling: "first", "last" or "mean" of a sample's tokens, "each" of them, or "all" (of images, with any pooling).
        module: pooled states (n, d), or for "all" (n, L, d) -> outputs (n, C), in at least float32.
        outputs: C.
        generating: the layer by which a causal base names its next token, where the head is that.
        states: whether the outputs are the pooled states themselves.
    """

    pooling: str
    module: nn.Module
    outputs: int
    generating: Head | None = None
    states: bool = False

    @property
    def numbers(self) -> bool:
        """Whether the outputs are numbers, and no logits."""
        return self.states or self.outputs == 1

    def __call__(self, states: Tensor) -> Tensor:
        """Return the outputs.

        Args:
            states: (n, d), or for pooling "all" (n, L, d).

        Returns:
            (n, C) in at least float32.
        """
        return self.module(states)

    logits = __call__


def load_task_head(base: Base, saved: Mapping[str, Tensor], task: str) -> TaskHead:
    """Load the head that an adapter carries, as transformers' class for the task runs it.

    Args:
        base: with weights.
        saved: the tensors of the adapter's modules_to_save outside the body, as its model class names them.
        task: name, for errors.

    Returns:
        The head, on the device of the body's inputs.

    Raises:
        NSCError: if transformers has no class with such a head for this base, a weight of it is nowhere, or it pools in
            a way that is not followed.
    """
    images = base.takes == "pixel_values"
    whole, outputs = _without_body(base, saved, task, images)
    _fill(whole, base, saved, task)
    dtype = torch.promote_types(next(base.model.parameters()).dtype, torch.float32)
    whole = whole.to(input_device(base.model), dtype).requires_grad_(False).eval()
    module = _Head(whole, images)
    try:
        pooling = _pooling(module, base.body_config.hidden_size)
    except Exception as error:  # of any kind: the class asks for more than states, as XLNet's does for a memory
        raise NSCError(
            f"adapter {task}: {type(whole).__name__} does not run on hidden states alone ({first_line(error)}); merge"
            " this task by nsc, or name it as unseen"
        ) from error
    if not pooling and not images:
        raise NSCError(
            f"adapter {task}: {type(whole).__name__} pools its tokens in a way that is not followed; merge this task by"
            " nsc, or name it as unseen"
        )
    return TaskHead("all" if images else pooling, module, outputs)


def vocabulary_head(head: Head) -> TaskHead:
    """Return a base's own layer over its vocabulary as the head of a task.

    Args:
        head: the layer.

    Returns:
        The head, which reads each token, in the dtype of its states.
    """
    return TaskHead("each", _Vocabulary(head), len(head.weight), head)


def state_head(base: Base) -> TaskHead:
    """Return what stands for the head of a task without an output: the pooled last hidden states themselves.

    Args:
        base: with weights.

    Returns:
        A head whose outputs are the last state of a sample where the base is causal, else the mean of all.
    """
    pooling = "all" if base.takes == "pixel_values" else "last" if is_causal(base.model) else "mean"
    return TaskHead(pooling, _States(), base.body_config.hidden_size, states=True)


class _States(nn.Module):
    """Pooled states in at least float32."""

    def forward(self, states: Tensor) -> Tensor:
        """(n, d) or (n, L, d) -> (n, d)."""
        states = states.to(torch.promote_types(states.dtype, torch.float32))
        return states.mean(1) if states.ndim == 3 else states


class _Vocabulary(nn.Module):
    """Logits in at least float32."""

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, states: Tensor) -> Tensor:
        """(n, d) -> (n, C)."""
        logits = self.head.logits(states)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _Handed(nn.Module):
    """Stands for the body: returns the states that it was handed, and what the body's own pooler makes of them."""

    def __init__(self, body: nn.Module | None) -> None:
        super().__init__()
        self.states = torch.empty(0)
        self.bodies = (body,)  # whose pooler is followed, if any; in a tuple, since it is no part of this module

    def forward(self, *args: Any, **kwargs: Any) -> BodyOutput:
        """Return the states, whatever is asked."""
        return BodyOutput(last_hidden_state=self.states, pooler_output=self._pooled())

    def _pooled(self) -> Tensor | None:
        body: Any = self.bodies[0]
        if body is None:
            return None
        states = self.states.to(next(body.pooler.parameters()).dtype)
        if isinstance(body.pooler, nn.Linear):  # ALBERT's, whose activation stands beside it
            return body.pooler_activation(body.pooler(states[:, 0])).to(self.states.dtype)
        return body.pooler(states).to(self.states.dtype)


class _Head(nn.Module):
    """The class for the task without its body, as a function of states."""

    def __init__(self, whole: nn.Module, images: bool) -> None:
        super().__init__()
        self.whole, self.images = whole, images
        self.handed = next(module for module in whole.modules() if isinstance(module, _Handed))

    def forward(self, states: Tensor) -> Tensor:
        """(n, d) -> (n, C); (n, L, d) -> (n, C), or (n, L, C) where each token has its own output."""
        parameter = next(self.whole.parameters())
        self.handed.states = (states[:, None] if states.ndim == 2 else states).to(parameter.dtype)
        n, width = self.handed.states.shape[:2]
        try:
            logits = self._logits(n, width, states.device)
        finally:
            self.handed.states = torch.empty(0)  # which would keep the graph of a whole forward
        return logits[:, 0] if states.ndim == 2 and logits.ndim == 3 else logits

    def _logits(self, n: int, width: int, device: torch.device) -> Tensor:
        """What the class says of the states that are handed to it."""
        if self.images:
            return self.whole(pixel_values=torch.zeros(n, 3, 1, 1, device=device)).logits
        ids = torch.ones(n, width, dtype=torch.int64, device=device)
        return self.whole(input_ids=ids, attention_mask=ids).logits


def _without_body(base: Base, saved: Mapping[str, Tensor], task: str, images: bool) -> tuple[nn.Module, int]:
    """The class for the task on the meta device, its body replaced, with as many outputs as the saved head has."""
    auto = AutoModelForImageClassification if images else AutoModelForSequenceClassification
    whole, body = _build(base, auto, UNLIKELY, task)
    places = [(name, x.shape.index(UNLIKELY)) for name, x in _own(whole, body).items() if UNLIKELY in x.shape]
    known = [saved[name].shape[axis] for name, axis in places if name in saved]
    if not known:
        raise NSCError(
            f"adapter {task} carries {', '.join(sorted(saved))}, which is not the head of {type(whole).__name__}"
            f" ({', '.join(name for name, _ in places)}): merge this task by nsc, or name it as unseen"
        )
    whole, body = _build(base, auto, known[0], task)
    pools = getattr(whole.get_submodule(body), "pooler", None) is not None
    if pools:
        _require_pooler(base, task)
    replace_module(whole, body, _Handed(base.model if pools else None))
    return whole, known[0]


def _build(base: Base, auto: Any, outputs: int, task: str) -> tuple[nn.Module, str]:
    """The whole class on the meta device, and the name of its body."""
    config = deepcopy(base.config)
    config.num_labels, config.pad_token_id = outputs, 0
    try:
        with quiet_loading(), torch.device("meta"):
            whole = auto.from_config(config, trust_remote_code=False)
    except (ValueError, TypeError, AttributeError) as error:
        raise NSCError(
            f"adapter {task} carries a head, but transformers builds no model with one for base {base.id!r}: {error}"
        ) from error
    parts = list(base.model.children())
    kinds = [type(base.model), *(type(part) for part in parts if len(parts) == 1)]  # CLIP's class holds what is in it
    places = [n for kind in kinds for n, m in whole.named_modules() if n and type(m) is kind]
    if not places:
        raise NSCError(
            f"adapter {task}: {type(whole).__name__} holds no {kinds[0].__name__}, so its head is not followed"
        )
    return whole, places[0]


def _own(whole: nn.Module, body: str) -> dict[str, Tensor]:
    """Parameters outside the body."""
    return {name: x for name, x in whole.named_parameters() if not name.startswith(f"{body}.")}


def _fill(whole: nn.Module, base: Base, saved: Mapping[str, Tensor], task: str) -> None:
    """Give the head its weights: the adapter's, or else the base's."""
    names = list(dict(whole.named_parameters()))
    weights = {name: saved[name] for name in names if name in saved}
    if lacking := [name for name in names if name not in weights]:
        weights |= read_parameters(base, whole, lacking)
    if lost := [name for name in names if name not in weights]:
        raise NSCError(
            f"adapter {task}: {lost[0]} of its head {type(whole).__name__} is neither in the adapter nor in the base,"
            " so it was trained on weights that are lost; retrain it with that layer in modules_to_save"
        )
    if strange := sorted(set(saved) - set(names)):
        raise NSCError(f"adapter {task} carries {strange[0]}, which is no part of {type(whole).__name__}")
    if broken := [name for name, x in weights.items() if not x.isfinite().all()]:
        raise NSCError(f"adapter {task}: {broken[0]} of its head holds NaN or infinity; retrain it, or fetch it again")
    try:
        whole.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise NSCError(f"adapter {task}: its head does not fit {type(whole).__name__}: {error}") from error


def _require_pooler(base: Base, task: str) -> None:
    """The class reads the body's pooler, which transformers fills at random where a checkpoint lacks it."""
    if not any("pooler" in key for key in stored_tensors(base)):
        raise NSCError(
            f"adapter {task}: its head reads the base's pooler, but base {base.id!r} has no weights for it, so it was"
            " trained on one filled at random that is lost; merge this task by nsc, or name it as unseen"
        )


def _pooling(head: _Head, width: int) -> str:
    """Which states the class pools, "" for no way that is followed.

    It is seen with random weights, since a real head may be all but blind to some states.
    """
    like, seed = next(head.whole.parameters()), torch.Generator().manual_seed(0)
    weights = {name: torch.randn(x.shape, generator=seed).to(x) for name, x in head.named_parameters()}
    states = torch.randn(1, PROBE, width, generator=seed).to(like).requires_grad_()
    logits = functional_call(head, weights, states)
    if logits.ndim == 3:
        return "each"
    mixed = logits @ torch.randn(logits.shape[-1], generator=seed).to(logits)  # a plain sum may cancel
    read = torch.autograd.grad(mixed.sum(), states)[0][0].abs().sum(-1) > 0
    rows = tuple(read.nonzero().flatten().tolist())
    pooling = {(0,): "first", (PROBE - 1,): "last", tuple(range(PROBE)): "mean"}.get(rows, "")
    pooled = {"first": states[:, 0], "last": states[:, -1], "mean": states.mean(1)}.get(pooling)
    atol = 1e-4 * logits.abs().max().item()
    follows = pooled is not None and torch.allclose(
        functional_call(head, weights, pooled), logits, rtol=1e-4, atol=atol
    )
    return pooling if follows else ""
