"""Samples of different lengths -> rectangles of tokens with little padding, in which no sample sees another.

Rows hold one sample each where that pads little. Otherwise several share a row, told apart by positions that start anew
and a block-diagonal attention mask; where a model cannot do that, samples of like lengths go together instead. Every
token keeps its task and its weight, so the loss and its gradient are those of one sample at a time.

Where steps are to be replayed, few shapes are worth more than the least padding: rectangles are rounded up to sizes of
few significant bits, as long as padding stays as little.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from nsc.bases.structure import is_causal
from nsc.batch import Batch, Expected
from nsc.data.expected import Output, expected
from nsc.runtime.placement import input_device

MOST_PADDING = 0.1  # of the tokens that are computed
WIDER = 1.2  # how much wider rows are tried next
ROUND, ROWS, FINE = 2, 3, 5  # significant bits: of widths if possible, of how many rows, of widths at most
TRIED = ((5, 7), (9, 1, 40))  # lengths of samples that share a row when a model is tried
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers by the bytes of a float
NEAR = {torch.float64: 1e-6, torch.float32: 1e-3}  # of a packed sample's hidden states, relative; else 0.1


def pack(
    samples: Sequence[Sequence[int]],
    tasks: Sequence[int],
    pad_id: int,
    *,
    causal: bool,
    shares_rows: bool,
    few_shapes: bool = False,
    counted: Sequence[slice] | None = None,
    outputs: Sequence[Output] | None = None,
) -> list[Batch]:
    """Pack samples into batches whose losses and ratios add up to those of all samples.

    Every sample weighs the same within its task, every token the same within its sample, and padding nothing.

    Args:
        samples: token ids of each sample.
        tasks: number of each sample's task.
        pad_id: id of the padding token.
        causal: whether right padding reaches no token.
        shares_rows: whether several samples may share a row.
        few_shapes: whether the shapes should be those of other steps, with up to ``MOST_PADDING`` and rows of padding.
        counted: which tokens of each sample weigh anything; None for all.
        outputs: what the experts say about each sample, if the batches are to hold it.

    Returns:
        Batches on the CPU.
    """
    lengths = [len(ids) for ids in samples]
    alone = [[i] for i in range(len(samples))]
    if padding(lengths, alone, _tight(lengths, alone, few_shapes)) <= MOST_PADDING:
        groups = [(alone, _tight(lengths, alone, few_shapes))]
    elif shares_rows and few_shapes:
        groups = [rows_of_few_shapes(lengths)]
    elif shares_rows:
        rows = shared_rows(lengths)
        groups = [(rows, _tight(lengths, rows))]
    else:
        rows_of = [[[i] for i in bucket] for bucket in buckets(lengths, few_shapes)]
        groups = [(rows, _tight(lengths, rows, few_shapes)) for rows in rows_of]
    counted = counted or [slice(0, n) for n in lengths]
    weights = _sample_weights([part.stop - part.start for part in counted], tasks)
    batches = [_rectangle(samples, tasks, weights, rows, shape, pad_id, causal, counted) for rows, shape in groups]
    if outputs is None:
        return batches
    counts = torch.tensor(list(tasks)).bincount()
    return [
        replace(batch, expected=_expected(rows, lengths, tasks, outputs, counts, shape[0], few_shapes))
        for batch, (rows, shape) in zip(batches, groups, strict=True)
    ]


def _expected(
    rows: Sequence[Sequence[int]],
    lengths: Sequence[int],
    tasks: Sequence[int],
    outputs: Sequence[Output],
    counts: Tensor,
    height: int,
    few_shapes: bool,
) -> Expected:
    """What the experts say about the samples of one rectangle; counts: (K,) samples of each task in all of them."""
    starts = {
        i: start for row in rows for i, start in zip(row, accumulate([0, *(lengths[j] for j in row[:-1])]), strict=True)
    }
    fullest = max(sum(len(outputs[i].spans) for i in row) for row in rows)
    places = round_up(fullest, ROUND) if few_shapes else fullest
    return expected(rows, starts, tasks, outputs, counts, (height, places))


def collate(samples: Sequence[Sequence[int]], tasks: Sequence[int], pad_id: int, causal: bool) -> Batch:
    """Put one sample in each row, padded on the right and weighted as by ``pack``.

    Args:
        samples: token ids of each sample.
        tasks: number of each sample's task.
        pad_id: id of the padding token.
        causal: whether right padding reaches no token, so that no mask is needed.

    Returns:
        One batch on the CPU.
    """
    lengths = [len(ids) for ids in samples]
    rows = [[i] for i in range(len(samples))]
    return _rectangle(samples, tasks, _sample_weights(lengths, tasks), rows, _tight(lengths, rows), pad_id, causal)


def padding(lengths: Sequence[int], rows: Sequence[Sequence[int]], shape: tuple[int, int] | None = None) -> float:
    """Return the share of a rectangle of tokens that is padding.

    Args:
        lengths: length of each sample.
        rows: numbers of the samples in each row.
        shape: (rows, width) of the rectangle; None for what the rows need.

    Returns:
        From 0 to 1.
    """
    height, width = shape or _tight(lengths, rows)
    return 1 - sum(lengths[i] for row in rows for i in row) / (height * width)


def shared_rows(lengths: Sequence[int]) -> list[list[int]]:
    """Distribute samples over the narrowest rows that pad no more than ``MOST_PADDING``.

    Args:
        lengths: length of each sample.

    Returns:
        Numbers of the samples in each row.
    """
    width, rows = max(lengths), _first_fit(lengths, max(lengths))
    while padding(lengths, rows) > MOST_PADDING:
        width = int(width * WIDER) + 1
        rows = _first_fit(lengths, width)
    return rows


def rows_of_few_shapes(lengths: Sequence[int]) -> tuple[list[list[int]], tuple[int, int]]:
    """Distribute samples over rows of the roundest width that pads no more than ``MOST_PADDING``.

    Widths with two significant bits are tried from the longest sample upwards, then with three and so on; five fit.

    Args:
        lengths: length of each sample.

    Returns:
        Numbers of the samples in each row, and (rows, width) of the rectangle.
    """
    for bits in range(ROUND, FINE + 1):
        width, rows = 0, [[0], [0]]
        while len(rows) > 1:
            width = round_up(max(*lengths, width + 1), bits)
            rows = _first_fit(lengths, width)
            shape = round_up(len(rows), ROWS), width
            if padding(lengths, rows, shape) <= MOST_PADDING:
                return rows, shape
    return rows, shape


def round_up(n: int, bits: int) -> int:
    """Round up to a number with few significant bits.

    Args:
        n: a positive number.
        bits: how many leading bits may differ from 0.

    Returns:
        The least such number not below ``n``.
    """
    step = 1 << max(0, n.bit_length() - bits)
    return -(-n // step) * step


def buckets(lengths: Sequence[int], few_shapes: bool = False) -> list[list[int]]:
    """Group samples by length, longest first, so that no bucket is padded beyond ``MOST_PADDING``.

    Args:
        lengths: length of each sample.
        few_shapes: whether buckets are rounded up to shapes that recur.

    Returns:
        Numbers of the samples in each bucket.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rows = [[j] for j in [*found[-1], i]] if found else []
        if found and padding(lengths, rows, _tight(lengths, rows, few_shapes)) <= MOST_PADDING:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def can_share_rows(model: nn.Module) -> bool:
    """Return whether a model keeps samples in one row apart, given positions and a mask; it is tried on random tokens.

    Convolutions, linear attention and state-space layers see no mask, and what they carry from one sample into the next
    may be small beside the states. So no tolerance decides: where one sample of a row is exchanged, the states of the
    others must stay the same to the last bit, behind every module. A mixture of experts whose rounding depends on how
    many tokens an expert gets is refused, too, since that cannot be told from a leak.

    Args:
        model: body of the base.

    Returns:
        True only for causal models with one kind of attention, in an implementation that takes a mask.
    """
    config: Any = model.config
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    window = getattr(config, "use_sliding_window", True) and getattr(config, "sliding_window", None)
    local = window or getattr(config, "attention_chunk_size", None)
    takes_mask = getattr(config, "_attn_implementation", None) in ("sdpa", "eager")
    if not takes_positions or local or not takes_mask or not is_causal(model):
        return False
    longest = getattr(config, "max_position_embeddings", None) or max(map(max, TRIED))
    generator = torch.Generator().manual_seed(0)
    rows = [[torch.randint(config.vocab_size, (min(n, longest),), generator=generator) for n in row] for row in TRIED]
    try:
        with torch.no_grad():
            return _positions_count(model, rows[0]) and all(_kept_apart(model, row, config.vocab_size) for row in rows)
    except (TypeError, ValueError, RuntimeError):
        return False


