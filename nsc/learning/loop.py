"""The optimisation: one forward for all tasks, one backward to the coefficients, AdamW, a bound; checkpoint and resume.

The state of a run is ``theta``, the optimizer's moments and the step; batches are a function of the step. So a run that
is interrupted anywhere and resumed ends where the uninterrupted one would, bit for bit where the arithmetic is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nsc.adapters.stack import Stack
from nsc.adapters.surgery import choose_plans, merged_layers, set_coefficients, share_inputs
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.console import metric, printer
from nsc.errors import NonFiniteError, TargetError
from nsc.learning.checkpoint import read, restore, save
from nsc.learning.coefficients import Coefficients
from nsc.learning.entropy import Entropy
from nsc.learning.objective import NullSpaceObjective, goal_of
from nsc.learning.passes import Passes, own_share, tokens_that_fit
from nsc.learning.ratios import require_finite_ratios
from nsc.learning.state import State, begin
from nsc.runtime.cuda_graphs import make_graphs
from nsc.runtime.distributed import ALONE, RankError, Team
from nsc.runtime.interrupts import deferred_interrupts
from nsc.runtime.memory import free_memory, peak_memory
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shards_of

CHECKPOINT_SECONDS = 10.0
REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Learned:
    """What the optimisation found.

    Attributes:
        coefficients: (M, C) on the CPU.
        frozen: (M, C) bool, which coefficients no gradient reaches: adapter absent, or module at or after the last
            target's input.
        bounded: (M, C) bool, which coefficients ``max_drift`` stopped.
        losses: one per step.
        seconds: per step.
        peak_memory: bytes.
    """

    coefficients: Tensor
    frozen: Tensor
    bounded: Tensor
    losses: list[float]
    seconds: float
    peak_memory: int


def learn(
    model: nn.Module,
    stack: Stack,  # whitened or not: the objective follows
    targets: Sequence[str],
    batches: Callable[[int], Sequence[Batch]],  # of a step: their losses add up
    config: MergeConfig,
    *,
    checkpoint: Path | None = None,
    resume: bool = False,
    identity: str = "",
    progress: bool = True,
    team: Team = ALONE,
    entropy: Entropy | None = None,
) -> Learned:
    """Learn coefficients by the optimizer and objective of ``config``; the model is left as it was.

    Args:
        model: body of the base.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        batches: step -> batches, whose losses add up.
        config: all settings of learning.
        checkpoint: file in which the state is kept, atomically, while running.
        resume: continue from ``checkpoint``.
        identity: digest that a resumed checkpoint must have.
        progress: print lines and a bar.
        team: the processes that share each step; all find the same, and only the first prints and writes.
        entropy: for the objectives that have one.

    Returns:
        (M, C) coefficients, C being K, or by rank the most rank rows of a module; and what the optimisation did.

    Raises:
        NonFiniteError: naming the module where NaN or infinity appears.
        ResumeError: if the checkpoint is missing or of another merge.
        RankError: if a rank is lost, with the state on disk.
        KeyboardInterrupt: after SIGINT or SIGTERM to any rank, with the state on disk.
    """
    say = printer(progress and team.first)
    with prepared(model, stack, targets, batches(0), config, identity, say, entropy) as (state, passes):
        if resume:
            stored = team.from_first(lambda: read(checkpoint, identity, config.steps))
            restore(state, stored)
            passes.tokens = config.tokens_per_pass or stored["tokens"]
        keep = partial(_keep, state, checkpoint, passes) if checkpoint and team.first else None
        started, first = time.perf_counter(), state.step
        try:
            _optimise(
                state,
                lambda step: passes.gradient(own_share(batches(step), team, passes.shards)),
                config.steps,
                keep,
                progress and team.first,
                team,
            )
            team.require_same(state.lam.tolist(), "coefficients")
        except NonFiniteError as error:
            lam = state.lam
            start = torch.full_like(lam, config.start)
            # a NaN coefficient would spread to tasks that are sound
            set_coefficients(passes.objective.layers, torch.where(lam.isfinite().all(), lam, start).detach())
            raise _blame(passes.objective, batches, state, error) from error
        seconds = (time.perf_counter() - started) / max(1, config.steps - first)
    return _learned(state, config, seconds)


@contextmanager
def prepared(
    model: nn.Module,
    stack: Stack,
    targets: Sequence[str],
    first_step: Sequence[Batch],
    config: MergeConfig,
    identity: str = "",
    say: Callable[[str], Any] = lambda text: None,
    entropy: Entropy | None = None,
) -> Iterator[tuple[State, Passes]]:
    """Put the adapters into the model, and give the state before the first step and what finds the gradient of a step.

    Args:
        model: body of the base.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        first_step: batches of the first step, whose shapes decide plans and memory.
        config: all settings of learning.
        identity: digest of everything that the path depends on.
        say: prints a line.
        entropy: for the objectives that have one.

    Yields:
        State and passes; the model is as it was afterwards.

    Raises:
        TargetError: if no coefficient changes what is measured.
    """
    device, shards = input_device(model), shards_of(model)
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    coefficients = Coefficients.of(stack, config).to(device)
    theta = nn.Parameter(coefficients.first(dtype))
    lam = coefficients(theta.detach()).requires_grad_()
    plans = choose_plans(model, stack, config.layers, sum(batch.tokens for batch in first_step))
    graphs = make_graphs(model, config.graphs and entropy is None, say)  # the rows of an entropy are picked by the host
    with merged_layers(model, stack, lam.detach(), plans) as layers:
        row = first_step[0].within(1)[0].to(device)
        share_inputs(model, layers, targets, row)
        goal = goal_of(stack.tasks, config, entropy)
        objective = NullSpaceObjective(model, layers, stack, targets, config.gradient_checkpointing, goal)
        with shards.one_pass() if shards else nullcontext():
            reachable = _reachable(objective, row, lam)
        frozen = ~reachable | ~stack.owned.to(device)
        state = begin(theta, frozen, config, identity, graphs, coefficients)
        tokens = config.tokens_per_pass or (None if shards else _measure(objective, lam, first_step[0], say))
        try:
            yield state, Passes(objective, theta, tokens, state.loss, graphs, coefficients)
        finally:
            graphs.clear()


def initial_gradient(
    model: nn.Module, stack: Stack, targets: Sequence[str], batch: Batch, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient as the first step sees them.

    Args:
        model: body of the base.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        batch: rows of all tasks.
        lam: (M, K) coefficients.

    Returns:
        () and (M, K).
    """
    with merged_layers(model, stack, lam) as layers:
        objective = NullSpaceObjective(model, layers, stack, targets)
        lam = lam.detach().requires_grad_()
        set_coefficients(layers, lam)
        loss = objective.loss(batch)
        (gradient,) = torch.autograd.grad(loss, lam)
    return loss.detach(), gradient


