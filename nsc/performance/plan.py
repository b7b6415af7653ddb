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
from nsc.bases.base_model import Base, quiet_loading
from nsc.bases.module_names import resolve
from nsc.bases.roles import choose_targets
from nsc.checks import require_choice, require_positive
from nsc.config import PLANS
from nsc.console import metric
from nsc.errors import NSCError
from nsc.performance.costs import LayerKind, Memory, Step, Work
from nsc.performance.hardware import HARDWARE, Hardware
from nsc.performance.launch import USABLE, LaunchPlan, choose_launch
from nsc.performance.linears import Linear, linears_in_order

BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True)
class Plan:
    """A prediction of what a merge will cost.

    Attributes:
        base: name of the base.
        parameters: number of parameters of the body.
        dtype: dtype of the base.
        tasks: K.
        samples: samples of a step, all tasks together.
        tokens: tokens of a sample.
        steps: optimizer steps.
        targets: names of the measured layers.
        hardware: one device.
        gpus: devices per node.
        nodes: how many there are.
        work: work of a step, on all devices.
        floor: seconds of a step that no merge can beat.
        step: seconds of a step with attention, adapters and ratios at the same rates.
        layers: the modules with LoRA, by kind.
        memory: memory of one device, for a step in one pass.
        fits: whether one device holds a whole step in one pass.
        launch: how to start the merge.
        notes: what a reader must know.
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
    launch: LaunchPlan
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON.

        Returns:
            FLOPs, bytes and seconds by name.
        """
        of_run = {"run_floor": self.floor * self.steps, "run": self.step * self.steps}
        return asdict(self) | of_run | {"memory_total": self.memory.total}


@dataclass(frozen=True)
class Workload:
    """What a step carries and how many steps there are.

    Attributes:
        rank: rank of each adapter, where none are given.
        tasks: how many adapters, where none are given.
        lora_modules: suffixes of the modules that carry LoRA, where no adapters are given.
        batch_size: samples per task and step.
        max_length: tokens of every sample; of an image, the config says.
        steps: optimizer steps.
        dtype: dtype of the base; "auto" takes the config's.
        target_modules: measured modules, as in MergeConfig.
        target_blocks: measured blocks, as in MergeConfig.
        layers: "auto", "factors" or "weights", as in MergeConfig.
        objective: "null-space", or "match", whose forward runs to its end.
    """

    rank: int = 16
    tasks: int = 2
    lora_modules: Sequence[str] = ("q_proj", "v_proj")
    batch_size: int = 2
    max_length: int = 512
    steps: int = 500
    dtype: str = "auto"
    target_modules: Sequence[str] | None = None
    target_blocks: Sequence[int] | None = None
    layers: str = "auto"
    objective: str = "null-space"

    def __post_init__(self) -> None:
        sizes = ("rank", "tasks", "batch_size", "max_length", "steps")
        require_positive({name: getattr(self, name) for name in sizes})
        require_choice("layers", self.layers, ("auto", *PLANS))
        require_choice("objective", self.objective, ("null-space", "match"))


@dataclass(frozen=True)
class Cluster:
    """The devices that a merge may use.

    Attributes:
        hardware: one device.
        gpus: devices of a node.
        nodes: how many such nodes.
    """

    hardware: Hardware = HARDWARE["H100"]
    gpus: int = 1
    nodes: int = 1

    def __post_init__(self) -> None:
        require_positive({"gpus": self.gpus, "nodes": self.nodes})


MATCHING = (
    "match: the heads are not counted, and before the first step each drawn row takes two forwards of the base, one of"
    " its expert and one of the base alone"
)


def plan_merge(
    base: Any,
    adapters: Mapping[str, str | Path] | None = None,
    workload: Workload = Workload(),
    cluster: Cluster = Cluster(),
) -> Plan:
    """Predict FLOPs, bytes, seconds, memory and launch of a merge, without reading a weight of the base.

    Args:
        base: folder, Hub id or a transformers config.
        adapters: task -> PEFT folder or Hub id; None for the hypothetical ones of ``workload``.
        workload: what a step carries.
        cluster: the devices.

    Returns:
        The prediction.

    Raises:
        NSCError: a subclass, for a base that is no dense transformer, or adapters that do not fit it.
    """
    device, w = cluster.hardware, workload
    model, config, notes = meta_body(base)
    dtype = _dtype(config, w.dtype)
    linears = linears_in_order(model)
    tasks = len(adapters) if adapters else w.tasks
    ranks = _read_ranks(adapters, linears) if adapters else _same_rank(linears, w.lora_modules, w.rank * tasks)
    targets = choose_targets(model, list(ranks), w.target_modules, w.target_blocks)
    tokens = _tokens(config, w.max_length)
    matches = w.objective == "match"
    notes += [MATCHING] if matches else []
    step = Step(model, linears, ranks, targets, tasks, tasks * w.batch_size, tokens, BYTES[dtype], matches)
    work, memory = step.work(w.layers), step.memory()
    launch = choose_launch(memory, device.memory * USABLE, cluster.gpus, cluster.nodes, BYTES[dtype])
    share = math.ceil(step.samples / launch.devices) / step.samples
    floor, whole = _seconds(work, device.flops if BYTES[dtype] == 2 else device.flops_float32, device, share)
    return Plan(
        base=str(base) if isinstance(base, (str, Path)) else config.model_type,
        parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        tasks=tasks,
        samples=step.samples,
        tokens=tokens,
        steps=w.steps,
        targets=tuple(targets),
        hardware=device,
        gpus=cluster.gpus,
        nodes=cluster.nodes,
        work=tuple(work),
        floor=floor,
        step=whole,
        layers=tuple(step.kinds(w.layers)),
        memory=memory,
        fits=memory.total <= device.memory * USABLE,
        launch=launch,
        notes=tuple(notes),
    )


def meta_body(base: Any) -> tuple[nn.Module, Any, list[str]]:
    """Build the body of a base without its weights; of a model that takes images and text, the language model.

    Args:
        base: folder, Hub id or a transformers config.

    Returns:
        The body, its config, and notes on both.

    Raises:
        NSCError: if transformers has no such model, or its shapes are not those of one body.
    """
    try:
        config = Base(str(base)).body_config if isinstance(base, (str, Path)) else base
        notes = []
        inner = getattr(config, "text_config", None)
        if getattr(config, "is_encoder_decoder", False) or (inner and not hasattr(config, "image_seq_length")):
            raise NSCError(
                f"no plan for {config.model_type}: it is more than one body, or the tokens of an image depend on the"
                " image; plan its language model by that model's own config, with --max-length including images"
            )
        if inner:
            notes.append(f"language model only, {config.image_seq_length} tokens of an image added; no image tower")
        with quiet_loading(), torch.device("meta"):
            return AutoModel.from_config(inner or config, trust_remote_code=False), config, notes
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise NSCError(f"base {str(base)!r} has no config that transformers can build a body from: {error}") from error


def format_plan(plan: Plan) -> str:
    """Format a plan for people.

    Args:
        plan: the prediction.

    Returns:
        Plain text.
    """
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
    chosen = next((str(s).removeprefix("torch.") for s in stated if s), "float32") if dtype == "auto" else dtype
    require_choice("dtype", chosen, tuple(BYTES))
    return chosen


def _time(seconds: float) -> str:
    if seconds < 100:
        return metric(seconds, "s")
    return f"{seconds / 60:.3g} min" if seconds < 6000 else f"{seconds / 3600:.3g} h"


def _aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
