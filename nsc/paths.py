"""Where things lie: absolute places, and the folder in which a result is put together."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT, STAGING = "checkpoint.pt", "unproven"


def absolute(place: str | Path) -> str:
    """A path that means the same from every folder; Hub names and the like as they are."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


def partial_folder(out: Path) -> Path:
    """Where ``out`` is put together before it is moved into place."""
    return out.with_name(out.name + ".partial")
