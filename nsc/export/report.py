"""What was decided, learned and written: tables for people, a dictionary for programs, a heat map for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from nsc.bases.experts import expert_of
from nsc.config import START
from nsc.console import json_ready
from nsc.export.programs import PROGRAMS, VLLM_RANKS, vllm_rank


@dataclass(frozen=True)
class Report:
    """Everything that a reader of a merge wants to know. Lists run over ``tasks`` or ``modules``, in their order.

    Attributes:
        base: folder or Hub id.
        tasks: names.
        modules: names in the base's body.
        coefficients: one row per module, one column per task; means over rank rows, where each has its own.
        start: initial value of the coefficients.
        ranks: task -> rank, or lowest to highest.
        scales: task -> scale, or lowest to highest.
        conditions: task -> the worst condition number of an A (its Gram matrix has the square).
        conditions_by_module: module -> condition numbers, None where an adapter has no factors.
        absent: coefficients of adapters that do not touch the module.
        whole: modules that adapters fine-tuned whole, merged as differences.
        heads: task -> tensors of its modules_to_save that it keeps, under ``heads/``.
        merged_rank: largest rank in the written adapter; None before it is known, and for a full model.
        vllm_max_lora_rank: smallest ``max_lora_rank`` of vLLM that serves it; None if there is none.
        targets: modules whose inputs were measured.
        ratio_before: mean null-space ratio of each task over its targets; NaN for an unseen task.
        ratio_after: the same after learning.
        ratios_by_target: target -> ratios by task, after learning.
        granularity: "layer", "task", "rank" or "factors".
        unseen: tasks merged without any data.
        by_states: tasks without an output, which were compared with their experts by pooled last hidden states.
        untrained: coefficients that no gradient reaches, left at ``start``.
        bounded: coefficients stopped by ``drift_bound``.
        max_drift: largest distance of a coefficient from ``start``.
        drift_bound: its bound; None for none.
        steps: optimizer steps.
        losses: one per step.
        distances: step -> each task's distance from its expert on held-out rows, relative to the bare base's (1 knows
            nothing, 0 says what the expert says); empty where it was not measured.
        kept: the step that was kept.
        full: whether the whole model was written.
        seconds_per_step: mean.
        peak_memory_gib: peak memory while learning, in GiB.
        truncation: module -> relative error, where a rank was asked for.
        proofs: what was loaded back and compared.
        warnings: what a reader must know.
        method: the method, as ``nsc.merge`` takes it.
        line: what the method does, in one line.
        source: where the method is from.
        space: space in which another method runs; None for the weighted sum.
        settings: settings of the method.
        ranks_by_module: module -> rank of its own factors, before any padding.
        tried: method -> its best scale and its distance from the experts on held-out rows, if several were tried.
        searched: how the scale was found, if it was searched: search, measure, range, every scale tried and its value
            (curve), the best, and seconds.
        started: which merge was started from ("from"), and of one that was made first its "scale", "distance" from the
            experts and relative "error" of its best approximation, 0 where it is exact; empty if none was.
        fitted: what a method that needs rows was made from and how near it comes: rows and tokens by task, condition
            numbers by layer, and errors |D x - D_k x|^2 / |D_k x|^2 by task, or of all tasks together.
    """

    base: str
    tasks: list[str]
    modules: list[str]
    coefficients: list[list[float]]
    start: float
    ranks: dict[str, str]
    scales: dict[str, str]
    conditions: dict[str, str]
    conditions_by_module: dict[str, list[float | None]]
    absent: list[str]
    merged_rank: int | None
    vllm_max_lora_rank: int | None
    whole: list[str] = field(default_factory=list)
    heads: dict[str, list[str]] = field(default_factory=dict)
    targets: list[str] = field(default_factory=list)
    ratio_before: list[float] = field(default_factory=list)
    ratio_after: list[float] = field(default_factory=list)
    ratios_by_target: dict[str, list[float]] = field(default_factory=dict)
    granularity: str = "layer"
    unseen: list[str] = field(default_factory=list)
    by_states: list[str] = field(default_factory=list)
    untrained: list[str] = field(default_factory=list)
    bounded: list[str] = field(default_factory=list)
    max_drift: float = 0.0
    drift_bound: float | None = None
    steps: int = 0
    losses: list[float] = field(default_factory=list)
    distances: dict[str, list[float]] = field(default_factory=dict)
    kept: int = 0
    full: bool = False
    seconds_per_step: float = 0.0
    peak_memory_gib: float = 0.0
    truncation: dict[str, float] = field(default_factory=dict)
    proofs: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    method: str = "nsc"
    line: str = ""
    source: str = ""
    space: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    ranks_by_module: dict[str, int] = field(default_factory=dict)
    searched: Mapping[str, Any] = field(default_factory=dict)
    tried: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fitted: Mapping[str, Any] = field(default_factory=dict)
    started: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON.

        Returns:
            The fields, with None where a number is not finite.
        """
        return {key: json_ready(value) for key, value in asdict(self).items()}

    def to_markdown(self) -> str:
        """Return the report as Markdown: facts, then tables of tasks, of the search, of coefficients and of ranks.

        Returns:
            Markdown.
        """
        tables = [_tried_table(self.tried)] if self.tried else []
        tables += [_search_table(self.searched)] if self.searched else []
        tables += [_coefficient_table(self)] if self.coefficients else []
        tables += [_rank_table(self)] if self.space and self.ranks_by_module else []
        return "\n\n".join([_facts(self), _task_table(self), *_warnings(self), *tables])

    def summary(self) -> str:
        """Return a few lines for a terminal.

        Returns:
            Plain text.
        """
        lines = [f"  {line[2:]}" for line in _facts(self).splitlines()]
        for k, task in enumerate(self.tasks):
            if self.ratio_before and task not in self.unseen:
                lines.append(f"  {task}: null-space ratio {self.ratio_before[k]:.4f} -> {self.ratio_after[k]:.4f}")
        return "\n".join(lines + [f"  warning: {text}" for text in self.warnings])


