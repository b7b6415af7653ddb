"""The tables of README.md and docs/results.md, written from benchmarks/results between their markers.

    python benchmarks/table.py            rewrites the marked sections of both documents (``make tables``)
    python benchmarks/table.py targets    prints one

    <!-- table:NAME -->  ...  <!-- /table -->        NAME: targets, targets-short, targets-cpu, step, ops, layer, ...

Every figure stands under the device that it was measured on; what was not measured is an empty cell.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from predict import GPUS
from step_targets import cpu_targets, step_targets
from targets import Results, duration, targets

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "docs/results.md")
Entries = list[dict[str, Any]]
Devices = dict[str, Entries]  # file stem -> entries
EMPTY = ""
PREDICTED = (
    "Predicted: for each kernel the larger of its bytes over {bandwidth} and its FLOPs over 790 TFLOP/s, with every"
    " tensor moved once, summed over kernels; launches and waiting are not included. For a step: the base,"
    " attention, adapters and ratios as `nsc plan` counts them; for the loop the same base once per task, PEFT's"
    " layers, the ratios as eager torch runs them, and the image tower in every step; norms, activations and sums"
    " between the linear layers are included in neither. An empty cell has not been measured yet: `make gpu`"
    " measures it."
)
STEPS = (
    "Medians of runs by turns, in seconds on the clock. `loop`: the method as it is usually written, one task after"
    " the other. `floor`: the frozen base alone, to the last target's input and back. The split is that of a"
    " profiled step: base with everything around it, LoRA, ratios, optimizer, and host: the time in which the"
    " device, or on a CPU every operator, was idle."
)
OPS = (
    "GB/s count the bytes that the shape requires, each tensor moved once; the last figure is their share of the"
    " rate of a device copy in the same run. `usual`: the ratio in the fewest lines of torch, under autograd."
    " `linear`: `F.linear` alone."
)
OVERHEAD = (
    "`public`: the complete function. `op`: without its checks. `registered`: through torch's dispatcher. `launch`:"
    " only the launches of its kernels, prepared beforehand. `graph`: device time in a CUDA graph. On a CPU,"
    " `public` and `op` run without the kernels, and `registered` and `reference` both run the reference: in the"
    " forward they differ by the dispatcher. The fastest of all rounds: other work on the machine can only add"
    " time."
)
METHODS = (
    "Six adapters of rank 16 on q_proj (4096 x 4096) and v_proj (1024 x 4096): all 64 layers, empty where the time"
    " of one block says that it would take too long; one block, q and v; and the peak memory beyond the factors."
    " Dense: one block by the formulation as it is usually written, in full space; `knots` is the SVD of [D_1 .."
    " D_6] and a sum, the least that a method in such a basis must compute. Linear, LoRA-LEGO and RobustMerge have"
    " none. On a CPU all times are CPU seconds, which exclude other work on the machine."
)


LIGHT = (
    "Six adapters of rank 16 at LLaMA-3-8B's shapes, float32. Medians of whole processes, which ran by turns, each with"
    " one thread; in brackets the ratio to the other program. nsc writes and proves, PEFT concatenates and saves."
)


def load(folder: Path = ROOT / "benchmarks" / "results") -> Devices:
    """Return the numbers of every device that was measured."""
    return {file.stem: json.loads(file.read_text())["benchmarks"] for file in sorted(folder.glob("*.json"))}


def filled(text: str, devices: Devices) -> str:
    """Return ``text`` with every marked section written anew.

    Raises:
        KeyError: for a table that does not exist.
    """

    def section(match: re.Match[str]) -> str:
        return f"{match[1]}\n{TABLES[match[2]](devices)}\n<!-- /table -->"

    return re.sub(r"(<!-- table:([\w-]+) -->)\n.*?<!-- /table -->", section, text, flags=re.DOTALL)


def on_gpus(devices: Devices) -> dict[str, Results]:
    """Return, for each name in ``GPUS``, what was measured on such a GPU; a CPU's figures are never among them."""
    found: dict[str, Entries] = {name: [] for name in GPUS}
    for entry in (entry for entries in devices.values() for entry in entries):
        device = entry["made"]["device"]
        for name in GPUS:
            if name in device and not device.startswith("CPU"):
                found[name].append(entry)
    return {name: Results(entries) for name, entries in found.items()}


