"""Where the time of a step goes: real steps of a merge, by turns with the frozen base alone, and what was predicted.

    over the floor = seconds of a step / seconds of the base alone        MFU = FLOPs needed / (seconds x datasheet)

The floor is measured in the same run, on the same rows: forward to the last target's input, and back to the output of
the first module with LoRA, below which no gradient is needed. FLOPs are counted as they run: every matrix product, and
in attention every pair of tokens. Those needed are the ones of ``nsc.costs``, or the counted ones where it has none.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from nsc.adapters.lora import read_adapters
from nsc.adapters.stack import Stack
from nsc.bases.base_model import Base
from nsc.bases.llava import ImageTextBody
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.console import metric
from nsc.data.modalities import feed_of
from nsc.data.sources import Source, read_data
from nsc.errors import NSCError
from nsc.learning.agreement import Agreement
from nsc.learning.entropy import Entropy
from nsc.learning.passes import in_passes
from nsc.learning.preparation import prepare, stack_on
from nsc.paths import absolute
from nsc.performance.costs import Step, Work
from nsc.performance.hardware import HARDWARE, Hardware, get_hardware
from nsc.performance.linears import linears_in_order
from nsc.performance.timing import Floor, count_flops, nsc_step, sharing_weights, time_by_turns
from nsc.performance.trace import profile_step
from nsc.runtime.memory import kept_bytes, peak_memory
from nsc.runtime.placement import input_device

WARMUP = 2
PROFILED = 2  # steps under the profiler
NAMES = {
    "base": "base, and what surrounds it",
    "lora": "LoRA",
    "ratio": "ratios",
    "optimizer": "optimizer",
    "host": "host",
}
OTHER_RATES = r"\b(PCIe|NVL|MIG)\b"  # variants of a device whose datasheet is another


@dataclass(frozen=True)
class Profile:
    """What was measured of one step; None for what this device or base cannot tell (see notes).

    Attributes:
        base: name of the base.
        device: name of the device.
        dtype: dtype of the base.
        tasks: K.
        tokens: tokens of a step.
        steps: number of timed steps.
        step: median seconds on the clock.
        floor: median seconds of the frozen base alone.
        floor_predicted: seconds at the datasheet's rates.
        parts: part -> its share of ``split_of`` in seconds; "host" is the time in which the device, or on a CPU every
            operator, was idle.
        split_of: seconds.
        flops: FLOPs of matrix products, counted.
        flops_predicted: FLOPs as ``nsc plan`` predicts them.
        rate: FLOP/s of the datasheet.
        mfu: share of ``rate`` that the step reaches.
        kept: bytes that autograd holds for the backward.
        kept_predicted: the same, predicted.
        weights: bytes of the base.
        peak: bytes of the GPU's allocator, or of the process.
        beyond: bytes on the GPU beside the base's weights.
        notes: what a reader must know.
    """

    base: str
    device: str
    dtype: str
    tasks: int
    tokens: int
    steps: int
    step: float
    floor: float
    floor_predicted: float | None
    parts: dict[str, float]
    split_of: float
    flops: int
    flops_predicted: float | None
    rate: float | None
    mfu: float | None
    kept: int
    kept_predicted: float | None
    weights: int
    peak: int
    beyond: int | None
    notes: tuple[str, ...]

    @property
    def over_floor(self) -> float:
        """How many times as long as the floor a step takes."""
        return self.step / self.floor

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON.

        Returns:
            The fields, and the ratio of step to floor.
        """
        return asdict(self) | {"over_floor": self.over_floor}


def profile_merge(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    config: MergeConfig | None = None,
    *,
    steps: int = 5,
    hardware: str | None = None,
    flops: float | None = None,
    **settings: Any,
) -> Profile:
    """Time a few steps of this merge on the rows of its first one, by turns with the floor, and take one apart.

    Nothing is written and no coefficient is kept.

    Args:
        base: folder or Hub id.
        adapters: task -> PEFT folder or Hub id.
        data: task -> unlabeled rows, as ``nsc.merge`` takes them.
        config: settings of learning; fields given in ``settings`` override it.
        steps: number of timed steps.
        hardware: device of ``nsc plan`` to predict with; by default the GPU that is there, if it is known.
        flops: FLOP/s in the base's dtype; overrides the datasheet's.
        settings: fields of MergeConfig.

    Returns:
        The profile.

    Raises:
        NSCError: a subclass, as ``nsc.merge`` raises it.
    """
    if steps < 1:
        raise NSCError(f"steps must be 1 or more, not {steps}")
    config = replace(config or MergeConfig(), **settings)
    read, home = read_adapters(adapters), Base(absolute(base))
    samples = read_data(data, read, feed_of(home).read, config.unseen)
    home, matched = stack_on(home, read, config)
    datasheet = find_hardware(input_device(home.model), hardware, flops)
    if config.granularity == "factors" or config.needs_entropy or config.start_from is not None:
        raise NSCError(
            "a profile is of learned coefficients by null-space ratios or by match, without start_from; choose one of"
            " these"
        )
    problem = prepare(home, matched, samples, config)
    batches = [batch.to(input_device(home.model)) for batch in problem.batches(0)]
    return measure(home, problem.lean, problem.targets, batches, config, steps, datasheet, problem.output)


