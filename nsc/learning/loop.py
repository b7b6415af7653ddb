"""The optimisation: one forward for all tasks, one backward to the coefficients, AdamW, a bound; checkpoint and resume.

The state of a run is ``theta``, the optimizer's moments and the step; batches are a function of the step. So a run that
is interrupted anywhere and resumed ends where the uninterrupted one would, bit for bit where the arithmetic is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nsc.adapters.stack import Stack
from nsc.adapters.surgery import set_coefficients
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.console import printer
from nsc.errors import NonFiniteError
from nsc.learning.agreement import Agreement
from nsc.learning.assembly import prepared
from nsc.learning.checkpoint import read, restore, save
from nsc.learning.entropy import Entropy
from nsc.learning.held_back import HeldBack
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import Passes, own_share
from nsc.learning.ratios import require_finite_ratios
from nsc.learning.state import State
from nsc.learning.trained_factors import Factors, TrainedFactors
from nsc.runtime.distributed import ALONE, RankError, Team
from nsc.runtime.interrupts import deferred_interrupts
from nsc.runtime.memory import peak_memory

CHECKPOINT_SECONDS = 10.0
REFRESH_SECONDS = 0.5
NOTES = 10  # how often held-out rows are measured, beside the start


@dataclass(frozen=True)
class Learned:
    """What the optimisation found.

    Attributes:
        coefficients: (M, C) on the CPU; with fitted factors their long vector.
        frozen: (M, C) bool, which coefficients no gradient reaches: adapter absent, or module at or after the last
            target's input.
        bounded: (M, C) bool, which coefficients ``max_drift`` stopped.
        losses: one per step.
        seconds: per step.
        peak_memory: bytes.
        curve: step -> each task's distance from its expert on held-out rows, relative to the bare base's, if measured.
        kept: the step that was kept.
        factors: layer -> A (r, d), B (m, r) on the CPU, if these were fitted.
    """

    coefficients: Tensor
    frozen: Tensor
    bounded: Tensor
    losses: list[float]
    seconds: float
    peak_memory: int
    curve: dict[int, list[float]] = field(default_factory=dict)
    kept: int = 0
    factors: Factors | None = None


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
    output: Entropy | Agreement | None = None,
    held: HeldBack | None = None,
    factors: Factors | None = None,
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
        output: entropy or agreement, for the objectives that have one.
        held: rows held out, if the step that is nearest to the experts on them is to be kept.
        factors: layer -> A (r, d), B (m, r) at which fitted factors start, if they are what is learned.

    Returns:
        (M, C) coefficients, C being K, or by rank the most rank rows of a module, or factors; and what the optimisation
        did.

    Raises:
        NonFiniteError: naming the module where NaN or infinity appears.
        ResumeError: if the checkpoint is missing or of another merge.
        RankError: if a rank is lost, with the state on disk.
        KeyboardInterrupt: after SIGINT or SIGTERM to any rank, with the state on disk.
    """
    say = printer(progress and team.first)
    with prepared(model, stack, targets, batches(0), config, identity, say, output, factors) as (state, passes):
        if resume:
            stored = team.from_first(lambda: read(checkpoint, identity, config.steps))
            restore(state, stored)
            passes.tokens = config.tokens_per_pass or stored["tokens"]
        watch = partial(_note, held, passes) if held else None
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
                watch,
            )
            state.take_best()
            team.require_same(state.lam.tolist(), "coefficients")
        except NonFiniteError as error:
            raise _blame(passes, batches, state, error) from error
        seconds = (time.perf_counter() - started) / max(1, config.steps - first)
    return _learned(state, config, seconds)


def _note(held: HeldBack, passes: Passes, state: State) -> None:
    """Measure the held-out rows at the state's step."""
    with torch.no_grad():
        passes.place(state.theta)
    state.note(held.distances(passes.objective.model))


def _keep(state: State, checkpoint: Path, passes: Passes) -> None:
    save(state, checkpoint, passes.tokens)


def _optimise(
    state: State,
    gradient: Callable[[int], Tensor],
    steps: int,
    keep: Callable[[], None] | None,
    progress: bool,
    team: Team,
    note: Callable[[State], None] | None = None,
) -> None:
    every = max(1, steps // NOTES)
    if note and not state.curve:
        note(state)
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
            if note and (state.step % every == 0 or state.step == steps):
                note(state)
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
    passes: Passes, batches: Callable[[int], Sequence[Batch]], state: State, error: NonFiniteError
) -> NonFiniteError:
    """The same error with the target and tasks at which the ratio is not finite."""
    objective = passes.objective
    if isinstance(objective, NullSpaceObjective):
        lam = state.lam
        start = torch.zeros_like(lam) + state.coefficients.start
        # a NaN coefficient would spread to tasks that are sound
        set_coefficients(objective.layers, torch.where(lam.isfinite().all(), lam, start).detach())
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
    found = lam.cpu().clone(), state.frozen.cpu(), bounded.cpu()
    kept, factors = state.kept if state.curve else state.step, None
    if isinstance(state.coefficients, TrainedFactors):
        factors = state.coefficients.split(found[0])
    return Learned(*found, losses, seconds, memory, dict(state.curve), kept, factors)
