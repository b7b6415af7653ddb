"""Which samples a step draws, its own and borrowed ones."""

import random
from itertools import chain

import pytest

from nsc.data.sampling import borrow, draw, draw_each

ROWS = {"a": [f"a{i}" for i in range(9)], "b": [f"b{i}" for i in range(4)], "none": [], "c": ["c0", "c1"]}


def test_a_task_borrows_what_others_have_and_nothing_of_its_own():
    together, borrowed = borrow(ROWS, 100, 0)
    for task, own in ROWS.items():
        others = [row for other, rows in ROWS.items() if other != task for row in rows]
        assert together[task][: len(own)] == own
        assert sorted(together[task][len(own) :]) == (sorted(others) if own else [])
        assert borrowed[task] == len(together[task]) - len(own)


def test_it_borrows_no_more_than_it_will_draw_and_the_seed_says_which():
    few, borrowed = borrow(ROWS, 3, 0)
    assert borrowed == {"a": 3, "b": 3, "none": 0, "c": 3}
    assert few == borrow(ROWS, 3, 0)[0] != borrow(ROWS, 3, 1)[0]


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_every_second_sample_is_borrowed_and_both_kinds_go_round(batch_size):
    together, borrowed = borrow(ROWS, 100, 0)
    counts = {task: len(rows) for task, rows in together.items()}
    steps = [draw_each(counts, borrowed, batch_size, step, 7) for step in range(24)]
    for task, own in ROWS.items():
        drawn = list(chain.from_iterable(step[task] for step in steps))
        if not own:
            assert drawn == []
            continue
        assert all((i >= len(own)) == bool(place % 2) for place, i in enumerate(drawn))
        for kind, size in ((drawn[::2], len(own)), (drawn[1::2], borrowed[task])):
            assert len(set(kind[:size])) == min(size, len(kind))  # none twice before all were drawn once
        assert set(drawn[::2]) <= set(range(len(own)))


def test_a_permutation_is_that_of_random_and_made_once(monkeypatch):
    """Records say the seed alone, so the draws of a seed stay what they are; and a step costs what it draws."""
    orders = [list(range(50)) for _ in range(2)]
    for turn, order in enumerate(orders):
        random.Random(f"7/a/{turn}").shuffle(order)
    assert list(chain.from_iterable(draw(50, 8, step, "7/a") for step in range(12))) == [*orders[0], *orders[1]][:96]
    draw(1000, 4, 0, "once")
    monkeypatch.setattr(random, "Random", None)  # which nothing asks again
    assert len(set(chain.from_iterable(draw(1000, 4, step, "once") for step in range(250)))) == 1000


def test_without_borrowed_samples_the_draws_are_those_of_the_task_alone():
    counts = {task: len(rows) for task, rows in ROWS.items()}
    assert draw_each(counts, {}, 3, 5, 7) == {task: draw(count, 3, 5, f"7/{task}") for task, count in counts.items()}


def test_a_task_that_borrows_none_still_lends():
    together, borrowed = borrow(ROWS, 100, 0, {"a"})
    assert borrowed == {"a": 0, "b": 11, "none": 0, "c": 13}
    assert together["a"] == ROWS["a"] and set(ROWS["a"]) < set(together["b"])