def vllm_limits(rank: int, whole: list[str]) -> list[str]:
    """Say what vLLM would refuse in an adapter, with the remedy.

    Args:
        rank: rank of the adapter.
        whole: layers that it carries in modules_to_save.

    Returns:
        One warning per limit.
    """
    limits = []
    if vllm_rank(rank) is None:
        limits.append(
            f"vLLM cannot serve this adapter: its rank {rank} is above {VLLM_RANKS[-1]}, the most that max_lora_rank"
            " takes; save it with a smaller --rank, or the whole model with --full"
        )
    if whole := [name for name in whole if name not in (PROGRAMS["vllm"].saved or ())]:
        limits.append(
            f"vLLM cannot serve this adapter: it does not load such modules_to_save, here {', '.join(whole[:3])}"
            f"{f' and {len(whole) - 3} more' * (len(whole) > 3)}; save the whole model with --full"
        )
    return limits


def padding_cost(ranks: Mapping[str, int], extra: int) -> list[str]:
    """Say what it costs that all modules are written with one rank.

    Args:
        ranks: module -> rank of its own factors.
        extra: bytes of zeros in the file.

    Returns:
        One warning, or none where nothing was padded.
    """
    if not extra:
        return []
    low, top = min(ranks.values()), max(ranks.values())
    smaller = sum(rank < top for rank in ranks.values())
    return [
        f"{smaller} of {len(ranks)} modules have a smaller rank, from {low}, and are padded with zeros to {top}, since"
        f" llama.cpp and SGLang read one rank for all: {extra / 2**20:.2g} MiB more; --ragged keeps each module's rank"
    ]


