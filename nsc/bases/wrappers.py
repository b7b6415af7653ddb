"""The classes that transformers builds around a body, such as LlamaForCausalLM around LlamaModel.

An adapter's module names carry the prefix of the class that it was trained on. A prefix that no such class has is that
of somebody's own wrapper: an adapter written with it fits nothing that transformers loads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from nsc.bases.base_model import Base, quiet_loading
from nsc.bases.experts import holder_of
from nsc.bases.structure import linear_shapes


def wrapper_of(base: Base, prefix: str, names: Iterable[str], behind: Iterable[str] = ()) -> nn.Module | None:
    """Build a class of transformers in which layers of the body have a prefix.

    Args:
        base: the base; its weights need not be loaded.
        prefix: what stands before the body's names, with its dot; "" for the body itself.
        names: layers of the body.
        behind: layers of the class itself, such as "lm_head".

    Returns:
        The first such class, without weights, on the meta device; None if there is none.
    """
    wanted = {*behind, *(f"{prefix}{holder_of(name)}" for name in names)}
    return next((model for model in _models(base) if wanted <= dict(model.named_modules()).keys()), None)


def prefixes_of_classes(base: Base) -> dict[str, str]:
    """List the prefixes that layers of a body may have.

    Args:
        base: the base; its weights need not be loaded.

    Returns:
        Prefix, with its dot -> the first class of transformers that has it.
    """
    inside = f".{next(iter(linear_shapes(base.model)), '')}"
    found: dict[str, str] = {}
    for model in _models(base):
        for name, _ in model.named_modules():
            if f".{name}".endswith(inside):
                found.setdefault(name.removesuffix(inside[1:]), type(model).__name__)
    return found


def _models(base: Base) -> Iterator[nn.Module]:
    """Every class in the file of the body's own that takes the base's config or its image tower's, without weights."""
    home = sys.modules[type(getattr(base.model, "stock", base.model)).__module__]
    classes: list[Any] = [c for c in vars(home).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    for config in {type(c): c for c in (base.config, base.body_config)}.values():
        for cls in classes:
            if cls.config_class is type(config) and (model := _built(cls, config)) is not None:
                yield model


def _built(cls: Any, config: Any) -> nn.Module | None:
    try:
        with quiet_loading(), torch.device("meta"):
            return cls(deepcopy(config))
    except Exception:  # a class that needs more than the config raises what it likes; others have the same prefix
        return None
