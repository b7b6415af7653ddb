"""Paths that mean the same from every folder, and the folder in which a result is put together."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT, STAGING = "checkpoint.pt", "unproven"


def absolute(place: str | Path) -> str:
    """Return a path that means the same from every folder.

    Args:
        place: a path, or a name that is no path, such as one of the Hub.

    Returns:
        The absolute path of what exists, anything else unchanged.
    """
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


def partial_folder(out: Path) -> Path:
    """Return the folder in which a result is put together before it is moved into place.

    Args:
        out: the folder that the result will have.

    Returns:
        The folder beside it, with ``.partial`` after its name.
    """
    return out.with_name(out.name + ".partial")