def _reachable(objective: NullSpaceObjective, batch: Batch, lam: Tensor) -> Tensor:
    """(M, 1) bool: modules whose coefficients the objective depends on, read off the autograd graph."""
    rows = [row.clone().requires_grad_() for row in lam.detach().unbind(0)]
    set_coefficients(objective.layers, rows)
    loss = objective.loss(batch)
    if not loss.requires_grad:
        raise TargetError(
            "no coefficient changes what is measured: every module with LoRA comes at or after the last target"
            f" ({objective.targets[-1]}); choose later target_blocks"
        )
    gradients = torch.autograd.grad(loss, rows, allow_unused=True)
    return torch.tensor([[gradient is not None] for gradient in gradients], device=lam.device)


def _measure(objective: NullSpaceObjective, lam: Tensor, batch: Batch, say: Callable[[str], Any]) -> int | None:
    """The most tokens that a pass may hold, None where the system does not tell what is free."""
    free = free_memory(lam.device)
    if free is None:
        return None
    tokens = tokens_that_fit(objective, lam, batch, free)
    say(f"memory: {metric(free, 'B')} free, so a pass holds {metric(tokens)} tokens at most")
    return tokens


def _keep(state: State, checkpoint: Path, passes: Passes) -> None:
    save(state, checkpoint, passes.tokens)


def _optimise(
    state: State,
    gradient: Callable[[int], Tensor],
    steps: int,
    keep: Callable[[], None] | None,
    progress: bool,
    team: Team,
) -> None:
    bar = tqdm(total=steps, initial=state.step, desc="learning coefficients", unit="step", disable=not progress)
    saved = shown = time.perf_counter()
    with bar, deferred_interrupts() as noted:
        while state.step < steps:
            try:
                interrupted = take_step(state, gradient, team, noted)
            except RankError:  # the state is still that of the last whole step
                if keep:
                    keep()
                raise
            if team.size > 1:  # at the same step on all ranks, whatever their clocks say
                state.require_finite()
            bar.update()
            now = time.perf_counter()
            if now - shown > REFRESH_SECONDS or state.step == steps:
                shown = now
                bar.set_postfix_str(_status(state))
            if keep and (now - saved > CHECKPOINT_SECONDS or interrupted or state.step == steps):
                saved = now
                keep()
            if interrupted:
                team.wait()  # an exit before the state is on disk would have the others ended
                raise KeyboardInterrupt


def take_step(state: State, gradient: Callable[[int], Tensor], team: Team, noted: list[int]) -> bool:
    """Take one step by the gradient of all ranks.

    Args:
        state: state of the run.
        gradient: step -> loss (), with the gradient in ``state.theta.grad``.
        team: the processes.
        noted: signals that arrived, if any.

    Returns:
        Whether any rank noted an interrupt.
    """
    loss = gradient(state.step)
    assert state.theta.grad is not None
    interrupted = team.add_up(state.theta.grad, loss, flag=bool(noted))
    state.update()
    return interrupted


def _status(state: State) -> str:
    state.require_finite()
    drift = (state.lam - state.coefficients.start).abs().max().item()
    bound = state.reach.max().item()
    return f"loss {state.losses[state.step - 1].item():.4f}, drift {drift:.3f} of {bound:.3f}"


def _blame(
    objective: NullSpaceObjective, batches: Callable[[int], Sequence[Batch]], state: State, error: NonFiniteError
) -> NonFiniteError:
    """The same error with the target and tasks at which the ratio is not finite."""
    bad = [i for i, loss in enumerate(state.losses[: state.step]) if not torch.isfinite(loss)]
    table = torch.zeros_like(objective.share)
    for batch in batches(bad[0] if bad else state.step - 1):
        table = table + objective.ratios(batch.to(state.theta.device))
    try:
        require_finite_ratios(objective, table)
    except NonFiniteError as found:
        return NonFiniteError(f"{error}: {found}")
    return NonFiniteError(f"{error}; a smaller lr or max_drift may keep it finite")


def _learned(state: State, config: MergeConfig, seconds: float) -> Learned:
    state.require_finite()
    lam = state.lam
    stopped = state.coefficients.stopped(state.theta, state.reach, state.lower, state.upper)
    bounded = ~state.frozen & stopped & (config.steps > 0)
    losses, memory = state.losses.tolist(), peak_memory(lam.device)
    return Learned(lam.cpu().clone(), state.frozen.cpu(), bounded.cpu(), losses, seconds, memory)
