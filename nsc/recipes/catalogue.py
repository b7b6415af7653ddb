"""The list of all merging methods, for people and for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from nsc.config import LEARNED
from nsc.methods import METHODS
from nsc.recipes.spec import COMMON, OF_SPACE


def list_methods() -> list[dict[str, Any]]:
    """List all merging methods.

    Returns:
        For each method its "name", "line" (what it does), "source" (URL), "spaces", "learns" (whether it learns
        coefficients from data), "needs_rows" (whether it is made from unlabeled rows) and "settings" (its own, with
        their defaults), as plain values.
    """
    learned = [
        {
            "name": name,
            "line": m.line,
            "source": m.source,
            "spaces": [],
            "learns": True,
            "needs_rows": True,
            "settings": dict(m.settings),
        }
        for name, m in LEARNED.items()
    ]
    others = [
        {
            "name": name,
            "line": m.line,
            "source": m.source,
            "spaces": list(m.spaces),
            "learns": False,
            "needs_rows": m.inputs is not None,
            "settings": {f.name: None if f.default is MISSING else f.default for f in fields(m.settings)},
        }
        for name, m in METHODS.items()
    ]
    return learned + others


def format_methods(methods: Sequence[dict[str, Any]]) -> str:
    """Format the list of methods for a terminal.

    Args:
        methods: as ``list_methods`` returns them.

    Returns:
        A line for each method, with its source and settings below.
    """
    width = max(len(method["name"]) for method in methods)
    lines = []
    for method in methods:
        lines.append(f"{method['name']:{width}}  {method['line']}")
        more = [method["source"]]
        if spaces := [space for space in method["spaces"] if space != "full"]:
            more.append("also " + ", ".join(f"{space}-{method['name']}" for space in spaces))
        if method["needs_rows"] and not method["learns"]:
            more.append("made from unlabeled rows")
        if method["settings"]:
            more.append("settings " + ", ".join(f"{key} {value}" for key, value in method["settings"].items()))
        lines.append(f"{'':{width}}  {'; '.join(more)}")
    return "\n".join(
        [
            *lines,
            "",
            f"{', '.join(LEARNED)} learn coefficients from unlabeled data; nsc+NAME takes them as weights of a method.",
            f"Every method that learns nothing also has {', '.join(COMMON)}.",
            *(f"Every {space}-NAME also has {', '.join(more)}." for space, more in OF_SPACE.items()),
        ]
    )
