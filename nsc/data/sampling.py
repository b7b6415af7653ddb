"""Which samples a step draws."""

from __future__ import annotations

import random


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
    if count == 0:
        return []
    drawn = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        turn, index = divmod(position, count)
        drawn.append(_permutation(f"{key}/{turn}", count)[index])
    return drawn


def _permutation(key: str, count: int) -> list[int]:
    order = list(range(count))
    random.Random(key).shuffle(order)
    return order
