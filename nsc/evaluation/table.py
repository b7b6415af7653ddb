"""A comparison of merging methods as data, and as a table, a picture and JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from nsc.console import json_ready
from nsc.errors import NSCError
from nsc.evaluation.metrics import METRICS, normalised

ALONE, BARE = "fine-tuned", "heads alone"  # each adapter by itself; its head on the base without any adapter
JSON, TABLE, PICTURE = "compare.json", "compare.md", "compare.png"
ABOUT = """\
Scores on labelled test rows, and what they are of the adapter alone in percent: its metric's share where higher is
better (↑), the other way round where lower is (↓). Seconds: *preparation* makes the merged layers, *optimisation*
learns coefficients, *search* finds the scale. Memory: the most that these took beyond what was held before."""


@dataclass(frozen=True)
class Row:
    """The results of one method.

    Attributes:
        method: name of the method; ALONE and BARE are the two rows to compare with.
        scores: task -> its metric.
        shares: task -> percent of fine-tuned, NaN where there is none.
        mean: mean of the shares, NaN where there is none.
        scale: None where the method has none of its own.
        curve: scale -> value that was minimised.
        preparation: seconds to make the merged layers.
        optimisation: seconds to learn coefficients.
        search: seconds to find the scale.
        memory: bytes, None where the system does not tell.
        notes: what a reader must know.
        refused: why there is no score.
        settings: settings of the method, as plain values.
    """

    method: str
    scores: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    mean: float = math.nan
    scale: float | None = None
    curve: dict[float, float] = field(default_factory=dict)
    preparation: float = 0.0
    optimisation: float = 0.0
    search: float = 0.0
    memory: int | None = None
    notes: tuple[str, ...] = ()
    refused: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """A comparison of merging methods.

    Attributes:
        metrics: task -> one of METRICS.
        rows: the adapters alone, their heads on the base, then every method in the order asked for.
        identity: digest of everything that all rows depend on.
    """

    metrics: dict[str, str]
    rows: tuple[Row, ...]
    identity: str = ""

    def row(self, method: str) -> Row | None:
        """Return the row of a method.

        Args:
            method: name of a method.

        Returns:
            The row, or None if it is not in the comparison.
        """
        return next((row for row in self.rows if row.method == method), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for JSON.

        Returns:
            The fields, with None where a number is not finite.
        """
        return json_ready(asdict(self))

    def to_markdown(self) -> str:
        """Return the table, and below it what was refused or must be known.

        Returns:
            Markdown.
        """
        tasks = [f"{task} {m} {'↑' if METRICS[m].higher else '↓'}" for task, m in self.metrics.items()]
        head = ["method", "scale", *tasks, "mean", "preparation, s", "optimisation, s", "search, s", "memory, MiB"]
        lines = [_line(head), "| --- " * len(head) + "|", *(_line(self._cells(row)) for row in self.rows)]
        notes = [f"- {row.method} is refused: {row.refused}" for row in self.rows if row.refused]
        notes += [f"- {row.method}: {note}" for row in self.rows for note in row.notes]
        return "\n".join([*lines, "", ABOUT, *([""] if notes else []), *notes]) + "\n"

    def write(self, folder: Path) -> None:
        """Write JSON, table and figure; the JSON is replaced atomically.

        Args:
            folder: an existing folder.
        """
        partial = folder / f"{JSON}.partial"
        partial.write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(partial, folder / JSON)
        (folder / TABLE).write_text(self.to_markdown(), encoding="utf-8")
        draw_table(folder / PICTURE, self)

    @classmethod
    def read(cls, file: Path) -> Comparison:
        """Read a comparison from its JSON.

        Args:
            file: a file that ``write`` wrote.

        Returns:
            The comparison.

        Raises:
            NSCError: if it cannot be read.
        """
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            rows = tuple(_row(row) for row in told["rows"])
            return cls(told["metrics"], rows, told["identity"])
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise NSCError(f"{file} is not a comparison that can be resumed ({error}); remove it") from error

    def _cells(self, row: Row) -> list[str]:
        if row.refused:
            return [row.method, "", *[""] * len(self.metrics), "refused", *[""] * 4]
        scores = [f"{row.scores[t]:.3f} ({_percent(row.shares[t])})" for t in self.metrics]
        seconds = [f"{x:.1f}" if x else "" for x in (row.preparation, row.optimisation, row.search)]
        scale = "" if row.scale is None else f"{row.scale:g}"
        memory = "" if row.memory is None else f"{row.memory / 2**20:.0f}"
        return [row.method, scale, *scores, f"**{_percent(row.mean)}**", *seconds, memory]


def scored(row: Row, scores: Mapping[str, float], alone: Mapping[str, float], metrics: Mapping[str, str]) -> Row:
    """Complete a row with its scores, their shares of fine-tuned, and the mean over tasks.

    A task whose adapter alone has no share of anything is left out of every mean, and a note says so.

    Args:
        row: row of a method, without scores.
        scores: task -> metric of the merged model.
        alone: task -> metric of the adapter alone.
        metrics: task -> one of METRICS.

    Returns:
        The complete row.
    """
    percents = {t: normalised(scores[t], alone[t], METRICS[m].higher) for t, m in metrics.items()}
    counted = [t for t, m in metrics.items() if not math.isnan(normalised(alone[t], alone[t], METRICS[m].higher)[0])]
    mean = sum(percents[t][0] for t in counted) / len(counted) if counted else math.nan
    notes = tuple(
        f"{t} has no share of fine-tuned: {why}{'' if t in counted else '; it is in no mean'}"
        for t, (_, why) in percents.items()
        if why
    )
    shares = {t: share for t, (share, _) in percents.items()}
    return replace(row, scores=dict(scores), shares=shares, mean=mean, notes=row.notes + notes)


def draw_table(path: Path, comparison: Comparison) -> None:
    """Draw the mean of each method as a bar, best at the top, and each task as a dot.

    Args:
        path: PNG file to write.
        comparison: what is drawn.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if row.method != ALONE and not row.refused and not math.isnan(row.mean)]
    rows.sort(key=lambda row: row.mean)
    figure = Figure(figsize=(8, 1.6 + 0.28 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    names = [row.method if row.scale is None else f"{row.method} x {row.scale:g}" for row in rows]
    colours = ["0.75" if row.method == BARE else "tab:blue" for row in rows]
    axes.barh(range(len(rows)), [row.mean for row in rows], color=colours, alpha=0.6)
    for task in comparison.metrics:
        axes.scatter([row.shares[task] for row in rows], range(len(rows)), s=12, label=task, zorder=3)
    axes.axvline(100, color="0.3", lw=0.8)
    axes.set_yticks(range(len(rows)), names, fontsize=8, parse_math=False)
    axes.set_xlabel("percent of fine-tuned: bars the mean, dots the tasks", fontsize=9)
    if rows:
        axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def _row(told: Mapping[str, Any]) -> Row:
    numbers = {key: math.nan if told[key] is None else told[key] for key in ("mean",)}
    tables = {key: {t: math.nan if x is None else x for t, x in told[key].items()} for key in ("scores", "shares")}
    curve = {float(scale): math.nan if x is None else x for scale, x in told["curve"].items()}
    return Row(**{**told, **numbers, **tables, "curve": curve, "notes": tuple(told["notes"])})


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{share:.1f} %"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
