"""A real step of a merge, the floor under it, and what can be read off either: seconds, FLOPs, bytes kept."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nsc.adapters.stack import Stack
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.learning.agreement import Agreement
from nsc.learning.assembly import prepared
from nsc.learning.entropy import Entropy
from nsc.learning.loop import take_step
from nsc.learning.trained_factors import Factors
from nsc.learning.watch import LastTargetSeen
from nsc.runtime.distributed import ALONE, Team

MOST_STEPS = 10_000  # that one profile or benchmark takes


@contextmanager
def nsc_step(
    model: nn.Module,
    stack: Stack,
    targets: Sequence[str],
    batches: Sequence[Batch],
    config: MergeConfig,
    team: Team = ALONE,
    output: Entropy | Agreement | None = None,
    factors: Factors | None = None,
) -> Iterator[Callable[[], Tensor]]:
    """Give the very step of ``nsc.learning.loop``, to run again and again on the same batches.

    Args:
        model: body of the base.
        stack: the adapters, whitened or not.
        targets: names of the measured modules.
        batches: this rank's share of a step.
        config: settings of learning.
        team: the processes that share the step.
        output: entropy or agreement, for the objectives that have one.
        factors: layer -> A, B at which fitted factors start, if they are what is learned.

    Yields:
        A function that takes one step and returns its loss ().
    """
    run = replace(config, steps=MOST_STEPS)
    with prepared(model, stack, targets, batches, run, output=output, factors=factors) as (state, passes):

        def step() -> Tensor:
            take_step(state, lambda _: passes.gradient(batches), team, [])
            return state.losses[state.step - 1]

        yield step


class Floor:
    """The frozen body alone, run as far as every step must run it.

    Args:
        body: without adapters.
        first: name of the first module with LoRA.
        last: name of the last target; None to run to the end.
        output: for a run to the end, states and batch -> what a step makes of them (): the heads and the loss.
    """

    def __init__(
        self,
        body: nn.Module,
        first: str,
        last: str | None,
        output: Callable[[Tensor, Batch], Tensor] = lambda states, batch: states.sum(),
    ) -> None:
        self.body, self.last, self.output = body, last, output
        self._leaf = self._reached = torch.empty(0)
        body.get_submodule(first).register_forward_hook(self._begin)
        if last is not None:
            body.get_submodule(last).register_forward_pre_hook(self._end)

    def __call__(self, batch: Batch) -> Tensor:
        """Run forward to the last target's input, or to the end, and backward to the first module's output.

        Args:
            batch: rows on the body's device.

        Returns:
            The gradient of the sum of the last target's input, or of the output, to the first module's output; or that
            input, if it needs none.

        Raises:
            NSCError: if the last target never runs.
        """
        try:
            states = self.body(**batch.arguments(next(self.body.parameters()).dtype))[0]
        except LastTargetSeen:
            reached = self._reached.sum()
        else:
            if self.last is not None:
                raise NSCError("the last target never ran in this model's forward")
            reached = self.output(states, batch)
        z, leaf = self._reached, self._leaf
        self._leaf = self._reached = torch.empty(0)
        if not reached.requires_grad:
            return z
        reached.backward()
        return leaf.grad  # type: ignore[return-value]

    def _begin(self, _module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        self._leaf = output.detach().requires_grad_()
        return self._leaf

    def _end(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._reached = args[0]
        raise LastTargetSeen


def sharing_weights(model: nn.Module) -> nn.Module:
    """Return a second model on the same parameters and buffers.

    Args:
        model: any module.

    Returns:
        A copy of its structure.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def time_by_turns(
    calls: Mapping[str, Callable[[], Any]], rounds: int, warmup: int, device: torch.device
) -> dict[str, list[tuple[float, float]]]:
    """Time several functions in the same rounds, one after the other.

    Args:
        calls: name -> function.
        rounds: how often each is timed.
        warmup: rounds before, which are not timed.
        device: device that is synchronised after every call.

    Returns:
        Name -> seconds on the clock and CPU seconds of each round.
    """
    took: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for turn in range(warmup + rounds):
        for name, call in calls.items():
            started, cpu = time.perf_counter(), time.process_time()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn >= warmup:
                took[name].append((time.perf_counter() - started, time.process_time() - cpu))
    return took


def count_flops(step: Callable[[], Any]) -> int:
    """Count the FLOPs of every matrix product of one eager step, including all pairs of tokens in fused attention.

    Args:
        step: function that runs one step.

    Returns:
        FLOPs.
    """
    with FlopCounterMode(display=False, custom_mapping=dict(_formulas())) as counter:
        step()
    return counter.get_total_flops()


def _product(rows: Sequence[int], matrix: Sequence[int]) -> int:
    return 2 * math.prod(rows) * math.prod(matrix) // rows[-1]


FLOPS: dict[str, Callable[..., int]] = {  # of the shapes of an op's arguments
    "nsc::lora_down": lambda z, A, *_, **__: _product(z, A),
    "nsc::lora_down_backward": lambda dz, du, de, z, A, **_: _product(du, A) if du else 0,
    "nsc::lora_up": lambda y, u, c, B, **_: _product(u, B),
    "nsc::lora_up_backward": lambda dy, u, c, B, *_, **__: _product(dy, B),
    "nsc::lora_fold": lambda W, B, c, A, **_: _product(B, A),
    "nsc::lora_fold_backward": lambda dW, B, c, A, *_, **__: _product(dW, A),
    "aten::_scaled_dot_product_flash_attention_for_cpu": lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": (
        lambda dy, q, k, v, *_, **__: sdpa_backward_flop_count(dy, q, k, v)
    ),
}


def _formulas() -> Iterator[tuple[Any, Callable[..., int]]]:
    """The operators that this torch has, and the FLOPs of the shapes of their arguments."""
    for name, formula in FLOPS.items():
        namespace, _, op = name.partition("::")
        if hasattr(getattr(torch.ops, namespace), op):
            yield getattr(getattr(torch.ops, namespace), op), formula
