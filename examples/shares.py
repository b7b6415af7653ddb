"""Scores of merges as shares of what every adapter reaches alone, and the plain sum at its best single scale."""

from collections.abc import Callable, Mapping, Sequence

SCALES = (0.2, 0.3, 0.4, 0.6, 0.8)
Scores = dict[str, float]


def mean_share(scores: Scores, alone: Scores) -> float:
    """Return the mean over tasks of the score relative to the fine-tuned one."""
    return sum(scores[task] / alone[task] for task in alone) / len(alone)


def best_sum(score: Callable[[float], Scores], alone: Scores, scales: Sequence[float] = SCALES) -> tuple[str, Scores]:
    """Score the plain sum at each of these scales, print what it reaches, and return the best one's name and scores.

    The scale is chosen on the very rows that are scored: more than a merge without labels is given.
    """
    sums = {}
    for scale in scales:
        sums[scale] = score(scale)
        print(f"plain sum x {scale:g}: {mean_share(sums[scale], alone):.1%} of fine-tuned", flush=True)
    best = max(sums, key=lambda scale: mean_share(sums[scale], alone))
    return f"sum x {best:g}", sums[best]


def format_table(alone: Scores, merges: Mapping[str, Scores], metrics: Mapping[str, str]) -> str:
    """Return a table with a row for each task and the mean, a column for fine-tuned and each merge with its share."""
    line = ("{:<12}{:<10}{:>11}" + "{:>18}" * len(merges)).format
    lines = [line("task", "metric", "fine-tuned", *merges)]
    for task, value in alone.items():
        cells = [f"{scores[task]:.3f} ({scores[task] / value:.1%})" for scores in merges.values()]
        lines.append(line(task, metrics[task], f"{value:.3f}", *cells))
    return "\n".join([*lines, line("mean", "", "100.0%", *(f"{mean_share(s, alone):.1%}" for s in merges.values()))])
