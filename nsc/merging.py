"""The main job: adapters and unlabeled rows in, a proven merge out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc import families
from nsc.adapters import Adapter, read_adapter
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.dense import Body, dense_stacks, parameters_of, split_saved
from nsc.distributed import Team, join
from nsc.entropy import entropy_of
from nsc.errors import DataError, NSCError
from nsc.feeds import feed_of
from nsc.fitting import fit, match_adapters
from nsc.generation import generator
from nsc.learn import goal_of, learn, printer, require_finite_ratios
from nsc.names import layout
from nsc.objective import Goal, NullSpaceObjective
from nsc.passes import own_share
from nsc.places import input_device
from nsc.record import Record
from nsc.report import describe_merge, describe_stack
from nsc.result import MergeResult
from nsc.sharding import shard_linears, shards_of
from nsc.stack import Stack, by_rank, stack_adapters, whitened
from nsc.surgery import choose_plans, merged_layers

Source = str | Path | Sequence[Any]


def merge(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    config: MergeConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> MergeResult:
    """Learn one coefficient per layer and task for merging ``adapters`` on ``base``, from unlabeled ``data``.

    base: folder or Hub id.  adapters: task -> PEFT folder or Hub id.  data: task -> what ``read_texts`` takes (JSONL or
    text file, ``hub:`` dataset, texts), or ``read_images`` (folder, parquet file, ``hub:`` dataset, images) where the
    base takes images.  settings: fields of MergeConfig, instead of ``config``.  checkpoint: a file that keeps the state
    while learning; with ``resume`` the run goes on from it. Under torchrun or accelerate launch the processes share
    each step and all return the same; the first one alone prints, keeps the checkpoint and should save. Raises a
    subclass of NSCError that says what is wrong and where.
    """
    config = replace(config or MergeConfig(), **settings) if settings else config or MergeConfig()
    read = read_adapters(adapters)
    base = _absolute(base)
    feed = feed_of(base)
    samples = read_data(data, read, feed.read, config.unseen)
    team = join(config.device)
    model = _load(base, config, team)
    read, matches, shapes, stack, targets = fit(base, model, read, config)
    if config.shard:
        shard_linears(model, team, families.one_device(config.device))
    say = printer(progress and team.first)
    if stack.dense:
        say(f"fine-tuned whole, merged as differences: {', '.join(stack.dense)}")
    say(f"base {base}: {len(stack.modules)} modules carry LoRA; measured at {len(targets)}: {', '.join(targets)}")
    for task, adapter in read.items():
        say(f"adapter {task}: {len(adapter.factors)} modules matched, {len(samples[task])} unlabeled samples")
    continues = [] if config.positions == "prompt" else [generator(base, model, stack, config)]
    batches, evaluation = feed.batches(base, model, targets, samples, config, *continues)
    sure = config.objective == "null-space"
    entropy = None if sure else entropy_of(base, model, read, config.positions, config.unseen, config.reduction)
    first_step = batches(0)
    tokens = sum(batch.tokens for batch in first_step)
    limit = config.tokens_per_pass or tokens  # no more memory than a step
    evaluation = [part for batch in evaluation for part in batch.within(limit)]
    plans = choose_plans(model, stack, config.layers, tokens)
    counted = ", ".join(f"{n} by {plan}" for plan, n in Counter(plans.values()).items())
    say(f"layers: {counted}; {'samples share rows' if batches.shares_rows else 'one sample a row'}")
    identity = _identity(base, read, samples, targets, config)
    shapes_seen = [tuple(batch.task.shape) for batch in (*first_step, *evaluation)]
    team.require_same((identity, config.to_dict(), shapes_seen), "base, adapters, data or settings")
    lean = whitened(stack)
    start = torch.full(stack.owned.shape, config.start)
    shards = shards_of(model)
    evaluation = own_share(evaluation, team, shards)
    evaluation = shards.even(evaluation) if shards else evaluation
    goal = goal_of(stack.tasks, config, entropy)
    before = _ratios(model, lean, targets, evaluation, start, team, goal)
    learned = learn(
        model, lean, targets, batches, config, checkpoint=Path(checkpoint) if checkpoint else None, resume=resume,
        identity=identity, progress=progress, team=team, entropy=entropy,
    )  # fmt: skip
    after = _ratios(model, lean, targets, evaluation, learned.coefficients, team, goal)
    report = describe_merge(base, stack, targets, learned, before, after, config)
    report = replace(report, warnings=report.warnings + _base_warnings(base, read))
    record = _record(base, read, matches, stack, shapes, learned.coefficients, data, targets, config)
    say(report.summary())
    sample, in_full = first_step[0], model if config.whole_base else None
    return MergeResult(learned.coefficients, report, record, read, stack, in_full, sample)


def apply(
    folder: str | Path, *, adapters: Mapping[str, str | Path] | None = None, base: str | Path | None = None
) -> MergeResult:
    """The merge that ``folder`` records, without learning. The base's weights are read only to save the full model.

    adapters: where a task's adapter lies now, if it moved.  base: likewise. Raises NSCError if an adapter is not the
    one that was merged.
    """
    record = Record.read(Path(folder))
    moved = dict(adapters or {})
    unknown = sorted(set(moved) - set(record.adapters))
    if unknown:
        raise NSCError(f"the record has no task {', '.join(unknown)}; it has {', '.join(record.adapters)}")
    record = replace(record, base=_absolute(base) if base else record.base)
    read = read_adapters({task: moved.get(task, entry["path"]) for task, entry in record.adapters.items()})
    for task, adapter in read.items():
        if fingerprint(adapter) != record.adapters[task]["fingerprint"]:
            raise NSCError(
                f"adapter {task} at {adapter.path} is not the one that was merged: its weights or scale have changed"
                " since; find the original, or merge anew"
            )
    matches = match_adapters(read, record.modules)
    body = Body(record.modules, record.dense)
    read, whole = split_saved(read, matches, body, record.settings.get("keep_modules", ()))
    stack = stack_adapters(read, matches, record.modules, dense_stacks(record.base, whole))
    stack = by_rank(stack) if record.settings.get("granularity") == "rank" else stack
    if record.coefficients.shape != stack.owned.shape:
        raise NSCError(
            f"{folder} records coefficients {tuple(record.coefficients.shape)}, but these adapters take"
            f" {tuple(stack.owned.shape)}; it is damaged, so merge anew"
        )
    report = describe_stack(record.base, stack, record.coefficients, record.start)
    return MergeResult(record.coefficients, report, record, read, stack)


def read_adapters(adapters: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Every adapter by task. Raises NSCError if there is none, or for a task that cannot name a file."""
    if not adapters:
        raise NSCError("no adapter given; a merge needs at least one")
    for task in adapters:
        if not task or "/" in task or "\\" in task:
            raise NSCError(f"task name {task!r} must do as a file name: not empty, without / and \\")
    return {task: read_adapter(path, task) for task, path in adapters.items()}


