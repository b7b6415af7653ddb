"""What the commands share: options read as settings, TASK=PLACE pairs, errors as one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

LONGEST = 4000  # characters of a message
OF_COMMAND = ("config", "setting", "resume")  # what says no setting by itself


def given(context: typer.Context) -> dict[str, Any]:
    """Return the options that are on the command line, as settings.

    Args:
        context: the command's context.

    Returns:
        Name of the setting -> value; TASK=PLACE options as mappings, ``auto`` and negative bounds as None.

    Raises:
        NSCError: naming the option that cannot be read.
    """
    read: dict[str, tuple[str, Callable[[Any], Any]]] = {
        "adapter": ("adapters", lambda values: pairs(values, "--adapter")),
        "data": ("data", lambda values: pairs(values, "--data")),
        "validation": ("validation", lambda values: pairs(values, "--validation")),
        "out": ("out", str),
        "coefficients": ("coefficients", str),
        "programs": ("programs", tuple),
        "target_module": ("target_modules", tuple),
        "target_block": ("target_blocks", tuple),
        "max_drift": ("max_drift", lambda drift: None if drift < 0 else drift),
        "tokens_per_pass": (
            "tokens_per_pass",
            lambda text: None if text == "auto" else _whole(text, "--tokens-per-pass"),
        ),
    }
    settings = {}
    for option, value in context.params.items():
        source = context.get_parameter_source(option)
        if source is not None and source.name == "COMMANDLINE" and option not in OF_COMMAND:
            name, convert = read.get(option, (option, lambda value: value))
            settings[name] = convert(value)
    return settings


def _whole(text: str, option: str) -> int:
    from nsc.errors import NSCError

    if not (text.isdecimal() and len(text) < 19):
        raise NSCError(f"{option} must be a whole number or auto, not {text!r}")
    return int(text)


def pairs(values: Sequence[str], option: str) -> dict[str, str]:
    """Read a repeated TASK=PLACE option.

    Args:
        values: what the command line gave.
        option: its name, for errors.

    Returns:
        Task -> place.

    Raises:
        NSCError: naming the option, for a value of another form, or a task that is named twice.
    """
    from nsc.errors import NSCError

    places: dict[str, str] = {}
    for value in values:
        task, equals, place = value.partition("=")
        if not (task and equals and place):
            raise NSCError(f"{option} {value!r} must read TASK=PLACE")
        if task in places:
            raise NSCError(f"{option} names task {task} twice")
        places[task] = place
    return places


@contextmanager
def plain_errors(out: Path | None = None) -> Iterator[None]:
    """Turn every error into one line and exit code 1, and an interrupt into how to continue and exit code 130.

    Python's development mode (``python -X dev -m nsc``) shows the traceback of an error that is no NSCError.

    Args:
        out: the folder that a merge is written to, whose checkpoint may allow it to be resumed.

    Yields:
        Nothing.

    Raises:
        SystemExit: with the exit code, for an error or an interrupt.
    """
    from nsc.errors import NSCError, clipped, one_line

    try:
        yield
    except NSCError as error:
        _say(clipped(str(error), LONGEST))
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        from nsc.paths import CHECKPOINT, partial_folder

        saved = out is not None and (partial_folder(out) / CHECKPOINT).exists()
        _say(
            f"interrupted; {'the coefficients so far are saved, go on with --resume' if saved else 'nothing was saved'}"
        )
        sys.exit(130)
    except Exception as error:
        if sys.flags.dev_mode:
            raise
        _say(
            f"{type(error).__name__}: {one_line(error)}; nsc did not foresee this: mend what it names, or report it"
            " with what python -X dev -m nsc prints"
        )
        raise SystemExit(1) from None


def _say(text: str) -> None:
    """Print a message to stderr, whatever characters are in it."""
    shown = "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)
    typer.echo(f"nsc{_rank()}: {shown}", err=True)


def _rank() -> str:
    """Which process speaks, where torchrun or accelerate started several."""
    return f" (rank {os.environ['RANK']})" if "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1" else ""
