"""``nsc plan`` and ``nsc profile``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from nsc.cli.options import (
    ADAPTER,
    BASE,
    BATCH_SIZE,
    DATA,
    DEVICE,
    DTYPE,
    JSON,
    LAYERS,
    MAX_LENGTH,
    TARGET_BLOCK,
    TARGET_MODULE,
    grouped,
)
from nsc.cli.terminal import pairs, plain_errors

FLOPS = typer.Option(help="FLOP/s in this dtype; overrides the datasheet's.")


@dataclass
class SizeFlags:
    """The merge whose cost is predicted."""

    panel: ClassVar[str] = "The merge"
    adapter: Annotated[list[str] | None, ADAPTER] = None
    rank: Annotated[int, typer.Option(help="Rank of each adapter, without --adapter.")] = 16
    tasks: Annotated[int, typer.Option(help="Number of adapters, without --adapter.")] = 2
    lora_module: Annotated[
        list[str] | None, typer.Option(help="Module that carries LoRA, without --adapter; repeat for more.")
    ] = None
    batch_size: Annotated[int, BATCH_SIZE] = 2
    max_length: Annotated[int, typer.Option(help="Tokens of every sample.")] = 512
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 500
    dtype: Annotated[str, DTYPE] = "auto"
    target_module: Annotated[list[str] | None, TARGET_MODULE] = None
    target_block: Annotated[list[int] | None, TARGET_BLOCK] = None
    layers: Annotated[str, LAYERS] = "auto"
    objective: Annotated[str, typer.Option(help="null-space, or match, whose forward runs to its end.")] = "null-space"


@dataclass
class DeviceFlags:
    """The devices that it may run on."""

    panel: ClassVar[str] = "Devices"
    hardware: Annotated[str, typer.Option(help="A100-80, H100, H200, B200, MI300X or cpu.")] = "H100"
    flops: Annotated[float | None, FLOPS] = None
    bandwidth: Annotated[float | None, typer.Option(help="Memory bytes/s; overrides the datasheet's.")] = None
    memory: Annotated[float | None, typer.Option(help="Bytes of one device; overrides the datasheet's.")] = None
    gpus: Annotated[int, typer.Option(help="Devices per node.")] = 1
    nodes: Annotated[int, typer.Option(help="Number of nodes.")] = 1


@grouped
def plan(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id; only its config is read.")],
    sizes: SizeFlags,
    devices: DeviceFlags,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Predict time, memory and launch command of a merge from shapes alone; nothing is run and no weight is read."""
    with plain_errors():
        from nsc.performance.hardware import get_hardware
        from nsc.performance.plan import Cluster, Workload, format_plan, plan_merge

        workload = Workload(
            rank=sizes.rank,
            tasks=sizes.tasks,
            lora_modules=tuple(sizes.lora_module or Workload.lora_modules),
            batch_size=sizes.batch_size,
            max_length=sizes.max_length,
            steps=sizes.steps,
            dtype=sizes.dtype,
            target_modules=tuple(sizes.target_module) if sizes.target_module else None,
            target_blocks=tuple(sizes.target_block) if sizes.target_block else None,
            layers=sizes.layers,
            objective=sizes.objective,
        )
        hardware = get_hardware(devices.hardware, devices.flops, devices.bandwidth, devices.memory)
        cluster = Cluster(hardware, devices.gpus, devices.nodes)
        predicted = plan_merge(base, pairs(sizes.adapter or [], "--adapter"), workload, cluster)
        typer.echo(json.dumps(predicted.to_dict(), indent=1) if as_json else format_plan(predicted))


@dataclass
class ProfileFlags:
    """The merge of which a few steps are run."""

    panel: ClassVar[str] = "The merge"
    base: Annotated[str, BASE]
    adapter: Annotated[list[str], ADAPTER]
    data: Annotated[list[str], DATA]
    batch_size: Annotated[int, BATCH_SIZE] = 2
    max_length: Annotated[int, MAX_LENGTH] = 512
    layers: Annotated[str, LAYERS] = "auto"
    target_module: Annotated[list[str] | None, TARGET_MODULE] = None
    target_block: Annotated[list[int] | None, TARGET_BLOCK] = None
    dtype: Annotated[str, DTYPE] = "auto"
    device: Annotated[str, DEVICE] = "auto"
    objective: Annotated[str, typer.Option(help="null-space, or match by rank rows.")] = "null-space"


@grouped
def profile(
    merge: ProfileFlags,
    steps_timed: Annotated[int, typer.Option(help="Steps that are timed, by turns with their floor.")] = 5,
    hardware: Annotated[
        str | None, typer.Option(help="Device whose datasheet predicts; by default this GPU's, if it is known.")
    ] = None,
    flops: Annotated[float | None, FLOPS] = None,
    as_json: Annotated[bool, JSON] = False,
) -> None:
    """Run a few real steps, and show where their time goes and how close they come to the frozen base alone."""
    with plain_errors():
        from nsc.config import PAPER_REACH
        from nsc.performance.profile import format_profile, profile_merge

        measured = profile_merge(
            merge.base,
            pairs(merge.adapter, "--adapter"),
            pairs(merge.data, "--data"),
            steps=steps_timed,
            hardware=hardware,
            flops=flops,
            batch_size=merge.batch_size,
            max_length=merge.max_length,
            layers=merge.layers,
            target_modules=tuple(merge.target_module) if merge.target_module else None,
            target_blocks=tuple(merge.target_block) if merge.target_block else None,
            dtype=merge.dtype,
            device=merge.device,
            objective=merge.objective,
            granularity="rank" if merge.objective == "match" else "layer",
            max_drift=None if merge.objective == "match" else PAPER_REACH,
        )
        typer.echo(json.dumps(measured.to_dict(), indent=1) if as_json else format_profile(measured))