def targets_table(devices: Devices, *, every: bool = True) -> str:
    """Return target, prediction and measurement on each GPU.

    Unless ``every``, only GPUs that were measured are in the table, or else the H200.
    """
    measured = on_gpus(devices)
    names = [name for name in GPUS if every or measured[name].entries] or ["H200"]
    heads = ["in bfloat16", "target", *(f"{name}, {kind}" for name in names for kind in ("predicted", "measured"))]
    rows = [
        [t.what, t.goal, *(cell for name in names for cell in (t.predicted(GPUS[name]), t.measured(measured[name])))]
        for t in [*targets(), *step_targets()]
    ]
    bandwidth = " or ".join(f"{GPUS[name].bandwidth / 1e12} TB/s ({name})" for name in names)
    sources = [made_with(measured[name].entries) for name in names if measured[name].entries]
    return "\n\n".join([PREDICTED.format(bandwidth=bandwidth), markdown(heads, rows), *sources])


def cpu_targets_table(devices: Devices) -> str:
    """Return the targets of machines without a GPU, and what each of those measured."""
    parts = []
    for entries in devices.values():
        results = Results([e for e in entries if e["made"]["device"].startswith("CPU")])
        if chosen := [*results.of_kind("step"), *results.of_kind("ranks")]:
            parts += [made_with(chosen), markdown(["on a CPU", "target", "measured"], cpu_targets(results))]
    return "\n\n".join(parts) or markdown(["on a CPU", "target", "measured"], cpu_targets(Results([])))


def step_table(entries: Entries) -> str:
    """Return the table of whole steps."""
    rows = []
    for info, _ in _timed(entries):
        took, split = info["seconds"], info["split"]
        shares = ", ".join(f"{part} {seconds / info['split_of']:.1%}" for part, seconds in split.items())
        mfu = EMPTY if info["mfu"] is None else f"{info['mfu']:.1%}"
        peak = EMPTY if info["peak_beyond_weights"] is None else f"{info['peak_beyond_weights'] / 1e9:.2f} GB"
        name = f"{info['model']}, {info['dtype']}, {info['tokens']} tokens" + (
            f" ({info['cut']})" if info["cut"] else ""
        )
        times = [duration(took[key]) for key in ("nsc", "loop", "floor")]
        ratios = [f"{took['ratio']:.2f}", f"{took['over_floor']:.3f}"]
        rows.append([name, *times, *ratios, mfu, peak, info["launch"], shares])
    heads = [
        "step",
        "nsc",
        "loop",
        "floor",
        "loop over nsc",
        "nsc over floor",
        "MFU",
        "beyond weights",
        "launch",
        "split",
    ]
    return markdown(heads, rows)


def ops_table(entries: Entries) -> str:
    """Return the table of every pass of every op at every shape."""
    rows: dict[str, dict[str, str]] = {}
    for info, seconds in _timed(entries):
        op = " ".join(filter(None, [f"`{info['op']}`", info["variant"], info["step"]]))
        digits = ".0f" if info["gb_per_s"] >= 100 else ".3g"
        cell = f"{duration(seconds)} ({info['gb_per_s']:{digits}} GB/s, {info['fraction_of_copy']:.2f})"
        rows.setdefault(f"{op}, {info['shape']}", {})[info["provider"]] = cell
    columns = [c for c in ("reference", "compiled", "triton") if any(c in row for row in rows.values())]
    lines = []
    for name, row in rows.items():
        others = "; ".join(f"{provider} {cell}" for provider, cell in row.items() if provider not in columns)
        lines.append([name, *(row.get(column, EMPTY) for column in columns), others])
    return markdown(["op, pass, shape", *columns, "others"], lines)


def layer_table(entries: Entries) -> str:
    """Return the table of time and memory of the layers."""
    bare = {info["shape"]: seconds for info, seconds in _timed(entries) if info["provider"] == "bare"}
    rows = []
    for info, seconds in _timed(entries):
        relative = f"{seconds / bare[info['shape']]:.2f}" if info["shape"] in bare else EMPTY
        size = f"{info['m']} x {info['d']}, {info['ranks']}"
        saved = f"{info['saved_bytes'] / 1e6:.2f}"
        rows.append([info["shape"], size, info["provider"], duration(seconds), relative, saved])
    return markdown(["rows", "weight, adapters", "layer", "forward + backward", "over bare", "saved, MB"], rows)


def overhead_table(entries: Entries) -> str:
    """Return the table of what a call takes the host, by each way into an op."""
    results, measured = Results(entries), {info["way"] for info, _ in _timed(entries)}
    ways = [way for way in ("public", "op", "registered", "reference", "launch", "graph") if way in measured]
    rows = []
    for op, step in dict.fromkeys((info["op"], info["step"]) for info, _ in _timed(entries)):
        cells = (results.seconds("overhead", op=op, step=step, way=way) for way in ways)
        rows.append([f"`{op}` {step}", *(EMPTY if cell is None else f"{cell * 1e6:.1f}" for cell in cells)])
    return markdown(["µs a call", *ways], rows)


