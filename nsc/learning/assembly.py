"""What a run of learning holds before its first step: parameters in the model, objective, state, and passes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from nsc.adapters.stack import Stack
from nsc.adapters.surgery import choose_plans, merged_layers, set_coefficients, share_inputs
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.console import metric
from nsc.errors import TargetError
from nsc.learning.agreement import Agreement
from nsc.learning.coefficients import Coefficients
from nsc.learning.entropy import Entropy
from nsc.learning.objective import Goal, NullSpaceObjective, Objective, OutputObjective, goal_of
from nsc.learning.passes import Passes, tokens_that_fit
from nsc.learning.state import State, begin
from nsc.learning.trained_factors import Factors, TrainedFactors, set_factors, trained_layers
from nsc.runtime.cuda_graphs import make_graphs
from nsc.runtime.memory import free_memory
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shards_of
from nsc_kernels import MergedLoRALinear


@contextmanager
def prepared(
    model: nn.Module,
    stack: Stack,
    targets: Sequence[str],
    first_step: Sequence[Batch],
    config: MergeConfig,
    identity: str = "",
    say: Callable[[str], Any] = lambda text: None,
    output: Entropy | Agreement | None = None,
    factors: Factors | None = None,
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
        output: entropy or agreement, for the objectives that have one.
        factors: layer -> A (r, d), B (m, r) at which fitted factors start, if they are what is learned.

    Yields:
        State and passes; the model is as it was afterwards.

    Raises:
        TargetError: if no coefficient changes what is measured.
    """
    goal = goal_of(stack.tasks, config, output)
    wanted = config.graphs and not isinstance(output, Entropy)  # whose rows are picked by the host
    graphs = make_graphs(model, wanted, say)
    made = _on_coefficients(model, stack, targets, first_step, config, goal)
    with made if factors is None else _on_factors(model, stack, factors, config, goal) as setting:
        shards, mapping = shards_of(model), setting.mapping
        theta = nn.Parameter(setting.theta)
        state = begin(theta, setting.frozen, config, identity, graphs, mapping)
        setting.place(theta.detach().requires_grad_())
        fits = config.tokens_per_pass or (None if shards else _measure(setting.objective, first_step[0], say))
        try:
            yield state, Passes(setting.objective, theta, fits, state.loss, graphs, setting.place, setting.folding)
        finally:
            graphs.clear()


class Setting(NamedTuple):
    """What one kind of parameter brings to a run.

    Attributes:
        objective: what is made smaller.
        mapping: from theta to what is compared, bounded and written.
        theta: at the start.
        frozen: which coefficients keep their value.
        place: puts theta into the layers, differentiably.
        folding: layers that a step runs and that hold a folded weight until its end.
    """

    objective: Objective
    mapping: Coefficients | TrainedFactors
    theta: Tensor
    frozen: Tensor
    place: Callable[[Tensor], None]
    folding: Sequence[MergedLoRALinear] = ()


@contextmanager
def _on_coefficients(
    model: nn.Module, stack: Stack, targets: Sequence[str], first_step: Sequence[Batch], config: MergeConfig, goal: Goal
) -> Iterator[Setting]:
    device, shards = input_device(model), shards_of(model)
    coefficients = Coefficients.of(stack, config).to(device)
    theta = coefficients.first(torch.promote_types(next(model.parameters()).dtype, torch.float32))
    lam = coefficients(theta).requires_grad_()
    plans = choose_plans(model, stack, config.layers, sum(batch.tokens for batch in first_step))
    with merged_layers(model, stack, lam.detach(), plans) as layers:
        row = first_step[0].within(1)[0].to(device)
        share_inputs(model, layers, targets, row)
        objective = NullSpaceObjective(model, layers, stack, targets, config.gradient_checkpointing, goal)
        with shards.one_pass() if shards else nullcontext():
            reachable = _reachable(objective, row, lam)
        frozen = ~reachable | ~stack.owned.to(device)
        run = [layer for layer, there in zip(layers.values(), reachable.any(1).tolist(), strict=False) if there]
        folding = [] if config.gradient_checkpointing else [x for x in run if isinstance(x, MergedLoRALinear)]
        place = partial(_place, layers, coefficients)
        yield Setting(objective, coefficients, theta, frozen, place, folding)


def _place(layers: dict[str, Any], coefficients: Coefficients, theta: Tensor) -> None:
    set_coefficients(layers, coefficients(theta))


@contextmanager
def _on_factors(model: nn.Module, stack: Stack, factors: Factors, config: MergeConfig, goal: Goal) -> Iterator[Setting]:
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    mapping = TrainedFactors(factors, dtype, input_device(model))
    with trained_layers(model, mapping.split(mapping.start)) as layers:
        yield Setting(
            OutputObjective(model, layers, stack.tasks, goal, config.gradient_checkpointing),
            mapping,
            mapping.start.clone(),
            torch.zeros_like(mapping.start, dtype=torch.bool),
            lambda theta: set_factors(layers, mapping.split(theta)),
        )


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


def _measure(objective: Objective, batch: Batch, say: Callable[[str], Any]) -> int | None:
    """The most tokens that a pass may hold, None where the system does not tell what is free."""
    free = free_memory(input_device(objective.model))
    if free is None:
        return None
    tokens = tokens_that_fit(objective, batch, free)
    say(f"memory: {metric(free, 'B')} free, so a pass holds {metric(tokens)} tokens at most")
    return tokens
