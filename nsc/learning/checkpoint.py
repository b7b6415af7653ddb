"""The state of learning in a file, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nsc.errors import ResumeError
from nsc.learning.state import State


def save(state: State, path: Path, tokens: int | None) -> None:
    """Write the state to a file atomically: the file holds either the old state or the new one, and never NaN.

    Args:
        state: state of the run.
        path: path of the file.
        tokens: the most that one pass held, since where a step is split decides the last bits.

    Raises:
        NonFiniteError: if the state is not finite; the file stays as it was.
    """
    state.require_finite()
    stored = {
        "identity": state.identity,
        "step": state.step,
        "theta": state.theta.detach(),
        "moments": state.optimizer.state_dict()["state"],
        "losses": state.losses[: state.step].clone(),
        "tokens": tokens,
        "curve": state.curve,
        "best": state.best,
        "kept": state.kept,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        torch.save(stored, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read(path: Path | None, identity: str, steps: int) -> dict[str, Any]:
    """Read what ``save`` wrote.

    Args:
        path: path of the file.
        identity: digest that the checkpoint must have.
        steps: requested number of steps.

    Returns:
        The stored values by name.

    Raises:
        ResumeError: if the file is missing, damaged, of another merge, or past ``steps``.
    """
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
    if "theta" not in stored:
        raise ResumeError(
            f"checkpoint {path} was written by another version of nsc; finish it with that version, or remove it"
        )
    if stored["step"] > steps:
        past = f"is at step {stored['step']}, past the {steps} that were asked for"
        raise ResumeError(f"checkpoint {path} {past}; ask for at least as many, or remove it")
    return stored


@torch.no_grad()
def restore(state: State, stored: dict[str, Any]) -> None:
    """Continue a run from a checkpoint.

    Args:
        state: changed in place.
        stored: what ``read`` returned.
    """
    state.theta.copy_(stored["theta"])
    own = state.optimizer.state_dict()["param_groups"]  # of this device
    state.optimizer.load_state_dict({"state": stored["moments"], "param_groups": own})
    state.step = stored["step"]
    state.done.fill_(state.step)
    state.losses[: state.step] = stored["losses"].to(state.losses)
    state.curve, state.kept = stored.get("curve", {}), stored.get("kept", 0)
    best = stored.get("best")
    state.best = None if best is None else best.to(state.theta)
