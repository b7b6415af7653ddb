"""What settings of methods have in common to be refused."""

from __future__ import annotations

from nsc.errors import NSCError


def require_fraction(name: str, value: float, zero: bool) -> None:
    """Raise NSCError unless 0 < value <= 1, or 0 <= value < 1 where ``zero`` is the neutral value."""
    if not (0 <= value < 1 if zero else 0 < value <= 1):
        span = "at least 0 and below 1" if zero else "above 0 and at most 1"
        raise NSCError(f"{name} is a fraction {span}, not {value}; percent is not taken: give 0.2 for 20 %")


def require_choice(name: str, value: str | None, choices: tuple[str | None, ...]) -> None:
    """Raise NSCError unless ``value`` is one of them."""
    if value not in choices:
        words = [str(choice) for choice in choices if choice is not None]
        raise NSCError(f"{name} must be {', '.join(words[:-1])} or {words[-1]}, not {value!r}")
