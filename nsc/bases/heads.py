"""The layer by which a causal base names its next token."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from nsc.bases.base_model import Base
from nsc.bases.llava import takes_images_and_text
from nsc.bases.structure import is_causal
from nsc.bases.weights import read_tensors
from nsc.errors import NSCError


class NoHeadError(NSCError):
    """The base has no layer that names tokens."""


class Head(NamedTuple):
    """A linear layer over the body's last hidden states.

    Attributes:
        weight: (C, d).
        bias: (C,), or None.
    """

    weight: Tensor
    bias: Tensor | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits of hidden states.

        Args:
            states: (n, d).

        Returns:
            (n, C) in the dtype and on the device of ``states``.
        """
        return F.linear(states, self.weight.to(states), None if self.bias is None else self.bias.to(states))


def load_generating_head(base: Base) -> Head:
    """Load the layer by which a causal base names its next token.

    Args:
        base: with weights; where embeddings are tied, the head is the body's token embedding.

    Returns:
        The head.

    Raises:
        NoHeadError: if the base does not generate, or its checkpoint has no such layer.
        NSCError: if it changes its logits afterwards.
    """
    model, config = base.model, base.config
    if not is_causal(model):
        raise NoHeadError(f"base {base.id!r} generates no tokens: its attention is not causal; give positions prompt")
    text, images = getattr(config, "text_config", config), takes_images_and_text(config)
    changed = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(text, n, None)]
    if changed:
        raise NSCError(f"base {base.id!r} changes its logits ({changed[0]}), which nsc does not follow")
    try:
        with torch.device("meta"):
            whole = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config(deepcopy(config))
    except ValueError as error:
        raise NoHeadError(f"base {base.id!r} has no head that generates tokens: {error}") from error
    head = whole.get_output_embeddings()
    body: Any = getattr(model, "text", model)
    tied = head.weight is whole.get_input_embeddings().weight
    if tied and not body.get_input_embeddings().weight.is_meta:
        return Head(body.get_input_embeddings().weight.detach())
    head = whole.get_input_embeddings() if tied else head  # which is offloaded, and read again
    place = next(name for name, module in whole.named_modules() if module is head)
    places = ["lm_head", "language_model.lm_head"] if images else [place]  # LLaVA's, in new and old checkpoints
    stored = read_tensors(base, [f"{place}.{kind}" for place in places for kind in ("weight", "bias")])
    there = next((place for place in places if f"{place}.weight" in stored), None)
    if there is None:
        raise NoHeadError(
            f"base {base.id!r} has no {place} in its checkpoint, so it generates no tokens; give positions prompt"
        )
    return Head(stored[f"{there}.weight"], stored.get(f"{there}.bias"))