def draw_heat_map(path: Path, report: Report) -> None:
    """Draw the coefficients, modules by tasks: cells without gradient are hatched, absent adapters grey.

    Args:
        path: PNG file to write.
        report: whose coefficients are drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    table = torch.tensor(report.coefficients)
    figure = Figure(figsize=(2.8 + 0.9 * len(report.tasks), 1.6 + 0.16 * len(report.modules)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    reach = max((table - report.start).abs().max().item(), 1e-6)
    shown = table.masked_fill(torch.tensor([_absent(report, module) for module in report.modules]), float("nan"))
    image = axes.imshow(shown, aspect="auto", cmap="RdBu", vmin=report.start - reach, vmax=report.start + reach)
    axes.set_facecolor("0.8")
    axes.set_xticks(range(len(report.tasks)), report.tasks, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(report.modules)), report.modules, fontsize=6)
    axes.set_title(f"coefficients (start {report.start:g})\nhatched: no gradient   grey: no adapter", fontsize=9)
    untrained = set(report.untrained)
    for m, module in enumerate(report.modules):
        for k, task in enumerate(report.tasks):
            if f"{module} ({task})" in untrained:
                axes.add_patch(Rectangle((k - 0.5, m - 0.5), 1, 1, fill=False, hatch="///", lw=0, ec="0.6"))
    figure.colorbar(image, shrink=0.6)
    figure.savefig(path, dpi=120)


def _facts(report: Report) -> str:
    bound = "none" if report.drift_bound is None else f"{report.drift_bound:g}"
    vllm = report.vllm_max_lora_rank or f"none: vLLM stops at {VLLM_RANKS[-1]}, export with a smaller rank"
    at_bound = f"bound {bound}; {len(report.bounded)} at it"
    rank = (
        "none, the updates are in the weights" if report.full else f"{report.merged_rank} (vLLM: max_lora_rank {vllm})"
    )
    lines = [f"- base: {report.base}", *_method(report)]
    lines += [f"- merged rank: {rank}"] if report.full or report.merged_rank is not None else []
    if report.granularity == "rank":
        lines.append("- a coefficient for each rank row of an adapter; shown are the means of an adapter's in a module")
    if report.granularity == "factors":
        lines.append("- the merged adapter's own factors are fitted to what the experts say: the experts are distilled")
    if unseen := [task for task in report.unseen if task != START]:
        lines.append(f"- unseen, merged without data of their own: {', '.join(unseen)}")
    if report.by_states:
        lines.append(f"- without an output, compared by pooled last hidden states: {', '.join(report.by_states)}")
    if report.whole:
        lines.append(f"- fine-tuned whole, merged as differences: {', '.join(report.whole)}")
    if kept := [f"{task} ({', '.join(names)})" for task, names in report.heads.items()]:
        lines.append(f"- kept under heads/, each for its own task: {'; '.join(kept)}")
    lines += [_started(report.started)] if report.started else []
    if report.targets:
        lines += [
            f"- targets ({len(report.targets)}): {', '.join(report.targets)}",
            f"- {report.steps} steps, {report.seconds_per_step:.3f} s each",
            *_learned(report, at_bound),
            f"- peak memory: {report.peak_memory_gib:.2f} GiB",
        ]
    if report.truncation:
        name, error = max(report.truncation.items(), key=lambda item: item[1])
        lines.append(f"- truncation: relative error at most {error:.3g} ({name})")
    return "\n".join(lines + [f"- proof: {proof}" for proof in report.proofs])


def _learned(report: Report, at_bound: str) -> list[str]:
    """What is known of the coefficients, and of the held-out rows."""
    lines, start = [], "the start" if report.started else f"{report.start:g}"
    if report.coefficients:
        lines += [
            f"- largest drift from {start}: {report.max_drift:.4f} ({at_bound})",
            f"- coefficients without gradient, left at {start}: {len(report.untrained)}",
        ]
    if report.distances:
        first, best = (_mean(report.distances[str(step)], report) for step in (0, report.kept))
        lines.append(
            f"- distance from the experts on held-out rows, relative to the bare base's: {first:.3f} at the start,"
            f" {best:.3f} at step {report.kept}, the one that was kept"
        )
    return lines


def _started(started: Mapping[str, Any]) -> str:
    line = f"- started from {started['from']}"
    if "scale" in started:
        line += f" at scale {started['scale']:g}, of all scales tried the nearest to the experts"
    if started.get("error"):
        line += f", in its best approximation of the adapters' ranks: relative error at most {started['error']:.3g}"
    return f"{line}; its coefficients, called {START}, started at 1, all others at 0"


def _mean(values: list[float], report: Report) -> float:
    seen = [value for value, task in zip(values, report.tasks, strict=True) if task not in report.unseen]
    return sum(seen) / len(seen)


def _method(report: Report) -> list[str]:
    if report.space is None:
        return [f"- method: {report.method}, {report.line} ({report.source})"] if report.method != "nsc" else []
    settings = ", ".join(f"{key} {value}" for key, value in report.settings.items() if value not in (None, {}, []))
    return [
        f"- method: {report.method}, {report.line} ({report.source})",
        f"- space: {report.space}",
        f"- settings: {settings}",
        *([_search(report.searched)] if report.searched else []),
        *(_fitted(report.fitted) if report.fitted else []),
    ]


def _fitted(fitted: Mapping[str, Any]) -> list[str]:
    rows, tokens, conditions = fitted["rows"], fitted["tokens"], fitted["conditions"]
    worst = max(conditions, key=lambda name: conditions[name])
    errors = ", ".join(f"{task} {error:.3g}" for task, error in fitted["errors"].items())
    return [
        "- fitted on " + ", ".join(f"{rows[task]} rows of {task} ({tokens[task]} tokens)" for task in rows),
        f"- condition number of the equations: at most {conditions[worst]:.3g} ({worst})",
        f"- error |D x - D_k x|^2 / |D_k x|^2 on these rows: {errors}",
    ]


def _search(searched: Mapping[str, Any]) -> str:
    low, high = searched["scales"]
    return (
        f"- scale: {searched['best']:g}, of {len(searched['curve'])} from {low:g} to {high:g} the one of the least"
        f" {searched['measure']}, found in {searched['seconds']:.1f} s"
    )


def _search_table(searched: Mapping[str, Any]) -> str:
    best = searched["best"]
    lines = [f"| scale | {searched['measure']} |", "|---|---|"]
    return "\n".join(lines + [f"| {s:g}{' (best)' * (s == best)} | {x:.6g} |" for s, x in searched["curve"].items()])


def _tried_table(tried: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| method tried | scale | distance from the experts on held-out rows |", "|---|---|---|"]
    for name, entry in tried.items():
        scale = f"{entry['scale']:g}" if "scale" in entry else ""
        lines.append(f"| {name} | {scale} | {entry.get('refused') or format(entry['distance'], '.4f')} |")
    return "\n".join(lines)


def _rank_table(report: Report) -> str:
    lines = ["| module | rank | truncation |", "|---|---|---|"]
    experts: dict[str, list[str]] = {}  # of one parameter in one line
    for name in report.ranks_by_module:
        parameter, _ = expert_of(name) or (name, 0)
        experts.setdefault(parameter, []).append(name)
    for parameter, names in experts.items():
        ranks = _range([report.ranks_by_module[name] for name in names], "d")
        errors = [report.truncation[name] for name in names if name in report.truncation]
        whose = parameter if names == [parameter] else f"{parameter}, {len(names)} experts"
        lines.append(f"| {whose} | {ranks} | {_range(errors, '.3g') if errors else 'none'} |")
    return "\n".join(lines)


def _range(values: Sequence[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _task_table(report: Report) -> str:
    names = ["task", "rank", "scale", "worst condition of A"]
    names += ["ratio before", "ratio after"] if report.ratio_before or report.space is None else []
    names += ["distance before", "distance after"] if report.distances else []
    head = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    rows = []
    for k, task in enumerate(report.tasks):
        known = task not in report.unseen
        ratios = [
            f"{column[k]:.4f}" if column and known else "" for column in (report.ratio_before, report.ratio_after)
        ]
        ratios += [
            f"{report.distances[str(step)][k]:.3f}" if known else "" for step in (0, report.kept) if report.distances
        ]
        cells = [_cell(task), report.ranks[task], report.scales[task], report.conditions[task], *ratios]
        rows.append(f"| {' | '.join(cells[: len(names)])} |")
    return "\n".join([head, *rows])


def _warnings(report: Report) -> list[str]:
    return ["\n".join(f"- **warning**: {text}" for text in report.warnings)] if report.warnings else []


def _coefficient_table(report: Report) -> str:
    lines = [f"| module | {' | '.join(map(_cell, report.tasks))} |", "|---" * (len(report.tasks) + 1) + "|"]
    untrained = set(report.untrained)
    for module, row in zip(report.modules, report.coefficients, strict=True):
        cells = [
            "-" if absent else f"{value:.4f}{' *' if f'{module} ({task})' in untrained else ''}"
            for value, task, absent in zip(row, report.tasks, _absent(report, module), strict=True)
        ]
        lines.append(f"| {module} | {' | '.join(cells)} |")
    return (
        "\n".join(lines)
        + "\n\n\\* no gradient reaches it: at or after the last target. -: the adapter has no such module"
    )


def _absent(report: Report, module: str) -> list[bool]:
    return [f"{module} ({task})" in report.absent for task in report.tasks]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
