"""The second moments of layers' inputs on unlabeled rows of each task: what a regression is made from.

The inputs of task k come from its expert, the base with adapter k alone, in one fixed pass over all of its rows. A
token weighs what its batch says, and what weighs nothing is left out before anything is computed of it. Layers that
read one tensor share one sum. Layers go in portions, as many as memory holds the sums of, with a sweep over the rows
for each portion; it is solved, and its sums are gone, before the next one begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nsc.adapters.stack import ModuleStack, Stack
from nsc.adapters.surgery import merged_layers, readers, set_coefficients
from nsc.bases.structure import block_of
from nsc.batch import Batch
from nsc.errors import NSCError, TargetError
from nsc.learning.input_sums import InputSums
from nsc.learning.passes import own_share
from nsc.learning.sums import SpanSums, Sums, require_finite
from nsc.learning.watch import LastTargetSeen
from nsc.methods import LowRank
from nsc.methods.inputs import InputMoments, Inputs, SpanMoments
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.memory import free_memory
from nsc.runtime.placement import input_device, is_plain
from nsc.runtime.sharding import weightless
from nsc_kernels import MergedLoRALinear

SHARE = 0.4  # of free memory, for the sums of a group
Rows = Mapping[str, Callable[[], Iterable[Batch]]]  # task -> its batches anew, whose weights add up to one
Solve = Callable[[str, SpanMoments | InputMoments], LowRank]  # name of a layer and its moments -> its update
Note = Callable[[str, Tensor, Tensor], None]  # name of a layer, its inputs (t, d) that count, their weights (t,)


@dataclass(frozen=True)
class Readings:
    """The layers of a model, by what they read.

    Attributes:
        model: the body, as it is.
        stack: the adapters on it.
        inputs: what is collected.
        groups: layers that share one sum, the first of which is listened to, in the order in which they run.
        runs: layer -> how often it runs in a forward.
        weights: layer -> the base's weight, where the unit of a task depends on it.
        tokens: how many tokens of all tasks count.
        team: the processes that share the rows.
    """

    model: nn.Module
    stack: Stack
    inputs: Inputs
    groups: list[list[str]]
    runs: Mapping[str, int]
    weights: Mapping[str, Tensor]
    tokens: int
    team: Team = ALONE

    def sums(self, names: Sequence[str]) -> Sums:
        """Return empty sums of layers that read one tensor.

        Args:
            names: one of ``groups``.

        Returns:
            The sums.
        """
        of = {name: self.stack.modules[name] for name in names}
        return SpanSums(of) if self.inputs.of == "u" else InputSums(of, self.inputs, self.weights, self.tokens)

    def block(self, names: Sequence[str]) -> Any:
        """Return what tells apart groups that may not be collected together.

        Args:
            names: one of ``groups``.

        Returns:
            Its block of the model, where inputs come from behind the merge of those below; else nothing.
        """
        return block_of(self.model, names[0]) if self.inputs.run == "below" else None


@torch.no_grad()
def fit(
    model: nn.Module,
    stack: Stack,
    rows: Rows,
    inputs: Inputs,
    solve: Solve,
    rounds: int = 1,
    tokens: int | None = None,
    budget: int | None = None,
    team: Team = ALONE,
) -> dict[str, LowRank]:
    """Collect the moments of every layer's inputs, and solve each layer as soon as they are known.

    Args:
        model: body of the base, left as it was.
        stack: the adapters on it.
        rows: task -> its batches, on the CPU.
        inputs: what is to be known.
        solve: makes the update of a layer.
        rounds: how often all layers are solved, where inputs come from the merge so far.
        tokens: how many tokens of all tasks count; None to count them.
        budget: bytes of sums that may be held at once; None for ``SHARE`` of the free memory. A group has at least one
            sum.
        team: the processes that share the rows; all find the same.

    Returns:
        Layer -> its update.

    Raises:
        NSCError: a subclass, for a layer that does not run or sees other rows than the batch's, and for inputs that
            are not finite.
    """
    tokens = sum(count_tokens(rows).values()) if tokens is None else tokens
    seen = replace(_readings(model, stack, rows, inputs, tokens), team=team)
    if budget is None:
        budget = -team.most(-int(SHARE * (free_memory(input_device(model)) or 1 << 30)))  # the least of any rank
    merge: dict[str, LowRank] = {}
    for _ in range(rounds):
        found: dict[str, LowRank] = {}
        for groups in _portions(seen, budget):
            here = seen.block(groups[0])
            below = {n: f for n, f in found.items() if seen.block([n]) != here} if inputs.run == "below" else {}
            for name, moments in _collected(seen, groups, rows, below, merge):
                found[name] = solve(name, moments)
        merge = found if inputs.run == "merge" else {}
    return found


@torch.no_grad()
def mean_magnitudes(model: nn.Module, stack: Stack, rows: Rows) -> dict[str, Tensor]:
    """Return how large each layer's inputs are in the base itself, on the rows of all tasks together.

    Args:
        model: body of the base, left as it was.
        stack: the adapters on it, for whose layers it is measured.
        rows: task -> its batches, whose weights add up to one, on the CPU.

    Returns:
        Layer -> (d,) float64 on the CPU: the mean over tasks of the mean |x_i| over the tokens of a task that count.

    Raises:
        NSCError: a subclass, for a layer that does not run or sees other rows than the batch's, and for inputs that
            are not finite.
    """
    seen = _readings(model, stack, rows, Inputs("x"), 0)
    sums: dict[str, Tensor] = {}

    def add(name: str, x: Tensor, weight: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        sums[name] = (weight.to(x) @ x.abs()).double() + sums.get(name, 0)

    for task in stack.tasks:
        for batch in rows[task]():
            _read(seen, [names[0] for names in seen.groups], batch, add)
        for name, total in sums.items():
            require_finite(total, name, task)
    return {name: sums[names[0]].cpu() / len(stack.tasks) for names in seen.groups for name in names}


def count_tokens(rows: Rows) -> dict[str, int]:
    """Count the tokens that weigh anything.

    Args:
        rows: task -> its batches.

    Returns:
        Task -> tokens.
    """
    return {task: sum(int((batch.weight > 0).sum()) for batch in batches()) for task, batches in rows.items()}


def _readings(model: nn.Module, stack: Stack, rows: Rows, inputs: Inputs, tokens: int) -> Readings:
    batch = next(iter(next(iter(rows.values()))())).split(1)[0].to(input_device(model))
    known = dict(model.named_modules())
    layers: dict[str, Any] = {name: known[name] for name in stack.names if name in known}
    groups, runs = readers(model, layers, batch)
    if missing := [name for name in stack.names if not runs.get(name)]:
        raise TargetError(
            f"{', '.join(missing[:3])} never ran in this model's forward, so nothing is known of its inputs"
        )
    if inputs.unit != "output":
        return Readings(model, stack, inputs, groups, runs, {}, tokens)
    if folded := [name for name, layer in layers.items() if not is_plain(layer)]:
        raise NSCError(
            f"{folded[0]} is quantised or offloaded, but this method needs the norms of the experts' weights"
        )
    alone = [[name] for group in groups for name in group]  # each layer has its own unit
    weights = {name: layer.weight for name, layer in layers.items()}
    return Readings(model, stack, inputs, alone, runs, weights, tokens)


def _portions(seen: Readings, budget: int) -> list[list[list[str]]]:
    """Groups of layers that are collected in one sweep."""
    portions: list[list[list[str]]] = []
    left = 0
    for names in seen.groups:
        left -= seen.sums(names).size
        if not portions or left < 0 or seen.block(portions[-1][0]) != seen.block(names):
            portions.append([])
            left = budget - seen.sums(names).size
        portions[-1].append(names)
    return portions


def _collected(
    seen: Readings,
    groups: Sequence[Sequence[str]],
    rows: Rows,
    below: Mapping[str, LowRank],
    merge: Mapping[str, LowRank],
) -> Iterator[tuple[str, SpanMoments | InputMoments]]:
    """The moments of these layers, in one sweep over the rows; below, merge: layers that run as they are so far."""
    sums = {names[0]: seen.sums(names) for names in groups}
    device = input_device(seen.model)
    for k, task in enumerate(seen.stack.tasks):
        lone = _one_expert(seen.stack, k, below, merge)
        alone = torch.tensor([1.0, 0.0], device=device).expand(len(lone.names), 2)
        with merged_layers(seen.model, lone, alone) as layers:
            for batch in _own(rows[task](), seen.team):
                _add_batch(seen, sums, k, batch, layers, alone if merge else None)
        for of in sums.values():
            of.add_up(k, seen.team)
            of.close(k, task)
    for of in sums.values():
        yield from of.moments().items()


def _own(batches: Iterable[Batch], team: Team) -> Iterable[Batch]:
    """This rank's share of a task's rows, or a row that weighs nothing."""
    if team.size == 1:
        return batches
    batches = list(batches)
    return own_share(batches, team) or [weightless(batches[0])]


def _add_batch(
    seen: Readings,
    sums: Mapping[str, Sums],
    k: int,
    batch: Batch,
    layers: dict[str, MergedLoRALinear],
    alone: Tensor | None,
) -> None:
    """Add a batch of task k to the sums; alone: coefficients of the expert, where the merge so far runs after it."""
    expert: dict[str, list[Tensor]] = {name: [] for name in sums}

    def keep(name: str, x: Tensor, weight: Tensor) -> None:
        expert[name].append(x)

    def add(name: str, x: Tensor, weight: Tensor) -> None:
        sums[name].add(k, expert[name].pop(0) if expert[name] else x, x, weight)

    if alone is not None:
        set_coefficients(layers, alone)
        _read(seen, list(sums), batch, keep)
        set_coefficients(layers, alone.flip(1))
    _read(seen, list(sums), batch, add)


def _read(seen: Readings, names: Sequence[str], batch: Batch, note: Note) -> None:
    """One forward, up to the last of these layers; each batch's tokens that count are known before it starts."""
    index = batch.weight.flatten().nonzero()[:, 0]
    weight, tokens, device = batch.weight.flatten()[index], batch.task.numel(), input_device(seen.model)
    left = sum(seen.runs[name] for name in names)

    def listen(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal left
        z = args[0].flatten(0, -2)
        if len(z) != tokens:
            raise TargetError(f"{name} saw {len(z)} rows of a batch of {tokens} tokens, so they have no weights")
        note(name, z[index.to(z.device)], weight.to(z.device))
        left -= 1
        if not left:
            raise LastTargetSeen

    hooks = [seen.model.get_submodule(name).register_forward_pre_hook(partial(listen, name)) for name in names]
    try:
        with suppress(LastTargetSeen):
            seen.model(**batch.to(device).arguments(next(seen.model.parameters()).dtype))
    finally:
        for hook in hooks:
            hook.remove()


def _one_expert(stack: Stack, k: int, below: Mapping[str, LowRank], merge: Mapping[str, LowRank]) -> Stack:
    """Adapter k alone, but for the layers of ``below``, and as a second adapter the merge so far."""
    modules = {}
    for name, module in stack.modules.items():
        ranks = list(module.ranks)
        if name in below:
            B, A, scale = below[name].B, below[name].A, 1.0
        else:
            B, A, scale = module.B.split(ranks, 1)[k], module.A.split(ranks)[k], module.scales[k]
        other = merge.get(name, LowRank(B[:, :0], A[:0]))
        blocks = (A, other.A.to(A)), (B, other.B.to(B))
        modules[name] = ModuleStack(*blocks, (len(A), len(other.A)), (scale, 1.0), (None, None), None)
    return Stack(("expert", "merge"), modules)
