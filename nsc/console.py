"""Numbers with units, and lines beside a progress bar."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm


def metric(value: float, unit: str = "") -> str:
    """Three digits with a metric prefix."""
    power = min(max(math.floor(math.log10(value) / 3), -3), 6) if value > 0 else 0
    return f"{value / 1000**power:.3g} {'nµm kMGTPE'[power + 3].strip()}{unit}".strip()


def printer(wanted: bool) -> Callable[[str], Any]:
    """Says a line beside the progress bar, or nothing."""
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