def _positions_count(model: nn.Module, row: Sequence[Tensor]) -> bool:
    """Whether the last sample of a row has about the states that it has alone; rounding differs with the shape."""
    packed = model(**_one_row(model, row))[0][:, -len(row[-1]) :]
    alone = model(input_ids=row[-1][None].to(input_device(model)))[0]
    return bool((packed - alone).norm() <= NEAR.get(packed.dtype, 0.1) * alone.norm())


def _kept_apart(model: nn.Module, row: Sequence[Tensor], vocabulary: int) -> bool:
    """Whether no sample of a row has any other state, to the last bit, when another one gets other tokens."""
    before = _states(model, row)
    segment = torch.repeat_interleave(torch.tensor([len(ids) for ids in row])).to(before[0].device)
    for i, ids in enumerate(row):
        after = _states(model, [*row[:i], (ids + 1 + ids % (vocabulary - 1)) % vocabulary, *row[i + 1 :]])
        others = segment != i
        if not all(torch.equal(x[others], y[others]) for x, y in zip(before, after, strict=True)):
            return False
    return True


def _states(model: nn.Module, row: Sequence[Tensor]) -> list[Tensor]:
    """(T,) int64 for each module that makes a state of each of the T tokens: the sums of the bits of the states."""
    sums: list[Tensor] = []
    tokens = sum(map(len, row))

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        if isinstance(state, Tensor) and state.shape[:-1] == (1, tokens) and state.is_floating_point():
            sums.append(state.contiguous().view(BITS[state.element_size()]).sum(-1)[0])

    hooks = [module.register_forward_hook(keep) for module in model.modules()]
    try:
        sums.insert(0, model(**_one_row(model, row))[0].contiguous())
    finally:
        for hook in hooks:
            hook.remove()
    sums[0] = sums[0].view(BITS[sums[0].element_size()])[0]
    return sums


