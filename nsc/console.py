"""Numbers with units, and lines that do not break a progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm


def metric(value: float, unit: str = "") -> str:
    """Format a number with three digits and a metric prefix.

    Args:
        value: the number, in ``unit``; prefixes run from n (1e-9) to E (1e18).
        unit: what follows the prefix, such as "B" or "FLOP/s".

    Returns:
        Text such as "1.5 GB".
    """
    power = min(max(math.floor(math.log10(value) / 3), -3), 6) if value > 0 else 0
    return f"{value / 1000**power:.3g} {'nµm kMGTPE'[power + 3].strip()}{unit}".strip()


def printer(wanted: bool) -> Callable[[str], Any]:
    """Return a function that reports progress.

    Args:
        wanted: whether it prints at all.

    Returns:
        A function that prints a line to stderr, above the progress bar where there is one, or does nothing.
    """
    return partial(tqdm.write, file=sys.stderr) if wanted else lambda text: None


def json_ready(value: Any) -> Any:
    """Return a value that every JSON parser reads: None where a number is not finite, lists for tuples.

    Args:
        value: mapping, sequence, number or text, nested in any way.

    Returns:
        The same in plain types.
    """
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
