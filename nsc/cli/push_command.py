"""``nsc push``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nsc.cli.terminal import plain_errors


def push(
    out: Annotated[Path, typer.Argument(help="The folder of a merge.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Where it goes on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
) -> None:
    """Upload a merge to the Hub, if it is, file by file, what was proven, and names no place of this machine."""
    with plain_errors():
        from nsc.export.push import push as run

        typer.echo(f"uploaded to {run(out, repository, private=private)}")
