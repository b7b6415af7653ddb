"""What every command does with its words: pairs read, errors said plainly."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import typer


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """TASK -> PLACE of the values of an option. Raises NSCError for one that does not read so, or a task twice."""
    from nsc.errors import NSCError

    found: dict[str, str] = {}
    for value in values:
        task, equals, place = value.partition("=")
        if not (task and equals and place):
            raise NSCError(f"{option} {value!r} must read TASK=PLACE")
        if task in found:
            raise NSCError(f"{option} names task {task} twice")
        found[task] = place
    return found


@contextmanager
def plain_errors(out: Path | None = None) -> Iterator[None]:
    """User errors in words and exit code 1; an interrupt says how to go on with ``out``, with exit code 130."""
    from nsc.errors import NSCError

    try:
        yield
    except NSCError as error:
        typer.echo(f"nsc{_rank()}: {error}", err=True)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        from nsc.result import CHECKPOINT, partial_folder

        saved = out is not None and (partial_folder(out) / CHECKPOINT).exists()
        remedy = "the coefficients so far are saved, go on with --resume" if saved else "nothing was saved"
        typer.echo(f"nsc{_rank()}: interrupted; {remedy}", err=True)
        sys.exit(130)


def _rank() -> str:
    """Which process speaks, where torchrun or accelerate started several."""
    return f" (rank {os.environ['RANK']})" if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