def fingerprint(adapter: Adapter) -> str:
    """Of weights and scales together: either changes the merge."""
    scales = {name: factors.scale for name, factors in sorted(adapter.factors.items())}
    return hashlib.sha256((adapter.sha256 + json.dumps(scales)).encode()).hexdigest()


def _load(base: str, config: MergeConfig, team: Team) -> nn.Module:
    """The base to learn on; one that is to be sharded is on the CPU. Raises NSCError where it cannot be as asked."""
    if config.device_map and team.size > 1:
        raise NSCError("device_map spreads one process over all devices; start it without torchrun, or give shard")
    device = "cpu" if config.shard else config.device
    return families.load_body(base, config.dtype, device, config.weights, config.device_map)


def read_data(
    data: Mapping[str, Source], adapters: Mapping[str, Adapter], read: Callable[[Source], list[Any]],
    unseen: Collection[str] = (),
) -> dict[str, list[Any]]:  # fmt: skip
    """Task -> samples, by ``read``; none for an unseen one.

    Raises DataError where the tasks of both do not agree, or an unseen one is no adapter's or has data.
    """
    missing, extra = sorted(set(adapters) - set(data) - set(unseen)), sorted(set(data) - set(adapters))
    if missing or extra:
        raise DataError(
            f"data and adapters must name the same tasks: no data for {', '.join(missing) or 'none'},"
            f" no adapter for {', '.join(extra) or 'none'}; an adapter without data must be named as unseen"
        )
    if strange := sorted(set(unseen) & set(data) | set(unseen) - set(adapters)):
        raise DataError(f"unseen names {', '.join(strange)}, which must be adapters, and without data")
    if not set(adapters) - set(unseen):
        raise DataError("every task is unseen, so there is nothing to learn from; give data for one at least")
    return {task: [] if task in unseen else read(data[task]) for task in adapters}


