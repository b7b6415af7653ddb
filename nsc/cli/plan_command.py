"""``nsc plan`` and ``nsc profile``."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nsc.cli.terminal import pairs, plain_errors


def plan(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id; only its config is read.")],
    adapter: Annotated[list[str] | None, typer.Option(metavar="TASK=PATH", help="PEFT folder or Hub id.")] = None,
    rank: Annotated[int, typer.Option(help="Without --adapter: of each adapter.")] = 16,
    tasks: Annotated[int, typer.Option(help="Without --adapter: how many.")] = 2,
    lora_module: Annotated[list[str] | None, typer.Option(help="Without --adapter: carries LoRA; repeat.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples a task and step.")] = 2,
    max_length: Annotated[int, typer.Option(help="Tokens of every sample.")] = 512,
    steps: Annotated[int, typer.Option(help="AdamW steps.")] = 500,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float32...")] = "auto",
    target_module: Annotated[list[str] | None, typer.Option(help="Measure these modules; repeat.")] = None,
    target_block: Annotated[list[int] | None, typer.Option(help="Measure in these blocks; repeat.")] = None,
    hardware: Annotated[str, typer.Option(help="A100-80, H100, H200, B200, MI300X, cpu.")] = "H100",
    flops: Annotated[float | None, typer.Option(help="FLOP/s in this dtype, instead of the hardware's.")] = None,
    bandwidth: Annotated[float | None, typer.Option(help="Bytes/s, instead of the hardware's.")] = None,
    memory: Annotated[float | None, typer.Option(help="Bytes of one device, instead of the hardware's.")] = None,
    gpus: Annotated[int, typer.Option(help="Devices of a node.")] = 1,
    nodes: Annotated[int, typer.Option(help="How many such nodes.")] = 1,
    layers: Annotated[str, typer.Option(help="How adapters are carried: auto, factors, weights.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Predict time, memory and launch of a merge from shapes alone, before anything is downloaded or run."""
    with plain_errors():
        from nsc.performance.hardware import get_hardware
        from nsc.performance.plan import format_plan, plan_merge

        predicted = plan_merge(
            base,
            pairs(adapter or [], "--adapter"),
            rank=rank,
            tasks=tasks,
            lora_modules=tuple(lora_module or ("q_proj", "v_proj")),
            batch_size=batch_size,
            max_length=max_length,
            steps=steps,
            dtype=dtype,
            target_modules=tuple(target_module) if target_module else None,
            target_blocks=tuple(target_block) if target_block else None,
            hardware=get_hardware(hardware, flops, bandwidth, memory),
            gpus=gpus,
            nodes=nodes,
            layers=layers,
        )
        typer.echo(json.dumps(predicted.to_dict(), indent=1) if as_json else format_plan(predicted))


def profile(
    base: Annotated[str, typer.Option(help="Base model: folder or Hub id.")],
    adapter: Annotated[list[str], typer.Option(metavar="TASK=PATH", help="PEFT folder or Hub id; repeat per task.")],
    data: Annotated[list[str], typer.Option(metavar="TASK=FILE", help="JSONL, text or hub:NAME; repeat per task.")],
    steps_timed: Annotated[int, typer.Option(help="Steps, each with a run of its floor beside it.")] = 5,
    batch_size: Annotated[int, typer.Option(help="Samples a task and step.")] = 2,
    max_length: Annotated[int, typer.Option(help="Tokens a sample.")] = 512,
    layers: Annotated[str, typer.Option(help="How they carry adapters: auto, factors or weights.")] = "auto",
    target_module: Annotated[list[str] | None, typer.Option(help="Measure these modules; repeat.")] = None,
    target_block: Annotated[list[int] | None, typer.Option(help="Measure in these blocks; repeat.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base: auto, bfloat16, float32...")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda...")] = "auto",
    hardware: Annotated[str | None, typer.Option(help="Whose datasheet to predict with; default: this GPU's.")] = None,
    flops: Annotated[float | None, typer.Option(help="FLOP/s in this dtype, instead of the datasheet's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Run a few real steps and say where their time goes, and how near they come to the frozen base alone."""
    with plain_errors():
        from nsc.performance.profile import format_profile, profile_merge

        found = profile_merge(
            base,
            pairs(adapter, "--adapter"),
            pairs(data, "--data"),
            steps=steps_timed,
            hardware=hardware,
            flops=flops,
            batch_size=batch_size,
            max_length=max_length,
            layers=layers,
            target_modules=tuple(target_module) if target_module else None,
            target_blocks=tuple(target_block) if target_block else None,
            dtype=dtype,
            device=device,
        )
        typer.echo(json.dumps(found.to_dict(), indent=1) if as_json else format_profile(found))
