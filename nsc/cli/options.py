"""The flags of the commands: groups that several share, each a panel of ``--help``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import typer

ADAPTER = typer.Option(metavar="TASK=PATH", help="PEFT folder or Hub id; repeat for each task.")
BASE = typer.Option(help="Base model: folder or Hub id.")
BASE_ID = typer.Option(
    metavar="USER/NAME", help="Name of the base on the Hub, for what is shared.  [default: what the adapters name]"
)
BATCH_SIZE = typer.Option(help="Samples per task and step.")
DATA = typer.Option(metavar="TASK=FILE", help="Unlabeled rows or images of a task; repeat for each task.")
DTYPE = typer.Option(help="Of the base model: auto, bfloat16, float32...")
DEVICE = typer.Option(help="auto, cpu, cuda...")
FOR = typer.Option(
    "--for",
    metavar="PROGRAM",
    help="peft, vllm, sglang or llama.cpp: refuse what it cannot serve, and print its command; repeat for more.",
)
FULL = typer.Option("--full", help="Write the whole merged model instead of an adapter.")
JSON = typer.Option("--json", help="Print JSON.")
LAYERS = typer.Option(help="How a layer applies its adapters: auto, factors or weights.")
MAX_LENGTH = typer.Option(help="Tokens per sample, at most.")
RAGGED = typer.Option(
    "--ragged/--one-rank", help="Keep each module's own rank, instead of padding all with zeros to the largest."
)
RANK = typer.Option(help="Truncate the merged adapter to this rank.")
TARGET_BLOCK = typer.Option(help="Measure in this block; repeat for more.")
TARGET_MODULE = typer.Option(help="Measure the inputs of this module; repeat for more.")
VALIDATION = typer.Option(metavar="TASK=FILE", help="Labelled rows to search by; repeat for each task.")


@dataclass
class InputFlags:
    """Where a merge reads from, and what says its settings."""

    panel: ClassVar[str] = "Inputs"

    base: Annotated[str | None, BASE] = None
    adapter: Annotated[list[str] | None, ADAPTER] = None
    data: Annotated[list[str] | None, DATA] = None
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file with any of these options, or an earlier merge.yaml; flags override it."),
    ] = None
    preset: Annotated[str, typer.Option(help="Settings of the paper (vit, llama, llava or paper), or fast.")] = "paper"
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting of the method; repeat for more.")
    ] = None


@dataclass
class LearningFlags:
    """How coefficients are learned."""

    panel: ClassVar[str] = "Learning the coefficients"

    steps: Annotated[int | None, typer.Option(help="Optimizer steps; overrides the preset.")] = None
    lr: Annotated[float | None, typer.Option(help="Learning rate; overrides the preset.")] = None
    start: Annotated[float | None, typer.Option(help="Initial value of every coefficient; overrides the preset.")] = (
        None
    )
    start_from: Annotated[
        str | None,
        typer.Option(metavar="FOLDER|METHOD", help="Matching starts from this merged adapter, or method's merge."),
    ] = None
    batch_size: Annotated[int | None, BATCH_SIZE] = None
    max_length: Annotated[int, MAX_LENGTH] = 512
    max_drift: Annotated[
        float, typer.Option(help="How far a coefficient may move from its initial value; negative: no bound.")
    ] = 0.15
    weight_decay: Annotated[float, typer.Option(help="Weight decay of AdamW.")] = 0.0
    seed: Annotated[int, typer.Option(help="Seed of the order of samples.")] = 0
    target_module: Annotated[list[str] | None, TARGET_MODULE] = None
    target_block: Annotated[list[int] | None, TARGET_BLOCK] = None


@dataclass
class RunningFlags:
    """Where and in what precision the base model runs."""

    panel: ClassVar[str] = "Memory and devices"

    dtype: Annotated[str, DTYPE] = "auto"
    device: Annotated[str, DEVICE] = "auto"
    weights: Annotated[
        str, typer.Option(help="Precision of the base's weights while learning: full, int8, fp8 or nf4.")
    ] = "full"
    device_map: Annotated[
        str | None,
        typer.Option(help="auto, balanced...: spread over all GPUs, CPU and disk by accelerate; replaces --device."),
    ] = None
    shard: Annotated[bool, typer.Option("--shard", help="Split the base over the processes of torchrun.")] = False
    layers: Annotated[str, LAYERS] = "auto"
    tokens_per_pass: Annotated[
        str, typer.Option(help="Split a step with more tokens into several passes; auto: as free memory allows.")
    ] = "auto"
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, at the cost of a second forward per step.")
    ] = False
    graphs: Annotated[
        bool, typer.Option("--graphs/--no-graphs", help="Record steps as CUDA graphs and replay them.")
    ] = True


@dataclass
class MethodFlags:
    """Which method merges, and its most common settings."""

    panel: ClassVar[str] = "Other merging methods"

    method: Annotated[
        str, typer.Option(help="A method that `nsc methods` lists, or nsc+METHOD, weighted by learned coefficients.")
    ] = "nsc"
    scale: Annotated[float | None, typer.Option(help="Factor of the whole merged update.")] = None
    search: Annotated[
        str | None,
        typer.Option(help="Search the scale: match (default of regressions with rows), labels, null-space or none."),
    ] = None
    scales: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest scale of the search.  [default: 0.1 1.5]")
    ] = None
    over: Annotated[
        str | None,
        typer.Option(metavar="KEY=V1,V2...", help="A setting and the values that the search tries, each at its scale."),
    ] = None
    validation: Annotated[list[str] | None, VALIDATION] = None
    density: Annotated[float | None, typer.Option(help="TIES: the fraction of entries that is kept.")] = None
    drop: Annotated[float | None, typer.Option(help="DARE: the fraction of entries that is dropped.")] = None
    coefficients: Annotated[
        Path | None, typer.Option(help="Folder of an earlier merge, whose coefficients weight this method.")
    ] = None


@dataclass
class OutputFlags:
    """What is written."""

    panel: ClassVar[str] = "Output"

    out: Annotated[Path | None, typer.Option(help="New folder for the result.")] = None
    rank: Annotated[int | None, RANK] = None
    full: Annotated[bool, FULL] = False
    ragged: Annotated[bool, RAGGED] = False
    base_id: Annotated[str | None, BASE_ID] = None
    programs: Annotated[list[str] | None, FOR] = None
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted merge of OUT.")] = False


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the flags of those parameters that are groups, as if its signature listed them.

    Args:
        command: whose parameters are flags of their own, or dataclasses of flags.

    Returns:
        The same command with one parameter for each flag; the flags of a group share the panel that it names.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        own = parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
        flat += _flags(groups[name]) if name in groups else [own]

    @wraps(command)
    def run(**values: Any) -> None:
        made = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        command(**values, **made)

    del run.__wrapped__  # type: ignore[attr-defined]  # its signature is another
    run.__signature__ = inspect.Signature(flat)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def _flags(group: Any) -> list[inspect.Parameter]:
    """The fields of a group as parameters, all in one panel."""
    hints, flags = get_type_hints(group, include_extras=True), []
    for field in fields(group):
        kind, option = get_args(hints[field.name])
        option = copy(option)
        option.rich_help_panel = group.panel
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        flags.append(
            inspect.Parameter(
                field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
            )
        )
    return flags