def _ratios(
    model: nn.Module, stack: Stack, targets: list[str], batches: Sequence[Batch], lam: Tensor, team: Team,
    goal: Goal,
) -> Tensor:  # fmt: skip
    """(T, K) over the batches of all ranks."""
    device = input_device(model)
    with merged_layers(model, stack, lam.to(device)) as layers:
        objective = NullSpaceObjective(model, layers, stack, targets, goal=goal)
        table = torch.zeros_like(objective.share)
        for batch in batches:
            table += objective.ratios(batch.to(device))
        team.add_up(table)
        require_finite_ratios(objective, table)
        return table.cpu()


def _record(
    base: str, adapters: Mapping[str, Adapter], matches: Mapping[str, Mapping[str, str]], stack: Stack,
    shapes: Mapping[str, tuple[int, int]], coefficients: Tensor, data: Mapping[str, Source], targets: list[str],
    config: MergeConfig,
) -> Record:  # fmt: skip
    prefix = layout(matches.values())
    if prefix is None:
        prefix = max((layout([match]) or "" for match in matches.values()), key=len)
    return Record(
        base=base,
        prefix=prefix,
        start=config.start,
        coefficients=coefficients,
        modules={name: shapes[name] for name in stack.names},
        adapters={t: {"path": str(a.path.resolve()), "fingerprint": fingerprint(a)} for t, a in adapters.items()},
        data={
            t: _absolute(d) if isinstance(d, (str, Path)) else f"{len(d)} samples given in Python"
            for t, d in data.items()
        },
        targets=targets,
        settings=config.to_dict(),
        dense=tuple(parameters_of(stack.dense)),
    )


def _base_warnings(base: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """Bases of one shape cannot be told apart by it, so say when the names disagree."""
    named = {task: Path(adapter.base).name for task, adapter in adapters.items() if adapter.base}
    strange = [f"{task} on {name}" for task, name in named.items() if name != Path(base).name]
    return [f"not trained on {Path(base).name} by their own configs: {', '.join(strange)}"] if strange else []


def _absolute(place: str | Path) -> str:
    """A path that means the same from every folder; Hub names and the like as they are."""
    return str(Path(place).resolve()) if Path(place).exists() else str(place)


def _identity(
    base: str, adapters: Mapping[str, Adapter], samples: Mapping[str, Any], targets: list[str], config: MergeConfig
) -> str:
    """Everything that the path of the coefficients depends on; how many steps are taken, only under a schedule."""
    free = {
        "evaluation_samples",
        "tokens_per_pass",
        "layers",
        "gradient_checkpointing",
        "graphs",
        "device_map",
        "shard",
    }
    free |= {"steps"} if config.schedule == "constant" else set()
    settings = {k: v for k, v in config.to_dict().items() if k not in free}
    parts = [base, {t: fingerprint(a) for t, a in adapters.items()}, samples, targets, settings]
    return hashlib.sha256(json.dumps(parts, default=attrgetter("digest")).encode()).hexdigest()
