"""The structure of a loaded body: its linear layers, parameters and blocks, and whether it is causal."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nsc.bases.llava import ImageTextBody


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer of a body by name, in the model's own order -> (out_features, in_features)."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _in_head(model, name)}
    return {name: (m.out_features, m.in_features) for name, m in found.items()}


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a body by name, by each of its names where it has several."""
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if not _in_head(model, n)}


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a module or parameter belongs to the LM head that transformers 4 leaves in LLaVA's body."""
    return isinstance(model, ImageTextBody) and name.startswith("language_model.lm_head")


def is_causal(model: nn.Module) -> bool:
    """Whether every attention layer, of LLaVA's language model, sees only the past: right padding reaches no token."""
    model = model.text if isinstance(model, ImageTextBody) else model
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def block_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    """(index, depth) of the block that a module lies in: the first numbered child of a ModuleList on its path."""
    place = _place(model, name)
    return (place[1], len(place[0])) if place else None


def blocks_before(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks ahead of all that these modules lie in, in the ModuleList of the last one."""
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
    """Put ``module`` where ``name`` points."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
