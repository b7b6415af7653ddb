"""What a merge will cost, from a config and ranks alone: FLOPs, bytes, floor time, memory, and how to launch it.

    floor of a step = max(FLOPs of the frozen base / FLOPs a second, bytes of its weights / bytes a second)

with FLOPs and bytes of one forward and one backward as in ``nsc.costs``: about 4 x parameters x tokens. No merge can be
faster; none is promised to come near. Everything is predicted from shapes, nothing is run.

Paper: https://arxiv.org/abs/2603.26317.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import check_shapes
from nsc.adapters.surgery import PLANS
from nsc.bases import loading
from nsc.bases.base_config import body_config
from nsc.bases.module_names import resolve
from nsc.bases.roles import choose_targets
from nsc.checks import require_choice, require_positive
from nsc.console import metric
from nsc.errors import NSCError
from nsc.performance.costs import LayerKind, Linear, Memory, Step, Work, linears_in_order
from nsc.performance.hardware import Hardware, get_hardware
from nsc.performance.launch import USABLE, Launch, choose_launch

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Plan:
    """A prediction.  work: of a step on all devices.  floor: seconds of a step that no merge can beat.  step: seconds
    of the same with attention, adapters and ratios at the same rates.  fits: one device, a whole step in one pass.
    """

    base: str
    parameters: int
    dtype: str
    tasks: int
    samples: int  # of a step, all tasks together
    tokens: int  # of a sample
    steps: int
    targets: tuple[str, ...]
    hardware: Hardware
    gpus: int  # of a node
    nodes: int
    work: tuple[Work, ...]
    floor: float
    step: float
    layers: tuple[LayerKind, ...]
    memory: Memory
    fits: bool
    launch: Launch
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON: FLOPs, bytes, seconds."""
        of_run = {"run_floor": self.floor * self.steps, "run": self.step * self.steps}
        return asdict(self) | of_run | {"memory_total": self.memory.total}


def plan_merge(
    base: Any,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    rank: int = 16,
    tasks: int = 2,
    lora_modules: Sequence[str] = ("q_proj", "v_proj"),
    batch_size: int = 2,
    max_length: int = 512,
    steps: int = 500,
    dtype: str = "auto",
    target_modules: Sequence[str] | None = None,
    target_blocks: Sequence[int] | None = None,
    hardware: str | Hardware = "H100",
    gpus: int = 1,
    nodes: int = 1,
    layers: str = "auto",
) -> Plan:
    """Predict FLOPs, bytes, seconds, memory and launch of a merge. No weight of the base is read.

    base: folder, Hub id or a transformers config.  adapters: task -> folder or Hub id; without them, ``tasks``
    hypothetical ones of ``rank`` on ``lora_modules``.  max_length: tokens of every sample (of an image, the config
    says).  gpus: of each of ``nodes``.  layers: auto, factors or weights.  The others as in MergeConfig. Raises
    NSCError for a base that is no dense transformer and for an argument that cannot be.
    """
    sizes = dict(rank=rank, tasks=tasks, batch_size=batch_size, max_length=max_length, gpus=gpus, nodes=nodes)
    require_positive(sizes | {"steps": steps})
    device = get_hardware(hardware) if isinstance(hardware, str) else hardware
    require_choice("layers", layers, ("auto", *PLANS))
    model, config, notes = meta_body(base)
    dtype = _dtype(config, dtype)
    linears = linears_in_order(model)
    count = len(adapters) if adapters else tasks
    ranks = _read_ranks(adapters, linears) if adapters else _same_rank(linears, lora_modules, rank * tasks)
    targets = choose_targets(model, list(ranks), target_modules, target_blocks)
    tokens = _tokens(config, max_length)
    step = Step(model, linears, ranks, targets, count, count * batch_size, tokens, BYTES[dtype])
    work, memory = step.work(layers), step.memory()
    launch = choose_launch(memory, device.memory * USABLE, gpus, nodes, BYTES[dtype])
    share = math.ceil(step.samples / launch.devices) / step.samples
    floor, whole = _seconds(work, device.flops if BYTES[dtype] == 2 else device.flops_float32, device, share)
    return Plan(
        base=str(base) if isinstance(base, (str, Path)) else config.model_type,
        parameters=sum(p.numel() for p in model.parameters()), dtype=dtype, tasks=count, samples=step.samples,
        tokens=tokens, steps=steps, targets=tuple(targets), hardware=device, gpus=gpus, nodes=nodes, work=tuple(work),
        floor=floor, step=whole, layers=tuple(step.kinds(layers)), memory=memory,
        fits=memory.total <= device.memory * USABLE, launch=launch, notes=tuple(notes),
    )  # fmt: skip


def meta_body(base: Any) -> tuple[nn.Module, Any, list[str]]:
    """The body of a base without its weights, its config, and what should be known about both.

    base: folder, Hub id or a transformers config. Of a model that takes images and text, the body is the language
    model. Raises NSCError where transformers has no such model, or its shapes are not those of one body.
    """
    try:
        config = body_config(base) if isinstance(base, (str, Path)) else base
        notes = []
        inner = getattr(config, "text_config", None)
        if getattr(config, "is_encoder_decoder", False) or (inner and not hasattr(config, "image_seq_length")):
            raise NSCError(
                f"no plan for {config.model_type}: it is more than one body, or the tokens of an image depend on the"
                " image; plan its language model by that model's own config, with --max-length including images"
            )
        if inner:
            notes.append(f"language model only, {config.image_seq_length} tokens of an image added; no image tower")
        with loading.quiet_loading(), torch.device("meta"):
            return AutoModel.from_config(inner or config), config, notes
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NSCError(f"base {str(base)!r} has no config that transformers can build a body from: {error}") from error


