"""Interrupted, killed and resumed: bit for bit where the uninterrupted run ends."""

import io
import multiprocessing
import os
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch

import nsc.learning.loop as learning
from nsc.errors import ResumeError
from nsc.learning.state import State
from tests.learning.test_loop import CONFIG, run, setting  # noqa: F401


@pytest.mark.parametrize("stop", [1, 5, 11])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_equals_uninterrupted(setting, tmp_path, stop, number):  # noqa: F811
    whole = run(setting)
    calls = count()

    def interrupting(step):
        if next(calls) == stop + 1:  # one call is made before the loop
            signal.raise_signal(number)
        return setting[2](step)

    checkpoint = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        run(setting, batches=interrupting, checkpoint=checkpoint)
    assert torch.load(checkpoint)["step"] == stop + 1
    resumed = run(setting, checkpoint=checkpoint, resume=True)
    assert torch.equal(resumed.coefficients, whole.coefficients)
    assert resumed.losses == whole.losses


# Where SIGKILL strikes: at which call of what, and whether before it, in the middle or after.
KILLS = [
    ("step", 3, "before"),
    ("save", 1, "middle"),
    ("replace", 1, "before"),
    ("replace", 1, "after"),
    ("save", 2, "before"),
    ("fsync", 1, "before"),
    ("step", 1, "after"),
    ("save", 1, "after"),
    ("fsync", 2, "after"),
    ("replace", 2, "before"),
]
PLACES = {"save": (torch, "save"), "fsync": (os, "fsync"), "replace": (os, "replace"), "step": (State, "update")}


def test_killed_again_and_again_equals_uninterrupted(setting, tmp_path, monkeypatch):  # noqa: F811
    """One history of processes, each killed at another point and resumed by the next."""
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", -1)  # a checkpoint after every step
    whole, checkpoint, reached = run(setting), tmp_path / "state.pt", []
    for place, turn, when in KILLS:
        child = multiprocessing.get_context("fork").Process(
            target=run_until_killed, args=(setting, checkpoint, place, turn, when)
        )
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, (place, turn, when)
        reached.append(torch.load(checkpoint)["step"] if checkpoint.exists() else 0)
    assert reached == sorted(reached) and 0 < reached[-1] < CONFIG.steps
    resumed = run(setting, checkpoint=checkpoint, resume=True)
    assert torch.equal(resumed.coefficients, whole.coefficients) and resumed.losses == whole.losses


def run_until_killed(merge, checkpoint, place, turn, when):
    """Learn on, from the checkpoint if there is one, and die at the ``turn``-th call of ``place``."""
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    owner, name = PLACES[place]
    function, calls = getattr(owner, name), count(1)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*args):
        last = next(calls) == turn
        if last and when == "before":
            die()
        if last and when == "middle":
            state, file = args
            function(state, whole := io.BytesIO())
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            die()
        result = function(*args)
        if last:
            die()
        return result

    setattr(owner, name, deadly)
    run(merge, checkpoint=checkpoint, resume=checkpoint.exists())


def test_a_finished_run_can_be_continued_further(setting, tmp_path):  # noqa: F811
    checkpoint = tmp_path / "state.pt"
    run(setting, replace(CONFIG, steps=5), checkpoint=checkpoint)
    longer = run(setting, checkpoint=checkpoint, resume=True)
    assert torch.equal(longer.coefficients, run(setting).coefficients)


def test_resume_refuses_what_is_missing_broken_or_of_another_merge(setting, tmp_path):  # noqa: F811
    checkpoint = tmp_path / "state.pt"
    with pytest.raises(ResumeError, match="nothing to resume"):
        run(setting, checkpoint=checkpoint, resume=True)
    run(setting, checkpoint=checkpoint, identity="one")
    with pytest.raises(ResumeError, match="other adapters, data or settings"):
        run(setting, checkpoint=checkpoint, resume=True, identity="another")
    checkpoint.write_bytes(checkpoint.read_bytes()[:100])
    with pytest.raises(ResumeError, match="cannot be read"):
        run(setting, checkpoint=checkpoint, resume=True)
