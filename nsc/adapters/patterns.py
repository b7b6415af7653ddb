"""Regular expressions of an adapter's config on module names: by the rules of PEFT, and never without end."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import regex  # in the syntax of re, and can be stopped

SECONDS = 0.5  # for one name; a sound pattern takes microseconds


def pattern_matches(pattern: str, name: str) -> bool:
    """Say whether a pattern matches a name from its beginning, as ``re.match`` does.

    Args:
        pattern: regular expression.
        name: module name.

    Returns:
        Whether it matches.

    Raises:
        ValueError: if it is no regular expression, or takes longer than SECONDS.
    """
    try:
        return _compiled(pattern).match(name, timeout=SECONDS) is not None
    except TimeoutError:
        raise ValueError(f"pattern {pattern[:80]!r} takes longer than {SECONDS} s on {name[:80]!r}") from None


@lru_cache(maxsize=1 << 14)
def _compiled(pattern: str) -> Any:
    try:
        re.compile(pattern)  # what PEFT could not read either
        return regex.compile(pattern)
    except Exception as error:  # RecursionError, OverflowError and others beside re.error
        raise ValueError(f"pattern {pattern[:80]!r} is no regular expression ({error})") from error
