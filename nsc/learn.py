"""The optimisation: one forward for all tasks, one backward to the coefficients, AdamW, a bound; checkpoint and resume.

The state of a run is ``lam``, the optimiser's moments and the step; batches are a function of the step. So a run that
is interrupted anywhere and resumed ends where the uninterrupted one would, bit for bit where the arithmetic is.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.distributed import ALONE, RankError, Team
from nsc.errors import NonFiniteError, ResumeError
from nsc.interrupts import deferred_interrupts
from nsc.objective import NullSpaceObjective
from nsc.passes import Passes, own_share
from nsc.places import input_device
from nsc.sharding import shards_of
from nsc.stack import Stack
from nsc.surgery import choose_plans, merged_layers, set_coefficients

CHECKPOINT_SECONDS = 10.0
REFRESH_SECONDS = 0.5


@dataclass(frozen=True)
class Learned:
    """What the optimisation found.

    coefficients: (M, K) on the CPU.  frozen: (M, K) bool, no gradient reaches it (adapter absent, or module at or after
    the last target's input).  bounded: (M, K) bool, stopped by ``max_drift``.  losses: one a step.  seconds: a step.
    """

    coefficients: Tensor
    frozen: Tensor
    bounded: Tensor
    losses: list[float]
    seconds: float
    peak_memory: int


@dataclass
class _Run:
    lam: nn.Parameter
    optimizer: torch.optim.AdamW
    start: float
    lower: Tensor
    upper: Tensor
    frozen: Tensor
    identity: str
    step: int = 0
    losses: list[Tensor] = field(default_factory=list)


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
) -> Learned:
    """Learn (M, K) coefficients by AdamW on the null-space objective; the model is left as it was.

    checkpoint: where the state is kept while running, atomically.  identity: what a resumed checkpoint must match.
    team: the processes that share each step; all of them find the same, and only the first one prints and writes.
    Raises NonFiniteError naming the module where NaN or infinity appears, ResumeError when the checkpoint is missing or
    of another merge, and KeyboardInterrupt after SIGINT or SIGTERM to any rank, once the state is on disk; RankError
    when a rank is lost, then too with the state on disk.
    """
    device, shards = input_device(model), shards_of(model)
    dtype = torch.float64 if next(model.parameters()).dtype == torch.float64 else torch.float32
    lam = nn.Parameter(torch.full((len(stack.names), len(stack.tasks)), config.start, dtype=dtype, device=device))
    first_step = batches(0)
    plans = choose_plans(model, stack, config.layers, sum(batch.tokens for batch in first_step))
    with merged_layers(model, stack, lam.detach(), plans) as layers:
        objective = NullSpaceObjective(model, layers, stack, targets)
        passes = Passes(objective, lam, config.tokens_per_pass)
        with shards.one_pass() if shards else nullcontext():
            reachable = _reachable(objective, first_step[0].within(1)[0].to(device), lam)
        frozen = ~reachable | ~stack.present.to(device)
        run = _start(lam, frozen, config, identity)
        if resume:
            _restore(run, team.from_first(lambda: _read(checkpoint, identity, config.steps)))
        started, first = time.perf_counter(), run.step
        try:
            _optimise(
                run, lambda step: passes.gradient(own_share(batches(step), team, shards)), config.steps,
                checkpoint if team.first else None, progress and team.first, team,
            )  # fmt: skip
            team.require_same(lam.tolist(), "coefficients")
        except NonFiniteError as error:
            start = torch.full_like(lam, config.start)  # a NaN coefficient would spread to tasks that are sound
            set_coefficients(layers, torch.where(lam.isfinite().all(), lam, start).detach())
            raise _blame(objective, batches, run, error) from error
        seconds = (time.perf_counter() - started) / max(1, config.steps - first)
    return _learned(run, config, seconds)


def initial_gradient(
    model: nn.Module, stack: Stack, targets: Sequence[str], batch: Batch, lam: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss () and its gradient (M, K) at ``lam`` (M, K), as the first step sees them."""
    with merged_layers(model, stack, lam) as layers:
        objective = NullSpaceObjective(model, layers, stack, targets)
        lam = lam.detach().requires_grad_()
        set_coefficients(layers, lam)
        loss = objective.loss(batch)
        (gradient,) = torch.autograd.grad(loss, lam)
    return loss.detach(), gradient


def require_finite_ratios(objective: NullSpaceObjective, table: Tensor) -> None:
    """Raise NonFiniteError naming the targets and tasks at which ``table`` (T, K) of ratios is not finite."""
    broken = ~torch.isfinite(table) & (objective.share > 0)
    places = [f"{objective.targets[t]} (task {objective.tasks[k]})" for t, k in broken.nonzero().tolist()[:3]]
    if places:
        raise NonFiniteError(
            f"NaN or infinite activations enter {', '.join(places)}; check the base's weights and dtype (float16"
            " overflows: use bfloat16)"
        )


def _start(lam: nn.Parameter, frozen: Tensor, config: MergeConfig, identity: str) -> _Run:
    reach = torch.full_like(lam, float("inf") if config.max_drift is None else config.max_drift)
    reach = torch.where(frozen, 0.0, reach.detach())
    optimizer = torch.optim.AdamW(
        [lam], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    return _Run(lam, optimizer, config.start, config.start - reach, config.start + reach, frozen, identity)


def _reachable(objective: NullSpaceObjective, batch: Batch, lam: Tensor) -> Tensor:
    """(M, 1) bool: modules whose coefficients the objective depends on, read off the autograd graph."""
    rows = [row.clone().requires_grad_() for row in lam.detach().unbind(0)]
    for layer, row in zip(objective.layers.values(), rows, strict=True):
        layer.lam = row.to(layer.spread.device)
    gradients = torch.autograd.grad(objective.loss(batch), rows, allow_unused=True)
    return torch.tensor([[gradient is not None] for gradient in gradients], device=lam.device)


def _optimise(
    run: _Run, gradient: Callable[[int], Tensor], steps: int, checkpoint: Path | None, progress: bool, team: Team
) -> None:
    bar = tqdm(total=steps, initial=run.step, desc="learning coefficients", unit="step", disable=not progress)
    saved = shown = time.perf_counter()
    with bar, deferred_interrupts() as noted:
        while run.step < steps:
            try:
                interrupted = _step(run, gradient, team, noted)
            except RankError:  # the state is still that of the last whole step
                if checkpoint:
                    _save(run, checkpoint)
                raise
            if team.size > 1:  # at the same step on all ranks, whatever their clocks say
                _require_finite(run)
            bar.update()
            now = time.perf_counter()
            if now - shown > REFRESH_SECONDS or run.step == steps:
                shown = now
                bar.set_postfix_str(_status(run))
            if checkpoint and (now - saved > CHECKPOINT_SECONDS or interrupted or run.step == steps):
                saved = now
                _save(run, checkpoint)
            if interrupted:
                team.wait()  # an exit before the state is on disk would have the others ended
                raise KeyboardInterrupt


def _step(run: _Run, gradient: Callable[[int], Tensor], team: Team, noted: list[int]) -> bool:
    """One step by the gradient of all ranks; whether one of them noted an interrupt."""
    run.optimizer.zero_grad(set_to_none=False)
    loss = gradient(run.step)
    assert run.lam.grad is not None
    interrupted = team.add_up(run.lam.grad, loss, flag=bool(noted))
    run.optimizer.step()
    with torch.no_grad():
        run.lam.clamp_(run.lower, run.upper)
    run.losses.append(loss)
    run.step += 1
    return interrupted


def _status(run: _Run) -> str:
    _require_finite(run)
    drift = (run.lam.detach() - run.start).abs().max().item()
    bound = (run.upper - run.start).max().item()
    return f"loss {run.losses[-1].item():.4f}, drift {drift:.3f} of {bound:.3f}"


def _require_finite(run: _Run) -> None:
    if run.losses and not torch.isfinite(run.losses[-1]):
        raise NonFiniteError(f"the objective became {run.losses[-1].item()} by step {run.step}")
    if not torch.isfinite(run.lam).all():
        raise NonFiniteError(f"a coefficient became NaN or infinite by step {run.step}")


def _blame(
    objective: NullSpaceObjective, batches: Callable[[int], Sequence[Batch]], run: _Run, error: NonFiniteError
) -> NonFiniteError:
    """The same error with the target and tasks at which the ratio is not finite."""
    bad = [i for i, loss in enumerate(run.losses) if not torch.isfinite(loss)]
    table = torch.zeros_like(objective.share)
    for batch in batches(bad[0] if bad else run.step - 1):
        table = table + objective.ratios(batch.to(run.lam.device))
    try:
        require_finite_ratios(objective, table)
    except NonFiniteError as found:
        return NonFiniteError(f"{error}: {found}")
    return NonFiniteError(f"{error}; a smaller lr or max_drift may keep it finite")


def _save(run: _Run, path: Path) -> None:
    """Atomic: the file is either the old state or the new one, and never one that holds NaN."""
    _require_finite(run)
    state = {
        "identity": run.identity,
        "step": run.step,
        "lam": run.lam.detach(),
        "optimizer": run.optimizer.state_dict(),
        "losses": torch.stack(run.losses) if run.losses else torch.empty(0),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _read(path: Path | None, identity: str, steps: int) -> dict[str, Any]:
    if path is None or not path.is_file():
        raise ResumeError(f"nothing to resume: there is no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for one thing: the file is no checkpoint
        raise ResumeError(f"checkpoint {path} cannot be read ({error}); remove it to start again") from error
    if state["identity"] != identity:
        raise ResumeError(
            f"checkpoint {path} was made with other adapters, data or settings; resume with the same ones, or remove it"
        )
    if state["step"] > steps:
        past = f"is at step {state['step']}, past the {steps} that were asked for"
        raise ResumeError(f"checkpoint {path} {past}; ask for at least as many, or remove it")
    return state


def _restore(run: _Run, state: dict[str, Any]) -> None:
    with torch.no_grad():
        run.lam.copy_(state["lam"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.step = state["step"]
    run.losses = list(state["losses"].to(run.lam.device).unbind(0))


def _learned(run: _Run, config: MergeConfig, seconds: float) -> Learned:
    _require_finite(run)
    lam = run.lam.detach()
    bounded = ~run.frozen & ((lam <= run.lower) | (lam >= run.upper)) & (config.steps > 0)
    losses = torch.stack(run.losses).tolist() if run.losses else []
    return Learned(lam.cpu().clone(), run.frozen.cpu(), bounded.cpu(), losses, seconds, _peak_memory(lam.device))


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU's allocator, or else of the whole process; 0 where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
