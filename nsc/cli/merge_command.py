"""``nsc merge`` and ``nsc apply``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from nsc.cli.terminal import given, pairs, plain_errors

Rank = Annotated[int | None, typer.Option(help="Truncate the merged adapter to this rank.")]
Full = Annotated[bool, typer.Option("--full", help="Write the whole merged model instead of an adapter.")]


def merge(
    context: typer.Context,
    base: Annotated[str | None, typer.Option(help="Base model: folder or Hub id.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(metavar="TASK=PATH", help="PEFT folder or Hub id; repeat per task.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(metavar="TASK=FILE", help="Rows or images of a task; repeat per task.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="New folder for the result.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of what is said here; flags go before it.")] = None,
    preset: Annotated[str, typer.Option(help="The paper's settings: vit, llama, llava or paper; or fast.")] = "paper",
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the method; repeat.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Of the optimiser, instead of the preset's.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate, instead of the preset's.")] = None,
    start: Annotated[float | None, typer.Option(help="Every coefficient at step 0, instead of the preset's.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples a task and step, instead of the preset's.")] = None,
    max_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
    layers: Annotated[str, typer.Option(help="How they carry adapters: auto, factors or weights.")] = "auto",
    tokens_per_pass: Annotated[
        str, typer.Option(help="Cut a step of more tokens into passes; auto: by what memory is free.")
    ] = "auto",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, for one more forward a step.")
    ] = False,
    graphs: Annotated[bool, typer.Option("--graphs/--no-graphs", help="Replay recorded steps, on CUDA.")] = True,
    max_drift: Annotated[float, typer.Option(help="How far a coefficient may move; below 0: no bound.")] = 0.15,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the order of samples.")] = 0,
    target_module: Annotated[list[str] | None, typer.Option(help="Measure these modules; repeat.")] = None,
    target_block: Annotated[list[int] | None, typer.Option(help="Measure in these blocks; repeat.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float32...")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    weights: Annotated[str, typer.Option(help="Of the base while learning: full, int8, fp8, nf4.")] = "full",
    device_map: Annotated[
        str | None, typer.Option(help="auto, balanced...: all GPUs, CPU and disk, by accelerate; instead of device.")
    ] = None,
    shard: Annotated[bool, typer.Option("--shard", help="Split the base over the processes of torchrun.")] = False,
    method: Annotated[str, typer.Option(help="Instead of nsc: one that `nsc methods` lists, or nsc+ONE.")] = "nsc",
    scale: Annotated[float | None, typer.Option(help="Of all that another method merges, once.")] = None,
    search: Annotated[str, typer.Option(help="Find that scale: by labels or null-space.")] = "none",
    scales: Annotated[tuple[float, float] | None, typer.Option(help="The range of the search.  [0.1 1.5]")] = None,
    validation: Annotated[
        list[str] | None, typer.Option(metavar="TASK=FILE", help="Labelled rows to search by; repeat per task.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Of TIES: the fraction of entries kept.")] = None,
    drop: Annotated[float | None, typer.Option(help="Of DARE: the fraction of entries dropped.")] = None,
    coefficients: Annotated[
        Path | None, typer.Option(help="Folder of an earlier merge: its coefficients as weights of another method.")
    ] = None,
    rank: Rank = None,
    full: Full = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the interrupted merge of OUT.")] = False,
) -> None:
    """Learn coefficients from unlabeled data, or take another method; write the merge to OUT, prove it by reloading."""
    with plain_errors():
        from nsc.cli.job import gather

        job, settings = gather(given(context), setting or (), config)
        out = Path(job.out)
    with plain_errors(out):
        from nsc.bases.base_model import Base
        from nsc.errors import NSCError
        from nsc.export.output import refuse_output
        from nsc.merging.api import merge as run
        from nsc.paths import CHECKPOINT, partial_folder
        from nsc.runtime.distributed import join

        refuse_output(out, Base(job.base), job.rank, job.full, job.recipe)
        checkpoint = partial_folder(out) / CHECKPOINT
        if checkpoint.exists() and not resume:
            raise NSCError(f"an interrupted merge lies in {checkpoint.parent}: add --resume, or remove that folder")
        result = run(
            job.base, job.adapters, job.data, settings, method=job.recipe or job.method, search=job.search,
            validation=job.validation, scales=job.scales, coefficients=job.coefficients, checkpoint=checkpoint,
            resume=resume,
        )  # fmt: skip
        if join(settings.device).first:
            _finish(result.save(out, rank=job.rank, full=job.full), out)


def apply(
    record: Annotated[Path, typer.Argument(help="The folder of an earlier merge.")],
    out: Annotated[Path, typer.Option(help="New folder for the result.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="TASK=PATH", help="Where it lies now, if moved.")] = None,
    base: Annotated[str | None, typer.Option(help="Where the base lies now, if moved.")] = None,
    rank: Rank = None,
    exact: Annotated[bool, typer.Option("--exact", help="Do not truncate, even if the recorded merge was.")] = False,
    full: Full = False,
) -> None:
    """Replay a recorded merge, at the recorded rank, without learning; the base is needed only for --full."""
    with plain_errors():
        from nsc.errors import NSCError
        from nsc.merging.from_record import apply as run

        if (rank is not None) + exact + full > 1:
            raise NSCError("--rank, --exact and --full exclude one another: give one of them")
        result = run(record, adapters=pairs(adapter or [], "--adapter"), base=base)
        kept = result.record.rank if rank is None and not (exact or full) else rank
        _finish(result.save(out, rank=kept, full=full), out)


def _finish(proof: Any, out: Path) -> None:
    typer.echo(f"proof: {proof}\nwritten to {out}")
