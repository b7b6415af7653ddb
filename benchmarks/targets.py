"""The targets, beside each what bytes and FLOPs allow and what was measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import predict
from predict import Gpu, Kernels
from shapes import GPU_SHAPES, PREFILL, SIX, TARGET, Shape

BOTH = "forward + backward"
GRAM_BYTES = 6 * 64 * 16 * 4096 * 4
WITH_SIX = [shape for shape in GPU_SHAPES if shape.ranks == SIX]


class Results:
    """The entries of one device's file."""

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.entries = entries

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """Return the entries of one kind, such as "op", "layer", "overhead" or "gram"."""
        return [entry for entry in self.entries if entry["extra_info"].get("kind") == kind]

    def find(self, kind: str, **wanted: Any) -> dict[str, Any] | None:
        """Return the one entry whose ``extra_info`` holds all of this, or None.

        Raises:
            ValueError: if there are more.
        """
        hits = [e for e in self.of_kind(kind) if all(e["extra_info"].get(k) == v for k, v in wanted.items())]
        if len(hits) > 1:
            raise ValueError(f"{kind} {wanted} has more than one result: {[hit['fullname'] for hit in hits]}")
        return hits[0] if hits else None

    def seconds(self, kind: str, **wanted: Any) -> float | None:
        """Return the median of that entry, or None if it was not measured.

        Of host times it is the least: other work only adds.
        """
        hit = self.find(kind, **wanted)
        return None if hit is None else hit["stats"]["min" if kind == "overhead" else "median"]

    def op(self, op: str, step: str, shape: Shape, *providers: str) -> Pair:
        """Return the seconds that two providers take for one pass of an op (without a Gram)."""
        first, second = (
            self.seconds("op", op=op, step=step, variant="", shape=shape.name, provider=name) for name in providers
        )
        return first, second

    def layer(self, *providers: str) -> Pair:
        """Return the seconds that two layers take at the target's shape."""
        first, second = (self.seconds("layer", shape=PREFILL.name, provider=name) for name in providers)
        return first, second


