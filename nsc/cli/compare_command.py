"""``nsc compare``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from nsc.cli.options import ADAPTER, BASE, DATA, VALIDATION, grouped
from nsc.cli.terminal import pairs, plain_errors

TASK_FILE = "TASK=FILE"


@dataclass
class ComparisonFlags:
    """Which methods are compared, and on which rows."""

    panel: ClassVar[str] = "Inputs"

    base: Annotated[str, BASE]
    adapter: Annotated[list[str], ADAPTER]
    test: Annotated[list[str], typer.Option(metavar=TASK_FILE, help="Labelled rows to score; repeat for each task.")]
    methods: Annotated[str, typer.Option(help="Methods, separated by commas: nsc,ties,core-tsv,nsc+ties...")]
    out: Annotated[Path, typer.Option(help="New folder for table, figure, JSON and record.")]
    data: Annotated[list[str] | None, DATA] = None
    metric: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=NAME", help="Replaces accuracy, pearson or loss; repeat for more tasks."),
    ] = None
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="[METHOD.]KEY=VALUE", help="Such as ties.scale=0.4 or steps=100; repeat for more."
        ),
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Keep the rows of an interrupted comparison.")] = False


@dataclass
class ScaleFlags:
    """How the scales of the methods are found."""

    panel: ClassVar[str] = "Scales of the methods"

    search: Annotated[
        str | None,
        typer.Option(
            help="How to find every scale that no setting gives: none (the default), match (that of regressions),"
            " labels or null-space."
        ),
    ] = None
    validation: Annotated[list[str] | None, VALIDATION] = None
    scales: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Lowest and highest scale of the search.  [default: 0.1 1.5, by labels or match up to 5]"),
    ] = None
    scale_step: Annotated[
        list[float] | None,
        typer.Option(
            help="Step of the search, coarse first, then finer around the best; repeat.  [default: 0.1, 0.01]"
        ),
    ] = None


@grouped
def compare(compared: ComparisonFlags, scales: ScaleFlags) -> None:
    """Score merging methods on labelled rows, as shares of fine-tuned, with their time and memory."""
    with plain_errors():
        from nsc.evaluation.compare import compare as run
        from nsc.evaluation.scale_search import Grid, grid_of

        config, settings = read_assignments(compared.setting or ())
        comparison = run(
            compared.base,
            pairs(compared.adapter, "--adapter"),
            pairs(compared.data or [], "--data"),
            pairs(compared.test, "--test"),
            [name.strip() for name in compared.methods.split(",") if name.strip()],
            compared.out,
            validation=pairs(scales.validation or [], "--validation"),
            search=scales.search,
            grid=grid_of(scales.search or "match", scales.scales, tuple(scales.scale_step or Grid.steps)),
            metrics=pairs(compared.metric or [], "--metric"),
            config=config,
            settings=settings,
            resume=compared.resume,
        )
        typer.echo(f"{comparison.to_markdown()}\nwritten to {compared.out}")


def read_assignments(assignments: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read the ``--set`` options of a comparison.

    Args:
        assignments: "KEY=VALUE" for all methods that learn, or "METHOD.KEY=VALUE"; values in YAML.

    Returns:
        The settings of all methods that learn, and method -> its own settings.

    Raises:
        NSCError: for an assignment of another form, or a value that is not YAML.
    """
    from nsc.cli.job import assigned, read_assignment

    common: dict[str, Any] = {}
    of_methods: dict[str, dict[str, Any]] = {}
    for text in assignments:
        method, dot, key = text.partition("=")[0].rpartition(".")
        if not dot:
            common.update([read_assignment(text)])
            continue
        of_methods.setdefault(method, {})[key] = assigned(f"{method}.{key}", text.partition("=")[2])
    return common, of_methods
