"""Scores of merges as shares of what every adapter reaches alone."""

from collections.abc import Mapping

SCALES = (0.2, 0.3, 0.4, 0.6, 0.8)
Scores = dict[str, float]


def mean_share(scores: Scores, alone: Scores) -> float:
    """Mean over tasks of the score relative to the fine-tuned one."""
    return sum(scores[task] / alone[task] for task in alone) / len(alone)


def format_table(alone: Scores, merges: Mapping[str, Scores], metrics: Mapping[str, str]) -> str:
    """Rows: tasks and the mean. Columns: fine-tuned, then each merge with its share of fine-tuned."""
    line = ("{:<12}{:<10}{:>11}" + "{:>18}" * len(merges)).format
    lines = [line("task", "metric", "fine-tuned", *merges)]
    for task, value in alone.items():
        cells = [f"{scores[task]:.3f} ({scores[task] / value:.1%})" for scores in merges.values()]
        lines.append(line(task, metrics[task], f"{value:.3f}", *cells))
    return "\n".join([*lines, line("mean", "", "100.0%", *(f"{mean_share(s, alone):.1%}" for s in merges.values()))])
