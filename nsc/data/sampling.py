"""Which samples a step draws."""

from __future__ import annotations

import random
from array import array
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any


def draw(count: int, batch_size: int, step: int, key: str) -> list[int]:
    """Return which samples a step takes: the next ones of a permutation, which is another each time round.

    Args:
        count: number of samples.
        batch_size: samples of a step.
        step: from 0.
        key: seed of the permutations.

    Returns:
        Numbers of samples.
    """
    return _at(count, range(step * batch_size, (step + 1) * batch_size), key) if count else []


def draw_each(
    counts: Mapping[str, int], borrowed: Mapping[str, int], batch_size: int, step: int, seed: int
) -> dict[str, list[int]]:
    """Return which samples of each task a step takes; every second one is borrowed, where a task has such.

    Args:
        counts: task -> number of its samples.
        borrowed: task -> how many of these, the last ones, are borrowed from other tasks.
        batch_size: samples of each task in a step.
        step: from 0.
        seed: seed of the permutations.

    Returns:
        Task -> numbers of samples.
    """
    drawn = {}
    for task, count in counts.items():
        others, key = borrowed.get(task, 0), f"{seed}/{task}"
        if not others:
            drawn[task] = draw(count, batch_size, step, key)
            continue
        own, places = count - others, range(step * batch_size, (step + 1) * batch_size)
        mine = iter(_at(own, [place // 2 for place in places if place % 2 == 0], key))
        lent = iter(_at(others, [place // 2 for place in places if place % 2], f"{key}/borrowed"))
        drawn[task] = [own + next(lent) if place % 2 else next(mine) for place in places]
    return drawn


def borrow(
    samples: Mapping[str, Sequence[Any]], most: int, seed: int, without: Collection[str] = ()
) -> tuple[dict[str, list[Any]], dict[str, int]]:
    """Give each task with samples some of the other tasks' as well, behind its own.

    Args:
        samples: task -> its samples.
        most: how many a task borrows, at most.
        seed: seed of the choice.
        without: tasks that borrow none.

    Returns:
        Task -> samples, and task -> how many of them, the last ones, are borrowed.
    """
    together, borrowed = {}, {}
    for task, own in samples.items():
        borrows = own and task not in without
        others = [row for other, rows in samples.items() if other != task for row in rows] if borrows else []
        chosen = random.Random(f"{seed}/{task}/borrowed").sample(others, min(most, len(others)))
        together[task], borrowed[task] = [*own, *chosen], len(chosen)
    return together, borrowed


def _at(count: int, positions: Iterable[int], key: str) -> list[int]:
    """The numbers at these positions of the permutations behind one another."""
    places = [divmod(position, count) for position in positions]
    return [_permutation(f"{key}/{turn}", count)[index] for turn, index in places]


@lru_cache(maxsize=128)  # of 4 bytes a sample; a step draws from one or two for each task
def _permutation(key: str, count: int) -> array[int]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return array("I", order)
