"""``nsc inspect`` and ``nsc methods``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nsc.cli.options import JSON
from nsc.cli.terminal import plain_errors


def methods(as_json: Annotated[bool, JSON] = False) -> None:
    """List every merging method: its name, the spaces it runs in, what it does, and its source."""
    with plain_errors():
        from nsc.recipes.catalogue import format_methods, list_methods

        typer.echo(json.dumps(list_methods(), indent=1) if as_json else format_methods(list_methods()))


def inspect(
    adapter: Annotated[list[str], typer.Argument(help="PEFT folders or Hub ids.")],
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Show ranks, scales, targets, condition numbers, overlaps and unsupported features of adapters."""
    with plain_errors():
        from dataclasses import asdict

        from nsc.adapters.inspection import format_inspection
        from nsc.adapters.inspection import inspect as run

        reports = run(adapter)
        text = (
            json.dumps([asdict(r) for r in reports], default=str, indent=1) if as_json else format_inspection(reports)
        )
        typer.echo(text)
