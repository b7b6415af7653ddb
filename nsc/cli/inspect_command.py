"""``nsc inspect`` and ``nsc methods``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nsc.cli.options import FOR, JSON
from nsc.cli.terminal import plain_errors


def methods(as_json: Annotated[bool, JSON] = False) -> None:
    """List every merging method: its name, the spaces it runs in, what it does, and its source."""
    with plain_errors():
        from nsc.recipes.catalogue import format_methods, list_methods

        typer.echo(json.dumps(list_methods(), indent=1) if as_json else format_methods(list_methods()))


def inspect(
    adapter: Annotated[list[str], typer.Argument(help="PEFT folders or Hub ids.")],
    as_json: Annotated[bool, JSON] = False,
    programs: Annotated[list[str] | None, FOR] = None,
) -> None:
    """Show ranks, scales, targets, condition numbers, overlaps and unsupported features of adapters."""
    with plain_errors():
        from dataclasses import asdict

        from nsc.adapters.inspection import format_inspection
        from nsc.adapters.inspection import inspect as run
        from nsc.errors import NSCError
        from nsc.export.served import read_programs, serving

        names = read_programs(programs or ())
        reports = run(adapter)
        served = [{name: serving(name, report.path) for name in names} for report in reports]
        if as_json:
            rows = [asdict(r) | ({"for": told} if names else {}) for r, told in zip(reports, served, strict=True)]
            typer.echo(json.dumps(rows, default=str, indent=1))
        else:
            commands = [told["command"] for by_name in served for told in by_name.values() if told["command"]]
            typer.echo("\n\n".join([format_inspection(reports), *commands]))
        if refused := [
            f"{r.name}: {p}" for r, s in zip(reports, served, strict=True) for t in s.values() for p in t["problems"]
        ]:
            raise NSCError("; ".join(refused))
