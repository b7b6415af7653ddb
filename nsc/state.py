"""The state of a run: coefficients, moments and losses; one update of it, on its device; to disk and back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc.config import MergeConfig
from nsc.errors import NonFiniteError, ResumeError
from nsc.graphs import Graphs


@dataclass
class State:
    """Everything that a step changes lies in tensors that stay where they are, so that graphs may record it.

    lam: (M, K) coefficients, each between ``lower`` and ``upper``.  loss: () of the step under way.  losses: (steps,)
    of those taken.  done: (1,) how many that are, on the device; ``step`` is the host's own count.
    """

    lam: nn.Parameter
    optimizer: torch.optim.AdamW
    start: float
    lower: Tensor
    upper: Tensor
    frozen: Tensor
    identity: str
    loss: Tensor
    losses: Tensor
    done: Tensor
    graphs: Graphs
    step: int = 0

    def update(self) -> None:
        """One step of AdamW by ``lam.grad``, within the bounds; the loss is noted, and both are zero for the next."""
        self.graphs(self._update)
        self.step += 1

    @torch.no_grad()
    def _update(self) -> None:
        assert self.lam.grad is not None
        self.optimizer.step()
        self.lam.clamp_(self.lower, self.upper)
        self.losses.index_copy_(0, self.done, self.loss[None])
        self.done += 1
        self.lam.grad.zero_()
        self.loss.zero_()

    def require_finite(self) -> None:
        """Raise NonFiniteError if the last loss or a coefficient is NaN or infinite. Waits for the device."""
        if self.step and not torch.isfinite(self.losses[self.step - 1]):
            raise NonFiniteError(f"the objective became {self.losses[self.step - 1].item()} by step {self.step}")
        if not torch.isfinite(self.lam).all():
            raise NonFiniteError(f"a coefficient became NaN or infinite by step {self.step}")


def begin(lam: nn.Parameter, frozen: Tensor, config: MergeConfig, identity: str, graphs: Graphs | None = None) -> State:
    """The state before the first step; frozen: (M, K) bool, what is to keep its value."""
    reach = torch.full_like(lam, float("inf") if config.max_drift is None else config.max_drift)
    reach = torch.where(frozen, 0.0, reach.detach())
    optimizer = torch.optim.AdamW(
        [lam], lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay,
        fused=True, capturable=lam.is_cuda,
    )  # fmt: skip
    lam.grad = torch.zeros_like(lam)
    loss, losses = lam.new_zeros(()), lam.new_zeros(config.steps)
    done = torch.zeros(1, dtype=torch.int64, device=lam.device)
    lower, upper = config.start - reach, config.start + reach
    return State(
        lam, optimizer, config.start, lower, upper, frozen, identity, loss.detach(), losses.detach(), done,
        graphs or Graphs(),
    )  # fmt: skip


def save(state: State, path: Path, tokens: int | None) -> None:
    """Atomic: the file is either the old state or the new one, and never one that holds NaN.

    tokens: the most that a pass held; where a step is cut decides the last bits.
    """
    state.require_finite()
    stored = {
        "identity": state.identity,
        "step": state.step,
        "lam": state.lam.detach(),
        "moments": state.optimizer.state_dict()["state"],
        "losses": state.losses[: state.step].clone(),
        "tokens": tokens,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(stored, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path | None, identity: str, steps: int) -> dict[str, Any]:
    """What ``save`` stored. Raises ResumeError if it is missing, broken, of another merge or past ``steps``."""
    if path is None or not path.is_file():
        raise ResumeError(f"nothing to resume: there is no checkpoint at {path}")
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for one thing: the file is no checkpoint
        raise ResumeError(f"checkpoint {path} cannot be read ({error}); remove it to start again") from error
    if stored["identity"] != identity:
        raise ResumeError(
            f"checkpoint {path} was made with other adapters, data or settings; resume with the same ones, or remove it"
        )
    if "moments" not in stored:
        raise ResumeError(f"checkpoint {path} is of another version of nsc; finish it with that one, or remove it")
    if stored["step"] > steps:
        past = f"is at step {stored['step']}, past the {steps} that were asked for"
        raise ResumeError(f"checkpoint {path} {past}; ask for at least as many, or remove it")
    return stored


@torch.no_grad()
def restore(state: State, stored: dict[str, Any]) -> None:
    """Put what ``read`` gave into ``state``, as it goes on."""
    state.lam.copy_(stored["lam"])
    own = state.optimizer.state_dict()["param_groups"]  # of this device
    state.optimizer.load_state_dict({"state": stored["moments"], "param_groups": own})
    state.step = stored["step"]
    state.done.fill_(state.step)
    state.losses[: state.step] = stored["losses"].to(state.losses)
