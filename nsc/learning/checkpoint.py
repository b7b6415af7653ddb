"""The state of learning in a file, and back: sealed, so that it is either what was written or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsc.checks import typed
from nsc.errors import ResumeError, one_line, reading
from nsc.learning.state import State
from nsc.seal import sealed, unsealed

FACTS = {"identity": str, "step": int, "tokens": int | None, "curve": dict[str, list[float]], "kept": int}
MOMENT = "moment."  # before the names of the optimizer's tensors
REMEDY = "it is damaged, or another version of nsc wrote it; finish it with that version, or remove it to start again"


def save(state: State, path: Path, tokens: int | None) -> None:
    """Write the state to a file atomically: the file holds either the old state or the new one, and never NaN.

    Args:
        state: state of the run.
        path: path of the file.
        tokens: the most that one pass held, since where a step is split decides the last bits.

    Raises:
        NonFiniteError: if the state is not finite; the file stays as it was.
        ResumeError: if the file cannot be written; it stays as it was.
    """
    state.require_finite()
    tensors = {"theta": state.theta, "losses": state.losses[: state.step], **_moments(state.optimizer.state_dict())}
    if state.best is not None:
        tensors["best"] = state.best
    facts = {
        "identity": state.identity,
        "step": state.step,
        "tokens": tokens,
        "curve": {str(step): distances for step, distances in state.curve.items()},
        "kept": state.kept,
    }
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(sealed(tensors, facts))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ResumeError(
            f"checkpoint {path} cannot be written ({one_line(error)}); free space there, and resume from the last one"
        ) from error


def _moments(optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that an optimizer of one parameter keeps, by name."""
    kept = optimizer["state"].get(0, {})
    return {MOMENT + name: value for name, value in kept.items() if isinstance(value, Tensor)}


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
    with reading(f"checkpoint {path}", REMEDY, ResumeError):
        tensors, facts = unsealed(path.read_bytes())
        stored = {name: typed(facts[name], kind) for name, kind in FACTS.items()}
        stored["curve"] = {int(step): distances for step, distances in stored["curve"].items()}
        stored["moments"] = {n.removeprefix(MOMENT): x for n, x in tensors.items() if n.startswith(MOMENT)}
        stored |= {"theta": tensors["theta"], "losses": tensors["losses"], "best": tensors.get("best")}
    if stored["identity"] != identity:
        raise ResumeError(
            f"checkpoint {path} was made with other adapters, data or settings; resume with the same ones, or remove it"
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

    Raises:
        ResumeError: naming what cannot be of this run, which is left as it was.
    """
    if wrong := _impossible(state, stored):
        raise ResumeError(f"the checkpoint's {wrong} cannot be of this merge; {REMEDY}")
    state.theta.copy_(stored["theta"])
    own = state.optimizer.state_dict()["param_groups"]  # of this device
    kept = {0: dict(stored["moments"])} if stored["moments"] else {}
    state.optimizer.load_state_dict({"state": kept, "param_groups": own})
    state.step = stored["step"]
    state.done.fill_(state.step)
    state.losses[: state.step] = stored["losses"].to(state.losses)
    state.curve, state.kept = stored["curve"], stored["kept"]
    state.best = None if stored["best"] is None else stored["best"].to(state.theta)


def _impossible(state: State, stored: dict[str, Any]) -> str | None:
    """The first stored value that no run with this state can have written, in words."""
    step, moments, curve = stored["step"], stored["moments"], stored["curve"]
    adam = not isinstance(state.optimizer, torch.optim.SGD) and step > 0
    best = stored["theta"] if stored["best"] is None else stored["best"]
    taken, second = (moments.get(name, torch.zeros(())) for name in ("step", "exp_avg_sq"))
    checks = {
        "step": 0 <= step <= len(state.losses),
        "tokens": stored["tokens"] is None or stored["tokens"] >= 1,
        "losses": stored["losses"].shape == (step,) and _finite(stored["losses"]),
        "coefficients": _within(stored["theta"], state) and _within(best, state),
        "moments": moments.keys() == ({"step", "exp_avg", "exp_avg_sq"} if adam else set())
        and all(x.shape == state.theta.shape and _finite(x) for n, x in moments.items() if n != "step")
        and bool((second >= 0).all()),
        "step of the optimizer": not adam or (taken.shape == () and taken.item() == step),
        "held-out distances": (not curve and stored["best"] is None)
        or (stored["kept"] in curve and stored["best"] is not None and all(0 <= s <= step for s in curve)),
    }
    return next((name for name, holds in checks.items() if not holds), None)


def _finite(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isfinite().all())


def _within(theta: Tensor, state: State) -> bool:
    """Whether a theta is of the state's shape, finite and within its bounds, up to the rounding of another device."""
    if theta.shape != state.theta.shape or not _finite(theta):
        return False
    theta, slack = theta.to(state.theta), 1e-5 * (1 + theta.abs().to(state.theta))
    return bool(((theta >= state.lower - slack) & (theta <= state.upper + slack)).all())
