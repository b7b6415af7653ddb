"""What all learning begins with: a base that carries the adapters, and the rows, targets and loss of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from nsc.adapters.fused_layers import refuse_experts
from nsc.adapters.lora import Adapter
from nsc.adapters.matching import Matched, match_to_base
from nsc.adapters.stack import Stack, by_rank, whitened
from nsc.adapters.surgery import readers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.llava import refuse_moving_tower, without_images
from nsc.bases.roles import choose_targets
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.modalities import Batches, example_of, feed_of
from nsc.data.sampling import borrow
from nsc.data.text import Pick
from nsc.errors import NSCError
from nsc.learning.agreement import Agreement
from nsc.learning.entropy import Entropy, entropy_of
from nsc.learning.generation import batches_of
from nsc.learning.held_back import HeldBack, hold_back, some_of
from nsc.learning.loop import Learned, learn
from nsc.learning.objective import goal_of
from nsc.learning.passes import in_passes
from nsc.learning.ratios import NullSpaceRatio, mean_ratios
from nsc.learning.teachers import Experts
from nsc.learning.trained_factors import Factors
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.placement import input_device, one_device
from nsc.runtime.sharding import shard_linears

TOKENS = 4096  # of a forward without a backward, where tokens_per_pass does not say
MEASURED = 32  # rows of a task on which merges are compared: with as many, the experts chose what labels chose


@dataclass(frozen=True)
class Problem:
    """One optimisation of coefficients, complete but for how it is run.

    Attributes:
        base: with weights.
        stack: the adapters, with a coefficient for each layer and task, or for each rank row.
        targets: the modules whose inputs are measured.
        batches: step -> the batches whose losses add up.
        evaluation: fixed batches, for the ratios before and after.
        output: entropy of the merged model's output, or its distance from the experts', if it is part of the objective.
        config: the settings that all of this follows.
        held: rows held out to choose the step that is kept, if it is to be chosen.
        factors: layer -> A and B at which fitted factors start, if they are what is learned.
        warnings: what a reader must know.
    """

    base: Base
    stack: Stack
    targets: list[str]
    batches: Batches
    evaluation: list[Batch]
    output: Entropy | Agreement | None
    config: MergeConfig
    held: HeldBack | None = None
    factors: Factors | None = None
    warnings: tuple[str, ...] = ()

    @cached_property
    def lean(self) -> Stack:
        """The stack whitened: the form in which a step is cheapest."""
        return whitened(self.stack)

    @property
    def by_states(self) -> list[str]:
        """Tasks without an output, which are matched by their pooled states."""
        agreement = self.held.agreement if self.held else self.output
        return agreement.by_states(self.stack.tasks) if isinstance(agreement, Agreement) else []

    def learn(self, **running: Any) -> Learned:
        """Learn the coefficients.

        Args:
            running: how, as ``nsc.learning.loop.learn`` takes it: checkpoint, resume, identity, progress, team.

        Returns:
            The coefficients, and what the optimisation did.

        Raises:
            NSCError: a subclass, as ``nsc.learning.loop.learn`` does.
        """
        return learn(
            self.base.model,
            self.lean,
            self.targets,
            self.batches,
            self.config,
            output=self.output,
            held=self.held,
            factors=self.factors,
            **running,
        )

    def ratios(self, batches: Sequence[Batch], coefficients: Tensor, team: Team = ALONE) -> Tensor:
        """Measure the null-space ratios of a merge.

        Args:
            batches: this rank's share of the rows.
            coefficients: (M, C), as the stack has them.
            team: the processes that share the rows.

        Returns:
            (T, K) means over the rows of all ranks: targets by tasks.

        Raises:
            NonFiniteError: naming the targets where a ratio is not finite.
        """
        goal = goal_of(self.stack.tasks, self.config, self.output)
        return mean_ratios(self.base.model, self.lean, self.targets, batches, coefficients, team, goal)


def stack_on(
    base: Base, adapters: Mapping[str, Adapter], config: MergeConfig, team: Team = ALONE
) -> tuple[Base, Matched]:
    """Load a base as ``config`` says, and find the places of the adapters in it.

    Args:
        base: the base; its weights need not be loaded.
        adapters: task -> adapter.
        config: settings, of which dtype, device, weights, device_map, shard and keep_modules are used.
        team: the processes over which a base is split with ``shard``.

    Returns:
        The base with weights, split over the processes where that is asked for, and the adapters on it.

    Raises:
        NSCError: a subclass, where the base cannot be loaded as asked, or an adapter has no place in it.
    """
    if config.device_map and team.size > 1:
        raise NSCError("device_map spreads one process over all devices; start it without torchrun, or give shard")
    device = "cpu" if config.shard else config.device
    base = loading.load(base, config.dtype, device, config.weights, config.device_map)
    matched = match_to_base(base, adapters, config.keep_modules)
    refuse_moving_tower(base.model, matched.stack.names)
    if config.shard:
        shard_linears(base.model, team, one_device(config.device))
    return base, matched


def prepare(
    base: Base,
    matched: Matched,
    samples: Mapping[str, Sequence[Any]],
    config: MergeConfig,
    factors: Factors | None = None,
    team: Team = ALONE,
) -> Problem:
    """Put together what is learned from these rows: targets, batches and loss.

    Args:
        base: with weights, as ``stack_on`` gives it.
        matched: the adapters on it.
        samples: task -> what its feed read.
        config: granularity, targets, rows and objective.
        factors: layer -> A (r, d), B (m, r) at which fitted factors start, for the granularity "factors".
        team: the processes that ask the experts together.

    Returns:
        The problem, of which nothing has run but what answers prompts, where generated positions count.

    Raises:
        NSCError: a subclass, for targets, rows or heads that do not go together.
    """
    stack = by_rank(matched.stack) if config.granularity == "rank" else matched.stack
    refuse_experts(base.model, stack.names, "learning")
    targets = targets_of(base, stack, config.target_modules, config.target_blocks)
    if config.needs_outputs:
        return replace(_with_experts(base, matched, stack, targets, samples, config, team), factors=factors)
    batches, evaluation = batches_of(base, stack, targets, samples, config)
    output = entropy_in(base, matched, config) if config.needs_entropy else None
    return Problem(base, stack, targets, batches, evaluation, output, config)


def _with_experts(
    base: Base,
    matched: Matched,
    stack: Stack,
    targets: list[str],
    samples: Mapping[str, Sequence[Any]],
    config: MergeConfig,
    team: Team,
) -> Problem:
    """The problem where the experts' outputs are learned from, or choose the step that is kept."""
    rest, held, warnings = hold_back(samples, config.seed)
    learned = rest if config.stop == "match" else samples
    own = {task: len(rows) for task, rows in learned.items()}
    experts = experts_of(base, matched.adapters, matched.stack, config, team)
    batches, evaluation = _borrowing(base, targets, learned, replace(config, positions="prompt"), experts.in_words)
    limit = config.tokens_per_pass or max(TOKENS, sum(batch.tokens for batch in batches(0)))
    drawn = [batches.drawn(step).items() for step in range(max(1, config.steps))]
    picks = sorted({(task, i) for step in drawn for task, row in step for i in row})
    batches = experts.teach(batches, picks, limit, learned)
    agreement = experts.agreement(batches, _measured(picks, own), limit)
    output: Entropy | Agreement | None = agreement if "match" in config.objective else None
    output = entropy_in(base, matched, config) if config.needs_entropy else output
    chosen = None
    if config.stop == "match":
        chosen = HeldBack(agreement, _told(experts, base, targets, held, config, limit)[0], team)
    return Problem(base, stack, targets, batches, evaluation, output, config, chosen, warnings=tuple(warnings))


