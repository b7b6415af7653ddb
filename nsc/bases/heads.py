"""The layer by which a causal base names its next token."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from nsc.bases.base_model import Base
from nsc.bases.structure import is_causal
from nsc.bases.weights import read_parameters
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
    text = config.get_text_config()
    changed = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(text, n, None)]
    if changed:
        raise NSCError(f"base {base.id!r} changes its logits ({changed[0]}), which nsc does not follow")
    try:
        with torch.device("meta"):
            wrapper = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            whole = (AutoModelForImageTextToText if wrapper else AutoModelForCausalLM).from_config(
                deepcopy(config), trust_remote_code=False
            )
    except ValueError as error:
        raise NoHeadError(f"base {base.id!r} has no head that generates tokens: {error}") from error
    head = whole.get_output_embeddings()
    body: Any = getattr(model, "text", model)
    tied = head.weight is whole.get_input_embeddings().weight
    if tied and not body.get_input_embeddings().weight.is_meta:
        return Head(body.get_input_embeddings().weight.detach())
    head = whole.get_input_embeddings() if tied else head  # which is offloaded, and read again
    place = next(name for name, module in whole.named_modules() if module is head)
    stored = read_parameters(base, whole, [f"{place}.weight", f"{place}.bias"])
    if f"{place}.weight" not in stored:
        raise NoHeadError(
            f"base {base.id!r} has no {place} in its checkpoint, so it generates no tokens; give positions prompt"
        )
    return Head(stored[f"{place}.weight"], stored.get(f"{place}.bias"))
