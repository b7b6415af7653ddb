"""Which modules a config names: PEFT's own rules for its targets, and for the patterns of ranks and alphas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nsc.adapters.patterns import pattern_matches

_PLAIN = re.compile(r"[\w.-]+")  # a pattern in which only dots are special, each for any one character


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Return whether PEFT puts factors on a module, by the rule of its ``check_target_module_exists``.

    Args:
        config: adapter_config.json.
        module: name of a linear layer in the class that the adapter was trained on.

    Returns:
        Whether ``target_modules`` names it, and neither ``exclude_modules``, ``modules_to_save`` nor
        ``layers_to_transform`` leaves it out.

    Raises:
        ValueError: if a pattern is none, or takes too long.
    """
    if _named(config.get("exclude_modules"), module):
        return False
    if any(pattern_matches(rf"(^|.*\.){saved}($|\..*)", module) for saved in config.get("modules_to_save") or ()):
        return False
    targets = config.get("target_modules")
    if targets == "all-linear":
        return True
    found = _named(targets, module)
    return found if isinstance(targets, str) or module in (targets or ()) else found and _in_layers(config, module)


def narrowed(config: Mapping[str, Any]) -> bool:
    """Return whether a config leaves out some of the modules that its targets name.

    Args:
        config: adapter_config.json.

    Returns:
        Whether ``exclude_modules`` or ``layers_to_transform`` is set.
    """
    return bool(config.get("exclude_modules")) or config.get("layers_to_transform") not in (None, [])


def _named(names: Any, module: str) -> bool:
    """Whether a pattern fits a module's whole name, or one of a list is its end."""
    if isinstance(names, str):
        return pattern_matches(rf"(?:{names})\Z", module)
    return any(f".{module}".endswith(f".{name}") for name in names or ())


def _in_layers(config: Mapping[str, Any], module: str) -> bool:
    """Whether the first numbered layer on the way to a module is one of ``layers_to_transform``."""
    chosen, patterns = config.get("layers_to_transform"), config.get("layers_pattern") or ()
    if chosen in (None, []):
        return True
    patterns = [patterns] if isinstance(patterns, str) else patterns
    found = [re.match(rf"(?:^|.*?\.){pattern}\.(\d+)\.", module) for pattern in patterns]
    number = next(filter(None, found if patterns else [re.match(r".*?\.[^.]*\.(\d+)\.", module)]), None)
    return number is not None and int(number[1]) in ([chosen] if isinstance(chosen, int) else chosen)


class Patterns:
    """The entries of ``rank_pattern`` or ``alpha_pattern``, looked up by the rule of PEFT's ``get_pattern_key``.

    A pattern fits the end of a name, from a dot on. Those in which only dots are special fit an end of their length,
    which is looked up with the dots masked: the time grows with entries plus modules, not with their product.

    Args:
        entries: pattern -> value; None for no entry.
    """

    def __init__(self, entries: Mapping[str, float] | None) -> None:
        self._values = list((entries or {}).values())
        self._places = {pattern: place for place, pattern in enumerate(entries or {})}
        self._regexes: list[tuple[int, str]] = []
        self._plain: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}  # length, dots, masked -> places
        for pattern, place in self._places.items():
            if _PLAIN.fullmatch(pattern):
                dots = tuple(i for i, character in enumerate(pattern) if character == ".")
                masks = self._plain.setdefault(len(pattern), {}).setdefault(dots, {})
                masks.setdefault(_masked(pattern, dots), []).append(place)
            else:
                self._regexes.append((place, rf"(.*\.)?({pattern})$"))

    def matching(self, module: str) -> list[float]:
        """Return the values of all patterns that fit a module.

        Args:
            module: its name.

        Returns:
            The values in the order of the entries; that of the name itself where no pattern fits.

        Raises:
            ValueError: if a pattern is none, or takes too long.
        """
        places = [place for place, regex in self._regexes if pattern_matches(regex, module)]
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
        for end in (module[start:] for start in starts):
            for dots, masks in self._plain.get(len(end), {}).items():
                places += masks.get(_masked(end, dots), [])
        if not places and module in self._places:
            places = [self._places[module]]
        return [self._values[place] for place in sorted(set(places))]


def _masked(text: str, dots: tuple[int, ...]) -> str:
    parts = [text[start:stop] for start, stop in zip((0, *(i + 1 for i in dots)), (*dots, len(text)), strict=True)]
    return ".".join(parts)