def format_plan(plan: Plan) -> str:
    """The plan for people."""
    device, memory, launch = plan.hardware, plan.memory, plan.launch
    kept = ("weights", "factors", "coefficients", "activations", "workspace")
    parts = [(part, metric(getattr(memory, part), "B")) for part in kept]
    verdict = "a whole step fits one device" if plan.fits else "a whole step does not fit one device"
    times = [("floor", plan.floor), ("with attention, adapters, ratios", plan.step)]
    layers = [(k.kind, str(k.modules), str(k.shape), str(k.R), k.plan) for k in plan.layers]
    work = [(w.part, metric(w.flops), metric(w.bytes)) for w in plan.work]
    tables: list[list[Any]] = [
        [("of a step, all devices", "FLOPs", "bytes"), *work],
        [("time", "a step", "the run"), *((n, _time(t), _time(t * plan.steps)) for n, t in times)],
        [("memory, one device", ""), *parts, ("total", metric(memory.total, "B"))],
        [("layers", "modules", "(m, d)", "R", "carried as"), *layers],
    ]
    return "\n".join(
        [
            "Predicted from shapes: nothing was run. No step is faster than the floor; none is promised to be near it.",
            "",
            f"base     {plan.base}: {metric(plan.parameters)} parameters, {plan.dtype}",
            f"step     {plan.tasks} tasks, {plan.samples} samples of {plan.tokens} tokens; {plan.steps} steps",
            f"targets  {len(plan.targets)}, the last is {plan.targets[-1]}",
            f"devices  {plan.nodes} x {plan.gpus}, each {metric(device.flops, 'FLOP/s')}"
            f" (float32 {metric(device.flops_float32, 'FLOP/s')}), {metric(device.bandwidth, 'B/s')},"
            f" {metric(device.memory, 'B')}",
            *(line for table in tables for line in ("", *_aligned(table))),
            f"{verdict} ({USABLE:.0%} of {metric(device.memory, 'B')});"
            f" activations with checkpointing: {metric(memory.checkpointed, 'B')}",
            "",
            f"launch   {launch.way}, devices: {launch.devices}, passes a step: {launch.passes}; {launch.why}",
            f"         {launch.command or 'no way to run it on such devices'}",
            *(f"note     {note}" for note in plan.notes),
        ]
    )


def _seconds(work: Sequence[Work], rate: float, device: Hardware, share: float) -> tuple[float, float]:
    """Of the base alone, and of everything, on a device with this share of the rows; it reads all weights."""
    work = [replace(w, flops=w.flops * share) for w in work]
    base = Work("base", sum(w.flops for w in work[:2]), sum(w.bytes for w in work[:2]))
    return base.seconds(rate, device.bandwidth), sum(w.seconds(rate, device.bandwidth) for w in work)


def _read_ranks(adapters: Mapping[str, str | Path], linears: Sequence[Linear]) -> dict[str, int]:
    """Module -> R of all adapters, in the order in which modules run."""
    shapes = {linear.name: (linear.m, linear.d) for linear in linears}
    ranks = dict.fromkeys(shapes, 0)
    for task, place in adapters.items():
        adapter = read_adapter(place, task)
        names = resolve(task, adapter.factors, shapes)
        check_shapes(adapter, names, shapes)
        for name, factors in adapter.factors.items():
            ranks[names[name]] += factors.rank
    return {name: R for name, R in ranks.items() if R}


def _same_rank(linears: Sequence[Linear], kinds: Sequence[str], R: int) -> dict[str, int]:
    names = [x.name for x in linears if any(f".{x.name}".endswith(f".{kind}") for kind in kinds)]
    if not names:
        there = ", ".join(sorted({x.name.rsplit(".", 1)[-1] for x in linears}))
        raise NSCError(f"lora_modules {', '.join(kinds)} match no linear of the base; its linears are {there}")
    return dict.fromkeys(names, R)


def _tokens(config: Any, length: int) -> int:
    """Of a sample: patches and a class token, or ``length`` and the tokens of an image where there is one."""
    size, patch = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    if isinstance(size, int) and isinstance(patch, int):
        return (size // patch) ** 2 + 1
    return length + (getattr(config, "image_seq_length", 0) if hasattr(config, "text_config") else 0)


def _dtype(config: Any, dtype: str) -> str:
    """What the config names for "auto", float32 where it names none."""
    inner = getattr(config, "text_config", config)
    stated = [getattr(c, key, None) for c in (config, inner) for key in ("dtype", "torch_dtype")]
    found = next((str(s).removeprefix("torch.") for s in stated if s), "float32") if dtype == "auto" else dtype
    require_choice("dtype", found, BYTES)
    return found


def _time(seconds: float) -> str:
    if seconds < 100:
        return metric(seconds, "s")
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