def measure(
    base: Base,
    stack: Stack,
    targets: Sequence[str],
    batches: Sequence[Batch],
    config: MergeConfig,
    steps: int,
    datasheet: Hardware | str,
    output: Entropy | Agreement | None = None,
) -> Profile:
    """Profile a step on given batches.

    Args:
        base: with weights.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        batches: on the base's device.
        config: settings of learning.
        steps: number of timed steps.
        datasheet: the device's datasheet, or why there is none.
        output: the distance from the experts, where the objective has it; the floor then runs to the end, with heads.

    Returns:
        The profile.
    """
    model = base.model
    weight = next(model.parameters())
    device = input_device(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    on_gpu = device.type == "cuda"
    seconds, peak = _timed(model, stack, targets, batches, config, steps, output)
    eager = replace(config, graphs=False)  # a graph is one launch
    with nsc_step(model, stack, targets, batches, eager, output=output) as step:
        step()
        busy, profiled = profile_step(step, device, PROFILED)
        counted, kept = count_flops(step), kept_bytes(step, model)
    split_of = max(seconds["step"] if on_gpu else profiled, sum(busy.values()))
    work, kept_predicted, notes = _predicted(model, stack, targets, batches, output is not None)
    predicted = sum(part.flops for of_batch in work for part in of_batch) if work else None
    rate = _rate(datasheet, weight.element_size())
    return Profile(
        base=base.id,
        device=torch.cuda.get_device_name(device) if on_gpu else device.type,
        dtype=str(weight.dtype).removeprefix("torch."),
        tasks=len(stack.tasks),
        tokens=sum(b.tokens for b in batches),
        steps=steps,
        step=seconds["step"],
        floor=seconds["floor"],
        floor_predicted=_floor(work, datasheet, rate),
        parts=busy | {"host": split_of - sum(busy.values())},
        split_of=split_of,
        flops=counted,
        flops_predicted=predicted,
        rate=rate,
        mfu=(predicted or counted) / seconds["step"] / rate if rate else None,
        kept=kept,
        kept_predicted=kept_predicted,
        weights=weights,
        peak=peak,
        beyond=peak - weights if on_gpu else None,
        notes=(*notes, *([datasheet] if isinstance(datasheet, str) else [])),
    )


def _timed(
    model: nn.Module,
    stack: Stack,
    targets: Sequence[str],
    batches: Sequence[Batch],
    config: MergeConfig,
    steps: int,
    output: Entropy | Agreement | None,
) -> tuple[dict[str, float], int]:
    """Seconds of a step and of its floor, taken by turns, and the peak of memory in bytes."""
    device, parts = input_device(model), in_passes(batches, config.tokens_per_pass)
    floor = _floor_under(model, stack, targets[-1], output)
    with nsc_step(model, stack, targets, batches, config, output=output) as step:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        for _ in range(WARMUP):
            step()
        peak = peak_memory(device)
        both = {"step": step, "floor": lambda: [floor(part) for part in parts]}
        took = time_by_turns(both, steps, 1, device)
    return {name: median(wall for wall, _ in pairs) for name, pairs in took.items()}, peak


def _floor_under(model: nn.Module, stack: Stack, last: str, output: Entropy | Agreement | None) -> Floor:
    """The frozen base alone as far as a step runs it: to the last target, or to the heads and their loss."""
    body = sharing_weights(model)
    if output is None:
        return Floor(body, stack.names[0], last)
    everyone = torch.ones(len(stack.tasks), device=input_device(model))
    return Floor(body, stack.names[0], None, partial(output, preferences=everyone))


def find_hardware(device: torch.device, name: str | None = None, flops: float | None = None) -> Hardware | str:
    """Return the datasheet of a device.

    Args:
        device: the measured device.
        name: one of HARDWARE; by default this GPU, if it is known.
        flops: FLOP/s that override the datasheet's.

    Returns:
        The datasheet, or why there is none.
    """
    if name:
        return get_hardware(name, flops)
    found = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if found:
        return get_hardware(found, flops)
    if flops:
        return Hardware(flops, flops, math.inf, math.inf)
    return "no datasheet of this device is known: give flops or hardware for MFU and a predicted floor"


def known_gpu(name: str) -> str | None:
    """Return which device of ``nsc plan`` a GPU is.

    Args:
        name: name that the GPU reports.

    Returns:
        Name in HARDWARE; None for an unknown device, or a variant with other rates.
    """
    if re.search(OTHER_RATES, name):
        return None
    words = re.split(r"\W+", name.replace("GB", " "))
    return next((known for known in HARDWARE if set(known.split("-")) <= set(words)), None)


def _rate(datasheet: Hardware | str, itemsize: int) -> float | None:
    if isinstance(datasheet, str):
        return None
    return datasheet.flops if itemsize == 2 else datasheet.flops_float32


def _floor(work: Sequence[Sequence[Work]], datasheet: Hardware | str, rate: float | None) -> float | None:
    """Seconds that the base alone takes at the datasheet's rates, one batch after the other."""
    if isinstance(datasheet, str) or rate is None or not work:
        return None
    bases = [Work("base", sum(w.flops for w in parts[:2]), sum(w.bytes for w in parts[:2])) for parts in work]
    return sum(base.seconds(rate, datasheet.bandwidth) for base in bases)


def _predicted(
    model: nn.Module, stack: Stack, targets: Sequence[str], batches: Sequence[Batch], whole: bool
) -> tuple[list[list[Work]], float | None, list[str]]:
    """Of every batch its work as ``nsc plan`` counts it, the bytes kept for a backward, and why there are none."""
    if isinstance(model, ImageTextBody):
        return [], None, ["nothing is predicted where images come with text: their tower is run once, not in a step"]
    try:
        linears = linears_in_order(model)
    except NSCError as error:
        return [], None, [str(error)]
    ranks = {name: sum(module.ranks) for name, module in stack.modules.items()}
    itemsize = next(model.parameters()).element_size()
    of, shapes = (model, linears, ranks, targets, len(stack.tasks)), [tuple(batch.task.shape) for batch in batches]
    steps = [Step(*of, n, length, itemsize, whole) for n, length in shapes]
    return [step.work() for step in steps], max(step.memory().activations for step in steps), []


def format_profile(profile: Profile) -> str:
    """Format a profile for people.

    Args:
        profile: what was measured.

    Returns:
        Plain text.
    """
    p = profile
    predicted = "not predicted" if p.floor_predicted is None else f"predicted {metric(p.floor_predicted, 's')}"
    planned = "not predicted" if p.flops_predicted is None else f"predicted {metric(p.flops_predicted)}"
    kept = "not predicted" if p.kept_predicted is None else f"predicted {metric(p.kept_predicted, 'B')}"
    beyond = "" if p.beyond is None else f", {metric(p.beyond, 'B')} beyond the base's weights"
    under = "" if p.device != "cpu" else "; under the profiler, which slows the host"
    return "\n".join(
        [
            f"base     {p.base} on {p.device}, {p.dtype}; {p.tasks} tasks, {p.tokens} tokens a step",
            f"step     {metric(p.step, 's')}, median of {p.steps}",
            f"floor    {metric(p.floor, 's')} measured by turns ({predicted}); the step takes {p.over_floor:.3f} of it",
            f"FLOPs    {metric(p.flops)} of matrix products a step ({planned})",
            *([f"MFU      {p.mfu:.1%} of {metric(p.rate or 0, 'FLOP/s')}"] if p.mfu is not None else []),
            f"kept     {metric(p.kept, 'B')} for the backward ({kept})",
            f"memory   peak {metric(p.peak, 'B')} of the {'process' if p.beyond is None else 'GPU'}{beyond}",
            "",
            f"split of {metric(p.split_of, 's')}{under}",
            *(f"  {NAMES[name]:26}{metric(s, 's'):>10}  {s / p.split_of:6.1%}" for name, s in p.parts.items()),
            *(f"note     {note}" for note in p.notes),
        ]
    )
