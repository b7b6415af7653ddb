"""``nsc compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from nsc.cli.terminal import pairs, plain_errors

TASK_FILE = "TASK=FILE"


def compare(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    adapter: Annotated[list[str], typer.Option(metavar="TASK=PATH", help="PEFT folder or Hub id; repeat per task.")],
    test: Annotated[list[str], typer.Option(metavar=TASK_FILE, help="Labelled rows to score; repeat per task.")],
    methods: Annotated[str, typer.Option(help="Names with commas between: nsc,ties,core-tsv,nsc+ties...")],
    out: Annotated[Path, typer.Option(help="New folder for table, picture, JSON and record.")],
    data: Annotated[
        list[str] | None, typer.Option(metavar=TASK_FILE, help="Unlabeled rows, for what needs them; repeat per task.")
    ] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar=TASK_FILE, help="Labelled rows for the search; repeat per task.")
    ] = None,
    search: Annotated[str, typer.Option(help="Of scales that are not set: none, labels or null-space.")] = "none",
    scales: Annotated[
        tuple[float, float] | None, typer.Option(help="The range of the search.  [default: 0.1 1.5, by labels to 5]")
    ] = None,
    scale_step: Annotated[
        list[float] | None, typer.Option(help="Coarse, then finer around the best; repeat.  [default: 0.1, 0.01]")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="TASK=NAME", help="Instead of accuracy, pearson or loss; repeat.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="[METHOD.]KEY=VALUE", help="As ties.scale=0.4, or steps=100.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an interrupted comparison.")] = False,
) -> None:
    """Score merging methods on labelled rows, as shares of fine-tuned, with their seconds and memory."""
    with plain_errors():
        from nsc.evaluation.compare import compare as run
        from nsc.evaluation.scale_search import Grid, grid_of

        config, settings = read_settings(setting or ())
        found = run(
            base,
            pairs(adapter, "--adapter"),
            pairs(data or [], "--data"),
            pairs(test, "--test"),
            [name.strip() for name in methods.split(",") if name.strip()],
            out,
            validation=pairs(validation or [], "--validation"),
            search=search,
            grid=grid_of(search, scales, tuple(scale_step or Grid.steps)),
            metrics=pairs(metric or [], "--metric"),
            config=config,
            settings=settings,
            resume=resume,
        )
        typer.echo(f"{found.to_markdown()}\nwritten to {out}")


def read_settings(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Settings of all that learn, and method -> its own, from "KEY=VALUE" and "METHOD.KEY=VALUE" with values in YAML.

    Raises NSCError for one that does not read so.
    """
    import yaml

    from nsc.cli.job import read_assignment
    from nsc.errors import NSCError

    common: dict[str, Any] = {}
    of_methods: dict[str, dict[str, Any]] = {}
    for text in assignments:
        method, dot, key = text.partition("=")[0].rpartition(".")
        if not dot:
            common.update([read_assignment(text)])
            continue
        try:
            of_methods.setdefault(method, {})[key] = yaml.safe_load(text.partition("=")[2])
        except yaml.YAMLError as error:
            raise NSCError(f"--set {method}.{key}: {text.partition('=')[2]!r} is no YAML: {error}") from error
    return common, of_methods