def _one_row(model: nn.Module, row: Sequence[Tensor]) -> dict[str, Any]:
    """The arguments of a forward of these samples in one row."""
    samples = [ids.tolist() for ids in row]
    numbers = list(range(len(samples)))
    batch = _rectangle(samples, [0] * len(row), [1.0] * len(row), [numbers], (1, sum(map(len, row))), 0, True)
    return batch.to(input_device(model)).arguments(next(model.parameters()).dtype)


def _tight(lengths: Sequence[int], rows: Sequence[Sequence[int]], rounded: bool = False) -> tuple[int, int]:
    """The shape that these rows need; rounded: in width."""
    width = max(sum(lengths[i] for i in row) for row in rows)
    return len(rows), round_up(width, FINE) if rounded else width


def _first_fit(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Rows of at most ``width`` tokens: longest first, each into the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        place = next((r for r, free in enumerate(room) if free >= lengths[i]), None)
        if place is None:
            rows.append([i])
            room.append(width - lengths[i])
        else:
            rows[place].append(i)
            room[place] -= lengths[i]
    return rows


def _sample_weights(lengths: Sequence[int], tasks: Sequence[int]) -> list[float]:
    """The weight of one token of each sample; lengths: of the tokens that count."""
    return [1 / (length * list(tasks).count(task)) for length, task in zip(lengths, tasks, strict=True)]


def _rectangle(
    samples: Sequence[Sequence[int]],
    tasks: Sequence[int],
    weights: Sequence[float],
    rows: Sequence[Sequence[int]],
    shape: tuple[int, int],
    pad_id: int,
    causal: bool,
    counted: Sequence[slice] | None = None,
) -> Batch:
    """One batch of this shape with these samples in each row, from the left, and rows of padding alone below."""
    ids = torch.full(shape, pad_id)
    task, position = torch.zeros(2, *shape, dtype=torch.int64)
    segment = torch.full(shape, -1)
    weight = torch.zeros(shape)
    for r, row in enumerate(rows):
        start = 0
        task[r] = tasks[row[-1]]
        for i in row:
            here = slice(start, start + len(samples[i]))
            ids[r, here], position[r, here] = torch.tensor(samples[i]), torch.arange(len(samples[i]))
            task[r, here], segment[r, here] = tasks[i], i
            part = counted[i] if counted else slice(0, len(samples[i]))
            weight[r, start + part.start : start + part.stop] = weights[i]
            start = here.stop
    if max(map(len, rows)) > 1:
        return Batch({"input_ids": ids, "position_ids": position}, task, weight, segment)
    inputs = {"input_ids": ids} if causal else {"input_ids": ids, "attention_mask": (segment >= 0).long()}
    return Batch(inputs, task, weight)