def _borrowing(
    base: Base, targets: Sequence[str], samples: Mapping[str, Sequence[Any]], config: MergeConfig, in_words: set[str]
) -> tuple[Any, list[Batch]]:
    """The batches to learn from, in which tasks borrow one another's rows where that is asked for; and evaluation."""
    if not config.borrow_rows:
        return feed_of(base).batches(base, targets, samples, config)
    without = in_words | {task for task, rows in samples.items() if len(rows) > config.borrow_rows}
    together, borrowed = borrow(samples, config.steps * config.batch_size // 2, config.seed, without)
    batches, _ = feed_of(base).batches(base, targets, together, replace(config, evaluation_samples=1))
    own = [(task, i) for task, rows in samples.items() for i in range(min(len(rows), config.evaluation_samples))]
    evaluation = batches.packed(own)
    return replace(batches, borrowed=borrowed), evaluation  # type: ignore[type-var]  # all feeds' are dataclasses


def _measured(picks: Sequence[Pick], own: Mapping[str, int]) -> list[Pick]:
    """The samples on which experts and base are compared: a task's own rows, where any of them is drawn."""
    mine = [(task, i) for task, i in picks if i < own[task]]
    there = {task for task, _ in mine}
    return mine + [(task, i) for task, i in picks if task not in there]


def experts_of(
    base: Base, adapters: Mapping[str, Adapter], stack: Stack, config: MergeConfig, team: Team = ALONE
) -> Experts:
    """Return the experts of a merge.

    Args:
        base: with weights.
        adapters: task -> adapter.
        stack: the adapters on the base, with one coefficient for each layer and task.
        config: positions, unseen and the length of answers.
        team: the processes that share the rows.

    Returns:
        The experts.

    Raises:
        NSCError: naming a task whose output is not followed.
    """
    return Experts(base, adapters, stack, config.positions, config.without_rows, config.max_new_tokens, team)


def distance_from_experts(
    base: Base,
    adapters: Mapping[str, Adapter],
    stack: Stack,
    samples: Mapping[str, Sequence[Any]],
    config: MergeConfig,
    team: Team = ALONE,
) -> HeldBack:
    """Return what measures any merge, without labels, by its distance from the experts on some rows of each task.

    Args:
        base: with weights.
        adapters: task -> adapter.
        stack: the adapters on the base, with one coefficient for each layer and task.
        samples: task -> what its feed read, of which at most ``MEASURED`` rows are taken.
        config: settings of the rows.
        team: the processes that share the rows.

    Returns:
        The measure.

    Raises:
        NSCError: a subclass, for rows and heads that do not go together.
    """
    targets = targets_of(base, stack, config.target_modules, config.target_blocks)
    experts = experts_of(base, adapters, stack, config, team)
    some = {task: some_of(rows, MEASURED, f"{config.seed}/{task}/measured") for task, rows in samples.items()}
    limit = config.tokens_per_pass or TOKENS
    parts, batches, picks = _told(experts, base, targets, some, config, limit)
    return HeldBack(experts.agreement(batches, picks, limit), parts, team)


def _told(
    experts: Experts,
    base: Base,
    targets: Sequence[str],
    samples: Mapping[str, Sequence[Any]],
    config: MergeConfig,
    limit: int,
) -> tuple[list[Batch], Any, list[Pick]]:
    """All of these rows in passes, with what the experts say about them; what batches them; and their picks."""
    batches = feed_of(base).batches(base, targets, samples, replace(config, positions="prompt"))[0]
    picks = [(task, i) for task, rows in samples.items() for i in range(len(rows))]
    batches = experts.teach(batches, picks, limit, samples)
    return in_passes(batches.packed(picks), limit), batches, picks


def entropy_in(base: Base, matched: Matched, config: MergeConfig) -> Entropy:
    """Return the entropy that these settings ask for.

    Args:
        base: with weights.
        matched: the adapters on it.
        config: positions, reduction, unseen.

    Returns:
        The entropy by each task's head.

    Raises:
        NSCError: as ``entropy_of`` does.
    """
    return entropy_of(base, matched.adapters, config.positions, config.unseen, config.reduction)


def targets_of(
    base: Base, stack: Stack, modules: Sequence[str] | None = None, blocks: Sequence[int] | str | None = None
) -> list[str]:
    """Choose the modules whose inputs are measured.

    Args:
        base: whose blocks are counted.
        stack: the adapters on it.
        modules: suffixes of their names; None for the default of this kind of base.
        blocks: numbers, or the last blocks by a word; None for the default.

    Returns:
        Names of modules that carry LoRA, in the order in which they run.

    Raises:
        TargetError: where nothing that carries LoRA is left to measure.
    """
    names = list(stack.modules)
    if not modules and without_images(base.body_config):
        names = _run_on_text(base, names)
    return choose_targets(base.model, names, modules, blocks)


def _run_on_text(base: Base, names: Sequence[str]) -> list[str]:
    """Those layers that run where the base reads text alone: none of a tower, or of attention to what it gives."""
    batch = example_of(base)
    if batch is None:
        return list(names)
    layers = {name: base.model.get_submodule(name) for name in names}
    runs = readers(base.model, layers, batch.to(input_device(base.model)))[1]
    return [name for name in names if runs[name]]


def evaluation_ratio(
    base: Base, stack: Stack, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> NullSpaceRatio:
    """Return the mean null-space ratio of the rows that a merge is evaluated on before and after.

    Args:
        base: with weights.
        stack: the adapters on it, not whitened.
        samples: task -> what its feed read.
        config: targets, and ``evaluation_samples`` of each task.

    Returns:
        A function of a model that carries a merge.

    Raises:
        NSCError: a subclass, for targets and rows that do not go together.
    """
    targets = targets_of(base, stack, config.target_modules, config.target_blocks)
    rows = batches_of(base, stack, targets, samples, replace(config, steps=0))[1]  # answers to evaluated rows alone
    return NullSpaceRatio(stack, targets, rows, input_device(base.model))


def all_rows(
    base: Base, stack: Stack, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> dict[str, Callable[[], Iterable[Batch]]]:
    """Return all rows of each task, in passes.

    Args:
        base: with weights.
        stack: the adapters on it.
        samples: task -> what its feed read.
        config: settings of the rows.

    Returns:
        Task -> its batches, whose weights add up to one.
    """
    few = replace(config, evaluation_samples=1, positions="prompt", graphs=False)
    batches, _ = feed_of(base).batches(base, targets_of(base, stack), samples, few)

    def passes(task: str) -> Iterable[Batch]:
        picks = [(task, i) for i in range(len(samples[task]))]
        return in_passes(batches.packed(picks), config.tokens_per_pass or TOKENS)

    return {task: partial(passes, task) for task in stack.tasks}