def methods_table(entries: Entries) -> str:
    """Return every merging method beside its dense formulation, where the same device measured that."""
    results, rows = Results(entries), []
    for info in (entry["extra_info"] for entry in entries if entry["extra_info"]["side"] == "nsc"):
        other = results.find("method", side="dense", method=info["against"])
        dense = other["extra_info"] if other else None
        whole = EMPTY if info["whole"] is None else spent(info["whole"])
        cells = [EMPTY] * 3
        if dense:
            ratio = dense["block"] / info["block"]
            times = f"{ratio:.0f}x" if ratio >= 10 else f"{ratio:.2f}x"
            cells = [f"{info['against']}, {spent(dense['block'])}", times, megabytes(dense)]
        rows.append([f"`{info['method']}`", whole, spent(info["block"]), megabytes(info), *cells])
    return markdown(
        ["method", "64 layers", "one block", "memory", "dense, one block", "dense over nsc", "its memory"], rows
    )


def light_table(entries: Entries) -> str:
    """Return whole processes, from start to exit, beside another program's."""
    rows = []
    for info in (entry["extra_info"] for entry in entries):
        for program, found in info["programs"].items():
            ratio = info["ratios"] if program == "nsc" else {}
            cells = [f"{found[key]:.1f} s" + (f" ({ratio[key]:.2f}x)" if ratio else "") for key in ("cpu", "clock")]
            memory = f"{found['peak_bytes'] / 2**20:.0f} MiB" + (f" ({ratio['peak_bytes']:.2f}x)" if ratio else "")
            rows.append([info["merge"], program, *cells, memory])
    return markdown(["merge", "program", "CPU", "clock", "peak memory"], rows)


def spent(seconds: float) -> str:
    """Return a duration that may be minutes."""
    return f"{seconds:.{0 if seconds >= 100 else 2}f} s" if seconds >= 1 else duration(seconds)


def megabytes(info: dict[str, Any]) -> str:
    """Return the peak of a method, or an empty cell where the system does not count it."""
    return EMPTY if info["peak_bytes"] is None else f"{info['peak_bytes'] / 1e6:.0f} MB"


def _timed(entries: Entries) -> list[tuple[dict[str, Any], float]]:
    """Return what was measured, and the median in seconds."""
    return [(entry["extra_info"], entry["stats"]["median"]) for entry in entries]


def by_device(kind: str, table: Callable[[Entries], str], legend: str = "") -> Callable[[Devices], str]:
    """Return what makes a table for each device on which this kind was measured, below a legend."""

    def run(devices: Devices) -> str:
        parts = [legend] if legend else []
        for entries in devices.values():
            if chosen := Results(entries).of_kind(kind):
                parts += [made_with(chosen), table(chosen)]
        return "\n\n".join(parts)

    return run


def made_with(entries: Entries) -> str:
    """Return the device, versions, dates and commits of these entries, in a line."""

    def said(key: str) -> str:
        return ", ".join(sorted({str(entry["made"].get(key))[: 10 if key == "date" else None] for entry in entries}))

    dtypes = sorted({entry["extra_info"].get("dtype", "") for entry in entries} - {""})
    copies = [entry["extra_info"]["copy_gb_per_s"] for entry in entries if "copy_gb_per_s" in entry["extra_info"]]
    parts = [f"**{said('device')}**", f"threads: {said('threads')}" if "CPU" in said("device") else "", *dtypes]
    parts += [f"copy {max(copies):.0f} GB/s"] if copies else []
    parts += [f"torch {said('torch')}", f"triton {said('triton')}", f"commit {said('commit')}", said("date")]
    return ", ".join(filter(None, parts)) + "."


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *rows])


TABLES: dict[str, Callable[[Devices], str]] = {
    "targets": targets_table,
    "targets-short": lambda devices: targets_table(devices, every=False),
    "targets-cpu": cpu_targets_table,
    "step": by_device("step", step_table, STEPS),
    "ops": by_device("op", ops_table, OPS),
    "layer": by_device("layer", layer_table),
    "methods": by_device("method", methods_table, METHODS),
    "light": by_device("light", light_table, LIGHT),
    "overhead": by_device("overhead", overhead_table, OVERHEAD),
}


def main(names: list[str]) -> None:
    """Print these tables, or with none write the documents."""
    for name in names:
        print(TABLES[name](load()))
    for name in () if names else DOCUMENTS:
        document = ROOT / name
        document.write_text(filled(document.read_text(), load()))
        print(f"tables written in {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
