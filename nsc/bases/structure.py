"""The structure of a loaded body: its linear layers, parameters and blocks, and whether it is causal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from nsc.bases.llava import ImageTextBody, without_images


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Return the shapes of all linear layers of a body, in the model's own order.

    Args:
        model: the body; the meta device is enough.

    Returns:
        Name -> (out_features, in_features).
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _in_head(model, name)}
    return {name: (m.out_features, m.in_features) for name, m in found.items()}


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a body under all of their names.

    Args:
        model: the body.

    Returns:
        Name -> parameter; tied parameters appear under each name.
    """
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if not _in_head(model, n)}


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a module or parameter belongs to the LM head that transformers 4 leaves in LLaVA's body."""
    return isinstance(model, ImageTextBody) and name.startswith("language_model.lm_head")


def language_model(model: nn.Module) -> Any:
    """Return what texts go through: LLaVA's language model, any other body itself.

    Args:
        model: the body.

    Returns:
        The module.
    """
    return model.text if isinstance(model, ImageTextBody) else model


def is_causal(model: nn.Module) -> bool:
    """Return whether every attention layer sees only the past, so that right padding reaches no token.

    Args:
        model: the body; of LLaVA, its language model counts.

    Returns:
        Whether it is causal.
    """
    model = language_model(model)
    config: Any = model.config
    if getattr(config, "is_encoder_decoder", False) or without_images(config):  # PaliGemma's prompts see all of theirs
        return False
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def block_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    """Return which block a module lies in: the first numbered child of a ModuleList on its path.

    Args:
        model: the body.
        name: name of the module.

    Returns:
        (index, depth), or None outside of blocks.
    """
    place = _place(model, name)
    return (place[1], len(place[0])) if place else None


def blocks_before(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Return the blocks before the first one that contains any of these modules, in the ModuleList of the last module.

    Args:
        model: the body.
        names: names of modules, in the order in which they run.

    Returns:
        The blocks.
    """
    places = [place for name in names if (place := _place(model, name))]
    blocks = places[-1][0] if places else nn.ModuleList()
    return list(blocks)[: min((index for home, index in places if home is blocks), default=0)]


def _place(model: nn.Module, name: str) -> tuple[nn.ModuleList, int] | None:
    parent, parts = model, name.split(".")
    for part in parts:
        if isinstance(parent, nn.ModuleList):
            return parent, int(part)
        parent = getattr(parent, part)
    return None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace a submodule.

    Args:
        model: changed in place.
        name: name of the submodule.
        module: what takes its place.
    """
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
