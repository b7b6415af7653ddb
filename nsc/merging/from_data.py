"""The main job: adapters and unlabeled rows in, a proven merge out."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.matching import fit, match_adapters
from nsc.adapters.modules_to_save import Body, dense_stacks, split_saved
from nsc.adapters.stack import Stack, by_rank, stack_adapters, whitened
from nsc.adapters.surgery import choose_plans, merged_layers
from nsc.bases import loading
from nsc.batch import Batch
from nsc.config import LEARNED, MergeConfig
from nsc.data.modalities import batches_of, feed_of
from nsc.data.sources import Source, absolute, base_warnings, fingerprint, place_of, read_adapters, read_data
from nsc.errors import NSCError
from nsc.export.record import Record
from nsc.export.result import MergeResult
from nsc.learning.entropy import entropy_of
from nsc.learning.loop import goal_of, learn, printer, require_finite_ratios
from nsc.learning.objective import Goal, NullSpaceObjective
from nsc.learning.passes import own_share
from nsc.merging.from_recipe import Coefficients, Masks, combine, combine_learned, replay, require_weights_of_tasks
from nsc.merging.report_builder import describe_merge, describe_stack
from nsc.merging.tuning import find_scale, read_search, refuse_search
from nsc.recipes.spec import Recipe, read_settings
from nsc.runtime.distributed import Team, join
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shard_linears, shards_of


def merge(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source] | None = None,
    config: MergeConfig | None = None,
    *,
    method: str | Recipe = "nsc",
    search: str = "none",
    validation: Mapping[str, Source] | None = None,
    scales: tuple[float, float] | None = None,
    coefficients: Coefficients = None,
    masks: Masks = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> MergeResult:
    """Merge ``adapters`` on ``base``: learn one coefficient per layer and task from unlabeled ``data``, or by a method.

    base: folder or Hub id.  adapters: task -> PEFT folder or Hub id.  data: task -> what ``read_texts`` takes (JSONL or
    text file, ``hub:`` dataset, texts), or ``read_images`` (folder, parquet file, ``hub:`` dataset, images) where the
    base takes images; not read by a method that learns nothing.  settings: of the method, by default fields of
    MergeConfig, instead of ``config``.  checkpoint: a file that keeps the state while learning; with ``resume`` the run
    goes on from it. Under torchrun or accelerate launch the processes share each step and all return the same; the
    first one alone prints, keeps the checkpoint and should save.

    method: a name that ``nsc methods`` lists, "nsc+NAME" to learn coefficients first and use them as the weights of
    another method, or what ``read_recipe`` read.  coefficients: (M, K), or the folder of an earlier merge, as weights
    of a method that learns nothing.  masks: layer -> (K, p, q) bool, what a method that drops entries at random is to
    keep.

    search: how to find the scale of another method: "null-space" by the ratios of ``evaluation_samples`` rows of
    ``data`` a task, "labels" by the loss on ``validation``, task -> what ``read_labelled`` takes, or "none", by the
    setting ``scale``.  scales: lowest and highest, 0.1 and 1.5 by default. Raises a subclass of NSCError that says what
    is wrong and where.
    """
    data, validation, searches = data or {}, validation or {}, search != "none"
    recipe, name, config = _chosen(method, config, settings, searches)
    scaled = "scale" in settings or (isinstance(method, Recipe) and method.scale != 1)
    refuse_search(search, recipe.label if recipe else name, scaled, config, data, validation, scales)
    chosen = read_search(search, absolute(base), adapters, data, validation, scales)
    say = printer(progress and join(config.device).first)
    if recipe and not recipe.learned:
        if resume:
            raise NSCError(f"method {recipe.label} learns nothing, so there is nothing to resume; leave it out")
        result = combine(absolute(base), adapters, recipe, config, coefficients, masks, searches, say)
        result = find_scale(result, chosen, config, say) if chosen else result
        say(result.report.summary())
        return result
    if coefficients is not None or (masks and not recipe):
        what = "coefficients" if coefficients is not None else "masks"
        raise NSCError(f"{what} are for other methods, such as task-arithmetic or dare; {name} learns its coefficients")
    if recipe:
        require_weights_of_tasks(recipe, config)
    place = Path(checkpoint) if checkpoint else None
    result = _learn(base, adapters, data, config, name, place, resume, progress)
    result = combine_learned(result, recipe, config, masks) if recipe else result
    result = find_scale(result, chosen, config, say) if chosen else result
    say(result.report.summary())
    return result


def _chosen(
    method: str | Recipe, config: MergeConfig | None, settings: Mapping[str, Any], searches: bool
) -> tuple[Recipe | None, str, MergeConfig]:
    """What is made of the adapters, the name of what learns, and its settings, over its own defaults."""
    if isinstance(method, Recipe):
        recipe: Recipe | None = method
        ours = read_settings(method.label, settings, searches)[1]
        if others := sorted(set(settings) - {f.name for f in fields(MergeConfig)}):
            raise NSCError(f"{others[0]} is given beside a recipe, which says all of it; say it there")
    else:
        recipe, ours = read_settings(method, settings, searches)
    name = (recipe.learned or "") if recipe else str(method)
    if config is None:
        return recipe, name, MergeConfig(**{**(LEARNED[name].settings if name else {}), **ours})
    meant = LEARNED[name].settings.get("objective") if name else None
    if meant and config.objective != meant:
        raise NSCError(f"method {name} learns by the objective {meant}, but config says {config.objective}; change one")
    return recipe, name, replace(config, **ours)


def _learn(
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
    before = _ratios(model, lean, targets, evaluation, start, team, goal)
    learned = learn(
        model, lean, targets, batches, config, checkpoint=checkpoint, resume=resume,
        identity=identity, progress=progress, team=team, entropy=entropy,
    )  # fmt: skip
    after = _ratios(model, lean, targets, evaluation, learned.coefficients, team, goal)
    report = describe_merge(base, stack, targets, learned, before, after, config, name)
    report = replace(report, warnings=report.warnings + base_warnings(base, read))
    sources = {task: place_of(rows) for task, rows in data.items()}
    record = Record.of(base, name, fitted, read, learned.coefficients, config, data=sources)
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
    record = replace(record, base=absolute(base) if base else record.base)
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
    lam = record.coefficients
    if lam is not None and lam.shape != stack.owned.shape:
        raise NSCError(
            f"{folder} records coefficients {tuple(lam.shape)}, but these adapters take"
            f" {tuple(stack.owned.shape)}; it is damaged, so merge anew"
        )
    report = describe_stack(record.base, stack, lam, record.start, record.method)
    return replay(MergeResult(lam, report, record, read, stack))


def _load(base: str, config: MergeConfig, team: Team) -> nn.Module:
    """The base to learn on; one that is to be sharded is on the CPU. Raises NSCError where it cannot be as asked."""
    if config.device_map and team.size > 1:
        raise NSCError("device_map spreads one process over all devices; start it without torchrun, or give shard")
    device = "cpu" if config.shard else config.device
    return loading.load_body(base, config.dtype, device, config.weights, config.device_map)


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
