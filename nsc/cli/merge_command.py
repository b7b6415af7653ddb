"""``nsc merge`` and ``nsc apply``."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from nsc.cli.options import FULL, RANK, InputFlags, LearningFlags, MethodFlags, OutputFlags, RunningFlags, grouped
from nsc.cli.terminal import given, pairs, plain_errors


@grouped
def merge(
    context: typer.Context,
    inputs: InputFlags,
    learning: LearningFlags,
    running: RunningFlags,
    method: MethodFlags,
    output: OutputFlags,
) -> None:
    """Merge adapters by coefficients learned from unlabeled data, or by another method; prove what was written."""
    with plain_errors():
        from nsc.cli.job import gather

        job, settings = gather(given(context), inputs.setting or (), inputs.config)
        out = Path(job.out)
    with plain_errors(out), ExitStack() as stack:
        from nsc.adapters.matching import layers_on_codes
        from nsc.bases.base_model import Base
        from nsc.bases.weights import refuse_codes
        from nsc.errors import NSCError
        from nsc.export.output import refuse_output
        from nsc.merging.api import merge as run
        from nsc.paths import CHECKPOINT, held, partial_folder
        from nsc.runtime.distributed import join

        team = join(settings.device)
        team.from_first(lambda: stack.enter_context(held(out)))
        base = Base(job.base)
        refuse_output(out, base, job.rank, job.full, job.recipe)
        if job.full:
            refuse_codes(base, layers_on_codes(base, job.adapters))
        checkpoint = partial_folder(out) / CHECKPOINT
        if checkpoint.exists() and not output.resume:
            raise NSCError(f"there is an interrupted merge in {checkpoint.parent}: add --resume, or remove that folder")
        result = run(
            job.base,
            job.adapters,
            job.data,
            settings,
            method=job.recipe or job.method,
            search=job.search,
            validation=job.validation,
            scales=job.scales,
            over=job.values,
            coefficients=job.coefficients,
            checkpoint=checkpoint,
            resume=output.resume,
        )
        if team.first:
            _finish(result.save(out, rank=job.rank, full=job.full), out)


def apply(
    record: Annotated[Path, typer.Argument(help="The folder of an earlier merge.")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="TASK=PATH", help="Where the adapter of a task lies now, if it moved.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Where the base model lies now, if it moved.")] = None,
    rank: Annotated[int | None, RANK] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Write the exact factors, even if the merge was truncated.")
    ] = False,
    full: Annotated[bool, FULL] = False,
) -> None:
    """Repeat a recorded merge without learning; the base model is only needed for --full."""
    with plain_errors():
        from nsc.errors import NSCError
        from nsc.merging.from_record import apply as run

        if (rank is not None) + exact + full > 1:
            raise NSCError("--rank, --exact and --full exclude one another; give only one of them")
        result = run(record, adapters=pairs(adapter or [], "--adapter"), base=base)
        for warning in result.report.warnings:
            typer.echo(f"warning: {warning}", err=True)
        kept = result.record.rank if rank is None and not (exact or full) else rank
        _finish(result.save(out, rank=kept, full=full), out)


def _finish(proof: Any, out: Path) -> None:
    typer.echo(f"proof: {proof}\nwritten to {out}")
