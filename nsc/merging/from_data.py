"""A merge by coefficients that are learned from unlabeled rows."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import Tensor

from nsc.adapters.lora import Adapter, base_warnings, fingerprint, read_adapters
from nsc.adapters.surgery import choose_plans, merged_layers
from nsc.bases.base_model import Base
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.console import printer
from nsc.data.modalities import feed_of
from nsc.data.sources import Source, place_of, read_data
from nsc.evaluation.start import find_start, started
from nsc.export.record import Record
from nsc.export.result import MergeResult
from nsc.learning.coefficients import starts
from nsc.learning.loop import Learned
from nsc.learning.passes import in_passes, own_share
from nsc.learning.preparation import Problem, prepare, stack_on
from nsc.learning.ratios import NullSpaceRatio
from nsc.merging.report_builder import describe_merge, kept_by_tasks
from nsc.recipes.merged_factors import factors_to_fit
from nsc.recipes.updates import Merged, fitted
from nsc.runtime.distributed import Team, join
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shards_of

# Settings that do not change the path of the coefficients.
FREE_OF_PATH = {
    "evaluation_samples",
    "tokens_per_pass",
    "layers",
    "gradient_checkpointing",
    "graphs",
    "device_map",
    "shard",
    "start_from",  # but for what is there, which is one of the adapters
}


def merge_by_learning(
    base: Base,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    config: MergeConfig,
    name: str,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> MergeResult:
    """Learn one coefficient per layer and task, or as ``config`` says, from unlabeled rows.

    Args:
        base: the base; its weights need not be loaded.
        adapters: task -> PEFT folder or Hub id.
        data: task -> what the base's feed reads.
        config: all settings of learning.
        name: one of LEARNED, the kind of learning.
        checkpoint: file that keeps the state meanwhile.
        resume: whether to go on from it.
        progress: whether to show lines and a bar.

    Returns:
        The merge in memory, by the sum of the updates times their coefficients.

    Raises:
        NSCError: a subclass that says what is wrong and where.
    """
    read, config = read_adapters(adapters), find_start(config)
    samples = read_data(data, read, feed_of(base).read, config.unseen)
    team = join(config.device)
    say = printer(progress and team.first)
    base, matched = stack_on(base, read, config, team)
    begun = started(base, matched, samples, config, say)
    factors = factors_to_fit(begun.matched.stack, config)
    problem = prepare(base, begun.matched, begun.samples, config, factors, team)
    first_step = problem.batches(0)
    _tell(problem, matched.adapters, samples, first_step, say)
    identity = _identity(base.id, begun.matched.adapters, samples, problem.targets, config)
    evaluation = _own_evaluation(problem, first_step, identity, team)
    if problem.factors:
        before = _ratios_of(problem, fitted(problem.stack, problem.factors))
    else:
        before = problem.ratios(evaluation, starts(problem.stack, config), team)
    learned = problem.learn(checkpoint=checkpoint, resume=resume, identity=identity, progress=progress, team=team)
    fixed = fitted(problem.stack, learned.factors) if learned.factors else None
    coefficients = None if fixed else learned.coefficients
    after = problem.ratios(evaluation, learned.coefficients, team) if fixed is None else _ratios_of(problem, fixed)
    record = Record.of(
        base.id,
        name,
        matched,
        read,
        coefficients,
        config,
        data={task: place_of(rows) for task, rows in data.items()},
        targets=problem.targets,
        factors=fixed.factors if fixed else {},
        started=begun.told,
        start_factors=begun.factors,
    )
    report = _report(problem, learned, coefficients, before, after, name, read)
    return MergeResult(
        coefficients,
        replace(report, started=begun.told, heads=kept_by_tasks(matched.adapters)),
        record,
        matched.adapters,
        problem.stack,
        base.model if config.whole_base else None,
        first_step[0],
        fixed=fixed,
    )


def _ratios_of(problem: Problem, merged: Merged) -> Tensor:
    """(T, K) null-space ratios of any merge."""
    model, device = problem.base.model, input_device(problem.base.model)
    ratio = NullSpaceRatio(problem.stack, problem.targets, problem.evaluation, device)
    stack, lam = merged.in_model()
    with merged_layers(model, stack, lam.to(device)):
        return ratio.table(model)


def _tell(
    problem: Problem,
    adapters: Mapping[str, Adapter],
    samples: Mapping[str, Any],
    first_step: list[Batch],
    say: Callable[[str], Any],
) -> None:
    """Say what was decided, before anything is learned."""
    stack, targets = problem.stack, problem.targets
    if stack.dense:
        say(f"fine-tuned whole, merged as differences: {', '.join(stack.dense)}")
    measured = f"measured at {len(targets)}: {', '.join(targets)}"
    say(f"base {problem.base.id}: {len(stack.modules)} modules carry LoRA; {measured}")
    if problem.by_states:
        say(f"without an output, matched by pooled states: {', '.join(problem.by_states)}")
    for task, adapter in adapters.items():
        say(f"adapter {task}: {len(adapter.factors)} modules matched, {len(samples[task])} unlabeled samples")
    tokens = sum(batch.tokens for batch in first_step)
    plans = choose_plans(problem.base.model, stack, problem.config.layers, tokens)
    counted = ", ".join(f"{n} by {plan}" for plan, n in Counter(plans.values()).items())
    say(f"layers: {counted}; {'samples share rows' if problem.batches.shares_rows else 'one sample a row'}")


def _own_evaluation(problem: Problem, first_step: list[Batch], identity: str, team: Team) -> list[Batch]:
    """This rank's rows for the ratios before and after, in passes of no more tokens than a step has.

    Raises NSCError where the ranks do not all see the same adapters, rows and settings.
    """
    limit = problem.config.tokens_per_pass or sum(batch.tokens for batch in first_step)
    evaluation = in_passes(problem.evaluation, limit)
    shapes = [tuple(batch.task.shape) for batch in (*first_step, *evaluation)]
    team.require_same((identity, problem.config.to_dict(), shapes), "base, adapters, data or settings")
    shards = shards_of(problem.base.model)
    evaluation = own_share(evaluation, team, shards)
    return shards.even(evaluation) if shards else evaluation


def _report(
    problem: Problem,
    learned: Learned,
    coefficients: Tensor | None,
    before: Tensor,
    after: Tensor,
    name: str,
    read: Mapping[str, Adapter],
) -> Any:
    report = describe_merge(
        problem.base.id, problem.stack, problem.targets, learned, coefficients, before, after, problem.config, name
    )
    warnings = report.warnings + list(problem.warnings) + base_warnings(problem.base.id, read)
    return replace(report, by_states=problem.by_states, warnings=warnings)


def _identity(
    base: str, adapters: Mapping[str, Adapter], samples: Mapping[str, Any], targets: list[str], config: MergeConfig
) -> str:
    """Everything that the path of the coefficients depends on; how many steps are taken, only where it matters."""
    open_ended = config.schedule == "constant" and not config.needs_outputs  # which are scaled by all rows drawn
    free = FREE_OF_PATH | ({"steps"} if open_ended else set())
    settings = {k: v for k, v in config.to_dict().items() if k not in free}
    parts = [base, {t: fingerprint(a) for t, a in adapters.items()}, samples, targets, settings]
    return hashlib.sha256(json.dumps(parts, default=attrgetter("digest")).encode()).hexdigest()
