"""The main job: adapters and unlabeled rows in, a proven merge out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nsc.adapters.lora import Adapter, base_warnings, fingerprint, read_adapters
from nsc.adapters.matching import fit
from nsc.adapters.stack import whitened
from nsc.adapters.surgery import choose_plans
from nsc.bases import loading
from nsc.config import MergeConfig
from nsc.console import printer
from nsc.data.modalities import feed_of
from nsc.data.sources import Source, place_of, read_data
from nsc.errors import NSCError
from nsc.export.record import Record
from nsc.export.result import MergeResult
from nsc.learning.entropy import entropy_of
from nsc.learning.generation import batches_of
from nsc.learning.loop import goal_of, learn
from nsc.learning.passes import own_share
from nsc.learning.ratios import mean_ratios
from nsc.merging.report_builder import describe_merge
from nsc.paths import absolute
from nsc.runtime.distributed import Team, join
from nsc.runtime.sharding import shard_linears, shards_of


def learn_coefficients(
    base: str | Path, adapters: Mapping[str, str | Path], data: Mapping[str, Source], config: MergeConfig, name: str,
    checkpoint: Path | None, resume: bool, progress: bool,
) -> MergeResult:  # fmt: skip
    """The merge by learned coefficients, of which ``name`` in LEARNED has the kind."""
    read = read_adapters(adapters)
    base = absolute(base)
    samples = read_data(data, read, feed_of(base).read, config.unseen)
    team = join(config.device)
    model = _load(base, config, team)
    fitted = fit(base, model, read, config)
    read, stack, targets = fitted.adapters, fitted.stack, fitted.targets
    if config.shard:
        shard_linears(model, team, loading.one_device(config.device))
    say = printer(progress and team.first)
    if stack.dense:
        say(f"fine-tuned whole, merged as differences: {', '.join(stack.dense)}")
    say(f"base {base}: {len(stack.modules)} modules carry LoRA; measured at {len(targets)}: {', '.join(targets)}")
    for task, adapter in read.items():
        say(f"adapter {task}: {len(adapter.factors)} modules matched, {len(samples[task])} unlabeled samples")
    batches, evaluation = batches_of(base, model, stack, targets, samples, config)
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
    before = mean_ratios(model, lean, targets, evaluation, start, team, goal)
    learned = learn(
        model, lean, targets, batches, config, checkpoint=checkpoint, resume=resume,
        identity=identity, progress=progress, team=team, entropy=entropy,
    )  # fmt: skip
    after = mean_ratios(model, lean, targets, evaluation, learned.coefficients, team, goal)
    report = describe_merge(base, stack, targets, learned, before, after, config, name)
    report = replace(report, warnings=report.warnings + base_warnings(base, read))
    sources = {task: place_of(rows) for task, rows in data.items()}
    record = Record.of(base, name, fitted, read, learned.coefficients, config, data=sources)
    sample, in_full = first_step[0], model if config.whole_base else None
    return MergeResult(learned.coefficients, report, record, read, stack, in_full, sample)


def _load(base: str, config: MergeConfig, team: Team) -> nn.Module:
    """The base to learn on; one that is to be sharded is on the CPU. Raises NSCError where it cannot be as asked."""
    if config.device_map and team.size > 1:
        raise NSCError("device_map spreads one process over all devices; start it without torchrun, or give shard")
    device = "cpu" if config.shard else config.device
    return loading.load_body(base, config.dtype, device, config.weights, config.device_map)


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
