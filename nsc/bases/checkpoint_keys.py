"""Which parameter of a model each key of a checkpoint is loaded into, as the installed transformers renames it.

transformers renames families' layers, moves wrappers, drops what it ignores, and fuses or splits some weights on
loading. Nothing of that is repeated here: its own rules, of the very class, are asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

try:  # transformers 5
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
except ImportError:
    get_model_conversion_mapping = None

Renamed = Callable[[str], "tuple[str, bool]"]  # a key -> its new name, and whether its values are converted, too


def parameter_names(model: Any, keys: Sequence[str]) -> dict[str, str]:
    """Find the parameter that each key of a checkpoint is loaded into, where its values stay as they are.

    Args:
        model: a model of transformers; the meta device is enough.
        keys: all keys of the checkpoint.

    Returns:
        Key -> name of the parameter. Keys that transformers ignores are left out, and so are those that it fuses,
        splits or converts otherwise.
    """
    own = model.state_dict()
    if get_model_conversion_mapping is None:
        return {key: name for key, name in _renamed_by_4(model, own, keys).items() if name in own}
    rename, plain = _renaming(model, own), _prefixing(model, own)
    found = {}
    for key in keys:
        name, converted = rename(key)
        if name not in own and key in own:  # as transformers, which then only sees to the prefix
            name, converted = plain(key)
        if name in own and not converted:
            found[key] = name
    return found


def respelled(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Rename modules as transformers renames their weights on loading; what comes before the body's own names stays.

    Args:
        model: a model of transformers; the meta device is enough.
        names: names of modules, maybe of an older transformers.

    Returns:
        Name -> name in the installed transformers.
    """
    if get_model_conversion_mapping is None:
        mapping = _mapping_of_4(model)
        pairs = {f"{name}.weight": name for name in names}
        renamed = model._get_key_renaming_mapping(list(pairs), mapping)
        return {name: renamed[key].removesuffix(".weight") for key, name in pairs.items()}
    rename = _renaming(model)
    return {name: rename(f"{name}.weight")[0].removesuffix(".weight") for name in names}


def conversion_rules(model: Any) -> tuple[list[Any], list[Any]]:
    """Return the rules by which transformers loads weights into a class.

    Args:
        model: a model of transformers; the meta device is enough.

    Returns:
        Those that rename, and those that convert values as well; none in transformers 4.
    """
    rules = get_model_conversion_mapping(model) if get_model_conversion_mapping else []
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    return renamings, [rule for rule in rules if isinstance(rule, WeightConverter)]


def _renaming(model: Any, own: dict[str, Any] | None = None) -> Renamed:
    """The rules of the class of ``model``; with its own names, a prefix comes and goes as they need it."""
    renamings, converters = conversion_rules(model)

    def rename(key: str) -> tuple[str, bool]:
        name, source = rename_source_key(key, renamings, converters, own and model.base_model_prefix, own)
        return name, source is not None

    return rename


def _prefixing(model: Any, own: dict[str, Any]) -> Renamed:
    return lambda key: (rename_source_key(key, [], [], model.base_model_prefix, own)[0], False)


def _mapping_of_4(model: Any) -> dict[str, str] | None:
    return getattr(model, "_checkpoint_conversion_mapping", None) or None


def _renamed_by_4(model: Any, own: dict[str, Any], keys: Sequence[str]) -> dict[str, str]:
    """In transformers 4, whose model adds or removes its prefix for a whole checkpoint."""
    prefix = model.base_model_prefix
    there = bool(prefix) and any(key.startswith(prefix) for key in keys)
    expected = bool(prefix) and any(name.startswith(f"{prefix}.") for name in own)
    renamed = model._get_key_renaming_mapping(
        list(keys),
        _mapping_of_4(model),
        loading_base_model_from_task_state_dict=there and not expected,
        loading_task_model_from_base_state_dict=expected and not there,
    )
    return dict(renamed)
