"""SIGINT and SIGTERM, deferred until the state can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def deferred_interrupts() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM, for the caller to act on between two steps.

    A second signal raises KeyboardInterrupt at once. Outside the main thread, where Python allows no handler, nothing
    is noted. The handlers before are restored at the end.

    Yields:
        A list that receives the number of the signal.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield noted
        return

    def note(number: int, _frame: Any) -> None:
        if noted:
            raise KeyboardInterrupt
        noted.append(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield noted
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
