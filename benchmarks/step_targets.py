"""The targets of whole steps and merges, beside each what bytes and FLOPs allow and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import predict_step
from models import CASES, Case
from targets import Results, Target, duration, faster, longer

from nsc.console import metric

WHERE = {case.model: case for case in CASES if case.dtype == "bfloat16"}
LLAMA, LLAVA, VIT = (WHERE[name] for name in ("LLaMA-3-8B", "LLaVA-1.5-7B", "ViT-B/16"))
JOBS = {"500 steps": (500, "< 2 min"), "fast preset, 50 steps": (50, "< 15 s")}
GPU_MEMORY = 141e9


def step_targets() -> list[Target]:
    """Return all targets of steps and merges, in the order of the table."""
    return [
        _against_loop(LLAMA, f"{LLAMA.model} step, 6 tasks x 2 prompts of 96 tokens, {LLAMA.passes} passes", "≥ 4x"),
        _against_loop(LLAVA, f"{LLAVA.model} step, 6 tasks x 1 prompt of 576 + 64 tokens", "≥ 2x"),
        _against_loop(VIT, f"{VIT.model} step, 20 tasks x 32 images", "≥ 5x"),
        _over_floor(),
        *(_job(name, *job) for name, job in JOBS.items()),
        _memory(),
        Target(
            "learning for a 70B base fits one GPU of 141 GB with 8-bit weights",
            "≤ 141 GB",
            lambda _: metric(predict_step.in_8_bits().total, "B"),
            _measured_memory("LLaMA-3-70B, 8 bits"),
        ),
    ]


def _against_loop(case: Case, what: str, goal: str) -> Target:
    def measured(results: Results) -> str:
        info = _info(results, case)
        return faster(info["seconds"]["loop"], info["seconds"]["nsc"]) if info else ""

    return Target(
        f"{what}, against the per-task hook loop",
        goal,
        lambda gpu: faster(predict_step.loop(case, gpu), predict_step.seconds(case, gpu)),
        measured,
    )


def _over_floor() -> Target:
    def worst(pairs: list[tuple[float, float]]) -> str:
        return longer(*max(pairs, key=lambda pair: pair[1] / pair[0])) if pairs else ""

    def measured(results: Results) -> str:
        infos = [info for case in (LLAMA, LLAVA) if (info := _info(results, case))]
        return worst([(info["seconds"]["floor"], info["seconds"]["nsc"]) for info in infos])

    return Target(
        f"the slower of {LLAMA.model} and {LLAVA.model}, a step over its floor",
        "≤ 1.15x",
        lambda gpu: worst([(predict_step.floor(c, gpu), predict_step.seconds(c, gpu)) for c in (LLAMA, LLAVA)]),
        measured,
    )


def _job(name: str, steps: int, goal: str) -> Target:
    """Return a target whose prediction is of the steps alone, its measurement of a whole merge."""

    def measured(results: Results) -> str:
        seconds = results.seconds("job", model=LLAVA.model, steps=steps)
        return "" if seconds is None else f"{seconds:.1f} s"

    return Target(
        f"six adapters on {LLAVA.model}, a whole merge, {name}",
        goal,
        lambda gpu: f"{steps * predict_step.seconds(LLAVA, gpu):.1f} s, steps alone",
        measured,
    )


def _memory() -> Target:
    return Target(
        f"peak memory of a {LLAMA.model} step in {LLAMA.passes} passes, beyond the base's weights",
        "≤ 3 GB",
        lambda _: metric(predict_step.beyond_weights(LLAMA), "B"),
        _measured_memory(LLAMA.model),
    )


def _measured_memory(model: str) -> Callable[[Results], str]:
    def measured(results: Results) -> str:
        hit = results.find("step", model=model, dtype="bfloat16")
        peak = hit["extra_info"]["peak_beyond_weights"] if hit else None
        return "" if peak is None else metric(peak, "B")

    return measured


def _info(results: Results, case: Case) -> dict[str, Any] | None:
    """Return what was measured of the case as it is: one that was cut for a small machine is another."""
    hit = results.find("step", model=case.model, dtype="bfloat16", cut="")
    return hit["extra_info"] if hit else None


def cpu_targets(results: Results) -> list[list[str]]:
    """Return rows of target, goal and what one machine without a GPU measured."""
    rows = []
    for dtype in ("float32", "bfloat16"):
        hit = results.find("step", model="SmolLM2-135M", dtype=dtype)
        took = hit["extra_info"]["cpu_seconds"] if hit else {}
        cell = f"{took['over_floor']:.3f}x ({took['nsc']:.2f} s against {took['floor']:.2f} s)" if took else ""
        rows.append([f"SmolLM2-135M step over its floor, {dtype}, CPU seconds", "≤ 1.10x", cell])
    hit = results.find("ranks")
    info = hit["extra_info"] if hit else None
    cell = f"{info['speedup']:.2f}x ({duration(info['one'])} alone, {duration(info['two'])} together)" if info else ""
    rows.append(["2 processes against 1, twice the rows, rows a second", "≥ 1.9x", cell])
    return rows
