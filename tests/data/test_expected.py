"""What experts say lies where a batch has the samples, weighs one a task, and stays there through cuts and copies."""

from dataclasses import replace

import pytest
import torch

from nsc.batch import Expected
from nsc.data.expected import Output, expected
from nsc.data.images import collate_images
from nsc.data.packing import ROUND, pack, round_up

LENGTHS, TASKS = [3, 17, 9, 4, 11, 2, 8, 1], [0, 0, 0, 1, 1, 2, 2, 2]
WAYS = {
    "rows shared": dict(shares_rows=True),
    "rows shared, few shapes": dict(shares_rows=True, few_shapes=True),
    "buckets": dict(shares_rows=False),
    "buckets, few shapes": dict(shares_rows=False, few_shapes=True),
}
SAMPLES = [[20 * i + j for j in range(n)] for i, n in enumerate(LENGTHS)]  # a token tells its sample and place


def output(i: int) -> Output:
    """Task 0 is read once by classes, task 1 at every token by ids, task 2 over all tokens by a number."""
    task, n = TASKS[i], LENGTHS[i]
    spans = {0: [(n - 1, n)], 1: [(j, j + 1) for j in range(n)], 2: [(0, n)]}[task]
    wide = {0: 3, 1: 5, 2: 1}[task]
    values = 100.0 * i + torch.arange(len(spans) * wide, dtype=torch.float64).view(-1, wide)
    return Output(spans, values, values.long() if task == 1 else None)


OUTPUTS = [output(i) for i in range(len(LENGTHS))]


def packed(**how):
    return pack(SAMPLES, TASKS, 999, causal=True, outputs=OUTPUTS, **how)


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_each_place_reads_its_sample(how):
    seen = []
    for batch in packed(**how):
        there, ids = batch.expected, batch.inputs["input_ids"]
        for r, p in (there.weight > 0).nonzero().tolist():
            start, stop = int(there.start[r, p]), int(there.stop[r, p])
            i, first = divmod(int(ids[r, start]), 20)
            assert ids[r, start:stop].tolist() == SAMPLES[i][first : first + stop - start]
            place = OUTPUTS[i].spans.index((first, first + stop - start))
            wide = OUTPUTS[i].values.shape[1]
            assert int(there.task[r, p]) == TASKS[i]
            assert torch.equal(there.values[r, p, :wide], OUTPUTS[i].values[place])
            assert not there.values[r, p, wide:].any()
            if TASKS[i] == 1:
                assert torch.equal(there.ids[r, p], OUTPUTS[i].ids[place])
            seen.append((i, place))
    assert sorted(seen) == [(i, place) for i, o in enumerate(OUTPUTS) for place in range(len(o.spans))]


@pytest.mark.parametrize("how", WAYS.values(), ids=WAYS)
def test_weights_are_one_a_task_and_none_on_padding(how):
    """Each sample weighs the same within its task, each of its places the same; shapes and tokens are as without."""
    total, batches = torch.zeros(3, dtype=torch.float64), packed(**how)
    for batch, bare in zip(batches, pack(SAMPLES, TASKS, 999, causal=True, **how), strict=True):
        there = batch.expected
        assert there.weight.dtype == there.values.dtype == torch.float64
        assert len(there.start) == len(batch.task) and (there.stop <= batch.task.shape[1]).all()
        total.index_add_(0, there.task.flatten(), there.weight.flatten())
        blank = there.weight == 0
        assert not there.values[blank].any() and not there.start[blank].any() and not there.stop[blank].any()
        for name, tensor in bare.tensors().items():
            assert torch.equal(batch.tensors()[name], tensor)
        if how.get("few_shapes"):
            assert there.start.shape[1] == round_up(there.start.shape[1], ROUND)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-15)
    counts = {i: TASKS.count(TASKS[i]) * len(OUTPUTS[i].spans) for i in range(len(TASKS))}
    weights = torch.cat([b.expected.weight[b.expected.weight > 0] for b in batches]).sort().values
    wanted = sorted(1 / counts[i] for i in counts for _ in OUTPUTS[i].spans)
    torch.testing.assert_close(weights, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=1e-15)


def test_rows_of_padding_expect_nothing():
    """Few shapes put whole rows of padding below: eleven rows become twelve."""
    lengths = [32] * 10 + [8] * 4
    samples, outputs = [[1] * n for n in lengths], [Output([(0, 1)], torch.ones(1, 2)) for _ in lengths]
    how = dict(causal=True, shares_rows=True, few_shapes=True)
    (batch,) = pack(samples, [0] * 14, 0, outputs=outputs, **how)
    alone = batch.weight.sum(1) == 0
    assert batch.task.shape == (12, 32) and alone.sum() == 1 and batch.expected.start.shape == (12, 4)
    assert not batch.expected.weight[alone].any() and not batch.expected.values[alone].any()
    assert int((batch.expected.weight > 0).sum()) == 14
    assert batch.expected.weight.sum().item() == pytest.approx(1)


def test_cut_moved_and_named_with_the_batch():
    (batch,) = packed(shares_rows=True)
    parts = batch.split(2)
    for name in ("start", "stop", "task", "weight", "values", "ids"):
        whole = getattr(batch.expected, name)
        assert torch.equal(torch.cat([getattr(part.expected, name) for part in parts]), whole)
        assert batch.tensors()[f"expected.{name}"] is whole
    bare = replace(batch, expected=batch.expected._replace(ids=None))
    assert "expected.ids" not in bare.tensors() and bare.to(torch.device("cpu")).expected.ids is None
    assert isinstance(bare.split(1)[0].expected, Expected)
    assert not [name for name in replace(batch, expected=None).tensors() if name.startswith("expected")]


def test_images_expect_one_output_each():
    outputs = [Output([(0, 1)], torch.full((1, n), float(n))) for n in (4, 4, 2)]
    batch = collate_images([torch.zeros(3, 4, 4)] * 3, [0, 0, 2], 5, outputs)
    there = batch.expected
    assert there.weight.tolist() == [[0.5], [0.5], [1.0]] and there.task.tolist() == [[0], [0], [2]]
    assert there.values.tolist() == [[[4.0] * 4], [[4.0] * 4], [[2.0, 2.0, 0.0, 0.0]]] and there.ids is None
    assert batch.task.shape == (3, 5)


def test_a_row_may_have_room_for_more_places():
    there = expected([[0]], {0: 2}, [1], [Output([(0, 3)], torch.ones(1, 2))], torch.tensor([0, 4]), (2, 3))
    assert there.start.tolist() == [[2, 0, 0], [0, 0, 0]] and there.stop.tolist() == [[5, 0, 0], [0, 0, 0]]
    assert there.weight.tolist() == [[0.25, 0, 0], [0, 0, 0]] and there.values.shape == (2, 3, 2)
