"""The state of a run: coefficients, moments and losses; one update of it, on its device; to disk and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nsc.config import MergeConfig
from nsc.errors import NonFiniteError
from nsc.learning.coefficients import Coefficients
from nsc.learning.trained_factors import TrainedFactors
from nsc.runtime.cuda_graphs import Graphs


@dataclass
class State:
    """The state of a run, whose tensors stay where they are, so that graphs may record what changes them.

    Attributes:
        theta: what is optimised.
        coefficients: from theta to lam.
        optimizer: torch's optimizer.
        reach: how far a coefficient may be from its start, of theta's shape.
        lower: theta at the lower bound.
        upper: theta at the upper bound.
        frozen: (M, C) bool, which coefficients keep their value.
        factors: (steps,) the share of lr in each step; None for all of it.
        identity: digest of everything that the path depends on.
        loss: () of the step under way.
        losses: (steps,) of the steps taken.
        done: (1,) int64, how many steps are taken, on the device.
        graphs: graphs that record the update.
        step: how many steps are taken, on the host.
        curve: step -> distance of each task on held-out rows, if they are measured.
        best: theta at the step where their mean was least.
        kept: that step.
    """

    theta: nn.Parameter
    coefficients: Coefficients | TrainedFactors
    optimizer: torch.optim.Optimizer
    reach: Tensor
    lower: Tensor
    upper: Tensor
    frozen: Tensor
    factors: Tensor | None
    identity: str
    loss: Tensor
    losses: Tensor
    done: Tensor
    graphs: Graphs
    step: int = 0
    curve: dict[int, list[float]] = field(default_factory=dict)
    best: Tensor | None = None
    kept: int = 0

    def note(self, distances: list[float]) -> None:
        """Note the distances on held-out rows at the present step, and theta if it is the best so far.

        Args:
            distances: of each task.

        Raises:
            NonFiniteError: if one is NaN or infinite.
        """
        if not all(map(math.isfinite, distances)):
            raise NonFiniteError(f"the distance on held-out rows became {max(distances)} by step {self.step}")
        if self.best is None or sum(distances) < sum(self.curve[self.kept]):
            self.best, self.kept = self.theta.detach().clone(), self.step
        self.curve[self.step] = distances

    @torch.no_grad()
    def take_best(self) -> None:
        """Go back to the best theta that was noted, if any."""
        if self.best is not None:
            self.theta.copy_(self.best)

    @property
    def lam(self) -> Tensor:
        """The coefficients (M, C)."""
        return self.coefficients(self.theta.detach())

    def update(self) -> None:
        """Take one step by ``theta.grad`` within the bounds, note the loss, and zero both for the next step."""
        self.graphs(self._update)
        self.step += 1

    @torch.no_grad()
    def _update(self) -> None:
        assert self.theta.grad is not None
        before = None if self.factors is None else self.theta.clone()
        self.optimizer.step()
        if self.factors is not None and before is not None:  # every optimizer's step is proportional to its lr
            self.theta.copy_(torch.lerp(before, self.theta, self.factors.index_select(0, self.done)))
        self.theta.clamp_(self.lower, self.upper)
        self.coefficients.draw_back(self.theta, self.reach)
        self.losses.index_copy_(0, self.done, self.loss[None])
        self.done += 1
        self.theta.grad.zero_()
        self.loss.zero_()

    def require_finite(self) -> None:
        """Refuse a loss or coefficient that is NaN or infinite. Waits for the device.

        Raises:
            NonFiniteError: naming the step.
        """
        if self.step and not torch.isfinite(self.losses[self.step - 1]):
            raise NonFiniteError(f"the objective became {self.losses[self.step - 1].item()} by step {self.step}")
        if not torch.isfinite(self.theta).all():
            raise NonFiniteError(f"a coefficient became NaN or infinite by step {self.step}")


def begin(
    theta: nn.Parameter,
    frozen: Tensor,
    config: MergeConfig,
    identity: str,
    graphs: Graphs | None = None,
    coefficients: Coefficients | TrainedFactors | None = None,
) -> State:
    """Return the state before the first step.

    Args:
        theta: what is optimised.
        frozen: (M, C) bool, which coefficients keep their value.
        config: optimizer, schedule, bound.
        identity: digest of everything that the path depends on.
        graphs: graphs that record the update; none by default.
        coefficients: from theta to lam; the identity by default.

    Returns:
        The state.
    """
    coefficients = coefficients or Coefficients(torch.ones_like(frozen), config.start)
    reach = torch.full_like(theta, float("inf") if config.max_drift is None else config.max_drift)
    reach = torch.where(coefficients.by_row(frozen), 0.0, reach.detach())
    lower, upper = coefficients.box(reach)
    theta.grad = torch.zeros_like(theta)
    losses = theta.detach().new_zeros(config.steps)
    done = torch.zeros(1, dtype=torch.int64, device=theta.device)
    factors = schedule(config.schedule, config.steps)
    return State(
        theta,
        coefficients,
        make_optimizer(theta, config),
        reach,
        lower,
        upper,
        frozen,
        None if factors is None else factors.to(losses),
        identity,
        losses.new_zeros(()),
        losses,
        done,
        graphs or Graphs(),
    )


def make_optimizer(theta: nn.Parameter, config: MergeConfig) -> torch.optim.Optimizer:
    """Return AdamW, Adam or plain gradient descent, as torch has them.

    Args:
        theta: what is optimised.
        config: names the optimizer and its settings.

    Returns:
        The optimizer.
    """
    if config.optimizer == "sgd":
        return torch.optim.SGD([theta], lr=config.lr, weight_decay=config.weight_decay)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(
        [theta],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=theta.is_cuda,
    )


def schedule(kind: str, steps: int) -> Tensor | None:
    """Return the share of ``lr`` that each step takes.

    Args:
        kind: "constant", "linear" or "cosine".
        steps: number of steps of the run.

    Returns:
        (steps,) float64; None where it is constant.
    """
    done = torch.arange(steps, dtype=torch.float64) / max(1, steps)
    shares = {"constant": None, "linear": 1 - done, "cosine": (1 + (torch.pi * done).cos()) / 2}
    return shares[kind]
