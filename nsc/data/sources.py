"""What a merge is given: adapters and unlabeled data, by task, and the base that they were trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nsc.adapters.lora import Adapter, read_adapter
from nsc.errors import DataError, NSCError

Source = str | Path | Sequence[Any]


def read_adapters(adapters: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Every adapter by task. Raises NSCError if there is none, or for a task that cannot name a file."""
    if not adapters:
        raise NSCError("no adapter given; a merge needs at least one")
    for task in adapters:
        if not task or "/" in task or "\\" in task:
            raise NSCError(f"task name {task!r} must do as a file name: not empty, without / and \\")
    return {task: read_adapter(path, task) for task, path in adapters.items()}


def fingerprint(adapter: Adapter) -> str:
    """Of weights and scales together: either changes the merge."""
    scales = {name: factors.scale for name, factors in sorted(adapter.factors.items())}
    return hashlib.sha256((adapter.sha256 + json.dumps(scales)).encode()).hexdigest()


def read_data(
    data: Mapping[str, Source], adapters: Mapping[str, Adapter], read: Callable[[Source], list[Any]],
    unseen: Collection[str] = (),
) -> dict[str, list[Any]]:  # fmt: skip
    """Task -> samples, by ``read``; none for an unseen one.

    Raises DataError where the tasks of both do not agree, or an unseen one is no adapter's or has data.
    """
    missing, extra = sorted(set(adapters) - set(data) - set(unseen)), sorted(set(data) - set(adapters))
    if missing or extra:
        raise DataError(
            f"data and adapters must name the same tasks: no data for {', '.join(missing) or 'none'},"
            f" no adapter for {', '.join(extra) or 'none'}; an adapter without data must be named as unseen"
        )
    if strange := sorted(set(unseen) & set(data) | set(unseen) - set(adapters)):
        raise DataError(f"unseen names {', '.join(strange)}, which must be adapters, and without data")
    if not set(adapters) - set(unseen):
        raise DataError("every task is unseen, so there is nothing to learn from; give data for one at least")
    return {task: [] if task in unseen else read(data[task]) for task in adapters}


def place_of(source: Source) -> str:
    """Where rows came from, for a record."""
    return absolute(source) if isinstance(source, (str, Path)) else f"{len(source)} samples given in Python"


def base_warnings(base: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """Bases of one shape cannot be told apart by it, so say when the names disagree."""
    named = {task: Path(adapter.base).name for task, adapter in adapters.items() if adapter.base}
    strange = [f"{task} on {name}" for task, name in named.items() if name != Path(base).name]
    return [f"not trained on {Path(base).name} by their own configs: {', '.join(strange)}"] if strange else []


def absolute(place: str | Path) -> str:
    """A path that means the same from every folder; Hub names and the like as they are."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)