Pair = tuple[float | None, float | None]  # theirs and ours


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        what: is asked for.
        goal: with its unit.
        predicted: a GPU -> the cell that bytes and FLOPs give, "" for what is not known.
        measured: a device's results -> the cell, "" for what was not measured.
    """

    what: str
    goal: str
    predicted: Callable[[Gpu], str]
    measured: Callable[[Results], str]


def duration(seconds: float) -> str:
    """Return seconds with three digits, in µs below a millisecond, in ms from there on."""
    value, unit = (seconds * 1e6, "µs") if seconds < 1e-3 else (seconds * 1e3, "ms")
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f} {unit}"


def faster(theirs: float, ours: float) -> str:
    """Return how many times as fast as theirs ours is, and both times."""
    return f"{theirs / ours:.2f}x ({duration(ours)} against {duration(theirs)})"


def longer(theirs: float, ours: float) -> str:
    """Return how many times their time ours is, and both times."""
    return f"{ours / theirs:.2f}x ({duration(ours)} against {duration(theirs)})"


def comparison(
    what: str,
    goal: str,
    kernels: list[tuple[Kernels, Kernels]],  # theirs and ours, of each shape
    pairs: Callable[[Results], list[Pair]],
    form: Callable[[float, float], str] = faster,
) -> Target:
    """Return the target of ours against theirs, at the shape where ours compares worst."""

    def worst(found: list[Pair]) -> str:
        known = [(theirs, ours) for theirs, ours in found if theirs is not None and ours is not None]
        return form(*min(known, key=lambda pair: pair[0] / pair[1])) if known else ""

    return Target(
        what,
        goal,
        lambda gpu: worst([(predict.seconds(theirs, gpu), predict.seconds(ours, gpu)) for theirs, ours in kernels]),
        lambda results: worst(pairs(results)),
    )


def targets() -> list[Target]:
    """Return all targets of ops and layers, in the order of the table."""
    return [*_ratio(), *_down(), *_layer(), _gram(), _host()]


def _ratio() -> list[Target]:
    op, both = "null_space_ratio", predict.of_pass(predict.find("null_space_ratio", BOTH), TARGET)
    name = f"`{op}` {TARGET.n} x {TARGET.d}"

    def against(provider: str, meaning: str, goal: str, kernels: Kernels) -> Target:
        what = f"{name}, {BOTH}, against {meaning}"
        return comparison(what, goal, [(kernels, both)], lambda r: [r.op(op, BOTH, TARGET, provider, "triton")])

    return [
        *(_of_copy(step, f"{name}, {step}, bytes/s over those of a device copy") for step in ("forward", "backward")),
        against("usual", "eager PyTorch", "≥ 5x", predict.of_usual_ratio(TARGET)),
        against("compiled", "`torch.compile` of the reference", "≥ 1.2x", both),
    ]


def _of_copy(step: str, what: str) -> Target:
    kernels = predict.of_pass(predict.find("null_space_ratio", step), TARGET)

    def measured(results: Results) -> str:
        wanted = {"op": "null_space_ratio", "step": step, "variant": "", "shape": TARGET.name, "provider": "triton"}
        hit = results.find("op", **wanted)
        return f"{hit['extra_info']['fraction_of_copy']:.2f} ({duration(hit['stats']['median'])})" if hit else ""

    return Target(what, "≥ 0.90", lambda gpu: f"1.00 ({duration(predict.seconds(kernels, gpu))})", measured)


def _down() -> list[Target]:
    work = predict.find("lora_down", "forward")

    def against(provider: str, what: str, goal: str, shapes: list[Shape]) -> Target:
        kernels = [(predict.of_linear(s, norm="norm" in provider), predict.of_pass(work, s)) for s in shapes]
        pairs = lambda r: [r.op("lora_down", "forward", s, provider, "triton") for s in shapes]  # noqa: E731
        return comparison(f"`lora_down`, R = 96, {what}", goal, kernels, pairs)

    prefill = [shape for shape in WITH_SIX if shape.n >= 4096]
    return [
        against("linear + norm", "against `F.linear` and a norm: the least of all prefill shapes", "≥ 1.5x", prefill),
        against("linear", "against `F.linear` alone: the least of all shapes", "≥ 0.91x", WITH_SIX),
    ]


def _layer() -> list[Target]:
    name = f"`MergedLoRALinear` {PREFILL.m} x {PREFILL.d}, six rank-16 adapters, {PREFILL.n} rows, {BOTH}"
    bare, peft, merged = (f(PREFILL) for f in (predict.of_bare_layer, predict.of_peft_layer, predict.of_merged_layer))

    def saved(ours: float, theirs: float) -> str:
        return f"{ours / theirs:.3f} ({ours / 1e6:.1f} MB against {theirs / 1e6:.0f} MB)"

    def measured(results: Results) -> str:
        hits = [results.find("layer", shape=PREFILL.name, provider=name) for name in ("merged", "peft")]
        return saved(*(hit["extra_info"]["saved_bytes"] for hit in hits if hit)) if all(hits) else ""

    return [
        comparison(
            f"{name}, against the bare linear",
            "≤ 1.15x",
            [(bare, merged)],
            lambda r: [r.layer("bare", "merged")],
            longer,
        ),
        comparison("the same against PEFT's layer", "≥ 2x", [(peft, merged)], lambda r: [r.layer("peft", "merged")]),
        Target(
            "memory that it saves for the backward, over that of PEFT's",
            "≤ 0.25",
            lambda gpu: saved(predict.saved_by_merged(PREFILL), predict.saved_by_peft(PREFILL)),
            measured,
        ),
    ]


def _gram() -> Target:
    def measured(results: Results) -> str:
        seconds = results.seconds("gram")
        return "" if seconds is None else duration(seconds)

    what = "Gram cache, 6 adapters x 64 modules, width 4096"
    return Target(what, "≤ 20 ms", lambda gpu: f"{duration(GRAM_BYTES / gpu.bandwidth)} to read A", measured)


def _host() -> Target:
    def measured(results: Results) -> str:
        found = overheads(results, "forward")
        worst = max(found, key=found.__getitem__, default="")
        return f"{duration(found[worst])} (`{worst}`)" if worst else ""

    return Target(
        "host time of an eager call beyond its launches: the most of all ops", "≤ 15 µs", lambda _: "", measured
    )


def overheads(results: Results, step: str) -> dict[str, float]:
    """Return, for each op, by how many seconds the public function takes the host longer than its launches alone."""
    found = {}
    for op in sorted({entry["extra_info"]["op"] for entry in results.of_kind("overhead")}):
        public, launch = (results.seconds("overhead", op=op, step=step, way=way) for way in ("public", "launch"))
        if public is not None and launch is not None:
            found[op] = public - launch
    return found
