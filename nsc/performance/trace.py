"""Where the time of a step goes, read off torch's profiler: operators and kernels by the range the host issued them in.

The ops of ``nsc_kernels`` open a range of their own name while a profiler runs, and torch's optimizers one of theirs.
What was issued within such a range is LoRA, ratio or optimizer; everything else is the base, with what surrounds it.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

PARTS = ("base", "lora", "ratio", "optimizer")
RANGES = {r"nsc::lora": "lora", r"nsc::\w*ratio": "ratio", r"Optimizer\.": "optimizer"}  # by how a name begins
OPERATOR = re.compile(r"\w+::\w+$")  # aten::mm; not torch::autograd::AccumulateGrad, which surrounds operators
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
Event = dict[str, Any]  # of a Chrome trace: cat, name, tid, ts and dur in microseconds, args


def profile_step(step: Callable[[], Any], device: torch.device, steps: int = 1) -> tuple[dict[str, float], float]:
    """Split the time of a step by what was issued, under torch's profiler.

    On a GPU, busy is the time of kernels and copies, which the profiler does not slow; on a CPU, of the outermost
    operators. A step replayed as a CUDA graph cannot be split: all of it is one launch, and counts as base.

    Args:
        step: function that runs one step.
        device: device it runs on.
        steps: over which means are taken.

    Returns:
        Each of PARTS -> busy seconds per step; and seconds per step on the clock.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as traced:
        _wait(device)
        started = time.perf_counter()
        for _ in range(steps):
            step()
        _wait(device)
        seconds = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        traced.export_chrome_trace(str(file))
        parts = split(json.loads(file.read_text())["traceEvents"])
    return {part: busy / steps for part, busy in parts.items()}, seconds / steps


def split(events: Iterable[Event]) -> dict[str, float]:
    """Return the busy time in the events of a Chrome trace.

    Args:
        events: events as the profiler exports them.

    Returns:
        Each of PARTS -> seconds.
    """
    timed = [event for event in events if event.get("ph") == "X"]
    on_device: dict[int, float] = defaultdict(float)  # microseconds by the launch that they belong to
    for event in timed:
        if event.get("cat") in ON_DEVICE:
            on_device[event["args"]["correlation"]] += event["dur"]
    threads: dict[Any, list[Event]] = defaultdict(list)
    for event in timed:
        threads[event.get("pid"), event.get("tid")].append(event)
    busy = dict.fromkeys(PARTS, 0.0)
    for thread in threads.values():
        for part, microseconds in _issued(thread, on_device):
            busy[part] += microseconds / 1e6
    return busy


def _issued(thread: list[Event], on_device: dict[int, float]) -> Iterable[tuple[str, float]]:
    """Part and microseconds of each operator, or where a device worked of each launch, of one thread of the host."""
    ranges: list[tuple[float, str]] = []  # those open now, the innermost last: their end and part
    counted = 0.0  # until when an operator has been counted, with what is inside it
    for event in sorted(thread, key=lambda event: (event["ts"], -event["dur"])):
        start, end, kind = event["ts"], event["ts"] + event["dur"], event.get("cat")
        while ranges and ranges[-1][0] <= start:
            ranges.pop()
        own = _part(event["name"]) if kind in ("user_annotation", "cpu_op") else None
        if own:
            ranges.append((end, own))
        part = ranges[-1][1] if ranges else "base"
        if on_device and kind in LAUNCHES:
            yield part, on_device.get(event.get("args", {}).get("correlation"), 0.0)
        elif not on_device and kind == "cpu_op" and OPERATOR.match(event["name"]) and start >= counted:
            counted = end
            yield part, event["dur"]


def _part(name: str) -> str | None:
    return next((part for pattern, part in RANGES.items() if re.match(pattern, name)), None)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
