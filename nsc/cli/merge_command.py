"""``nsc merge`` and ``nsc apply``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from nsc.cli.options import (
    BASE_ID,
    FOR,
    FULL,
    RAGGED,
    RANK,
    InputFlags,
    LearningFlags,
    MethodFlags,
    OutputFlags,
    RunningFlags,
    grouped,
)
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
        from nsc.export.served import read_programs, refuse_early
        from nsc.export.sharing import require_hub_id
        from nsc.merging.api import merge as run
        from nsc.paths import CHECKPOINT, held, partial_folder
        from nsc.runtime.distributed import join

        team = join(settings.device)
        team.from_first(lambda: stack.enter_context(held(out)))
        base = Base(job.base)
        refuse_output(out, base, job.rank, job.full, job.recipe)
        if job.full:
            refuse_codes(base, layers_on_codes(base, job.adapters))
        require_hub_id(job.base_id)
        programs = read_programs(job.programs)
        refuse_early(programs, base, job.rank, job.full, job.ragged)
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
            form = {"rank": job.rank, "full": job.full, "ragged": job.ragged, "base_id": job.base_id}
            _save(result, out, programs, **form)


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
    ragged: Annotated[bool | None, RAGGED] = None,
    base_id: Annotated[str | None, BASE_ID] = None,
    programs: Annotated[list[str] | None, FOR] = None,
) -> None:
    """Repeat a recorded merge without learning; the base model is only needed for --full."""
    with plain_errors():
        from nsc.errors import NSCError
        from nsc.export.served import read_programs
        from nsc.merging.from_record import apply as run

        if (rank is not None) + exact + full > 1:
            raise NSCError("--rank, --exact and --full exclude one another; give only one of them")
        result = run(record, adapters=pairs(adapter or [], "--adapter"), base=base)
        for warning in result.report.warnings:
            typer.echo(f"warning: {warning}", err=True)
        kept = result.record.rank if rank is None and not (exact or full) else rank
        ragged = result.record.ragged if ragged is None else ragged
        names = read_programs(programs or result.record.programs)
        _save(result, out, names, rank=kept, full=full, ragged=ragged, base_id=base_id)


def _save(result: Any, out: Path, programs: Sequence[str], **form: Any) -> None:
    """Write, prove, and say where it lies and what serves it."""
    from nsc.export.programs import Place, commands
    from nsc.export.served import Contents

    proof = result.save(out, programs=programs, **form)
    written = json.loads((out / "report.json").read_text(encoding="utf-8"))["warnings"]
    for warning in (text for text in written if text not in result.report.warnings):
        typer.echo(f"warning: {warning}", err=True)  # seen only when it was written
    typer.echo(f"proof: {proof}\nwritten to {out}")
    if programs:
        adapter = {} if form["full"] else {"base": result.record.base, "rank": Contents.of(out).rank}
        typer.echo(commands(programs, Place(out, **adapter)))
