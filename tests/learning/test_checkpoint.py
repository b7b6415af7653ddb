"""Interrupted, killed and resumed: bit for bit where the uninterrupted run ends."""

import multiprocessing
import os
import random
import signal
from dataclasses import replace
from itertools import count

import pytest
import torch

import nsc.learning.checkpoint as learned_state
import nsc.learning.loop as learning
from nsc.errors import ResumeError
from nsc.learning.state import State
from nsc.seal import sealed, unsealed
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
    assert unsealed(checkpoint.read_bytes())[1]["step"] == stop + 1
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
PLACES = {
    "save": (learned_state, "sealed"),
    "fsync": (os, "fsync"),
    "replace": (os, "replace"),
    "step": (State, "update"),
}


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
        reached.append(unsealed(checkpoint.read_bytes())[1]["step"] if checkpoint.exists() else 0)
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
            whole = function(*args)
            checkpoint.with_suffix(".tmp").write_bytes(whole[: len(whole) // 2])
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


@pytest.fixture
def half_way(setting, tmp_path):  # noqa: F811
    """A checkpoint at step 5, and how a run of seven more goes on from it."""
    checkpoint = tmp_path / "state.pt"
    run(setting, replace(CONFIG, steps=5), checkpoint=checkpoint)
    return checkpoint, lambda: run(setting, checkpoint=checkpoint, resume=True)


def test_flipped_bits_are_refused_or_change_nothing(setting, half_way):  # noqa: F811
    checkpoint, resume = half_way
    whole, sound, places = run(setting).coefficients, checkpoint.read_bytes(), random.Random(0)
    for _ in range(40):
        content, place = bytearray(sound), places.randrange(8 * len(sound))
        content[place // 8] ^= 1 << place % 8
        checkpoint.write_bytes(content)
        try:
            resumed = resume()
        except ResumeError as error:
            assert "remove it" in str(error) and "\n" not in str(error)
        else:
            assert torch.equal(resumed.coefficients, whole)


IMPOSSIBLE = {
    "no moments": lambda t, f: [t.pop(name) for name in list(t) if name.startswith("moment")],
    "one moment": lambda t, f: t.pop("moment.exp_avg_sq"),
    "moments of another shape": lambda t, f: t.update({"moment.exp_avg": t["moment.exp_avg"][:1].clone()}),
    "NaN moments": lambda t, f: t["moment.exp_avg"].fill_(float("nan")),
    "negative second moments": lambda t, f: t["moment.exp_avg_sq"].sub_(1),
    "infinite Adam step": lambda t, f: t["moment.step"].fill_(float("inf")),
    "Adam step 0": lambda t, f: t["moment.step"].zero_(),
    "beyond the bound": lambda t, f: t["theta"].fill_(9.0),
    "infinite coefficients": lambda t, f: t["theta"].fill_(float("inf")),
    "coefficients of another shape": lambda t, f: t.update(theta=t["theta"][:-1].clone()),
    "a best step that was never measured": lambda t, f: f.update(kept=3, curve={"2": [0.1]}),
    "losses of other steps": lambda t, f: t.update(losses=t["losses"][:-1].clone()),
    "NaN losses": lambda t, f: t["losses"].fill_(float("nan")),
    "negative step": lambda t, f: f.update(step=-1),
    "text for a step": lambda t, f: f.update(step="5"),
    "true for a step": lambda t, f: f.update(step=True),
    "no tokens": lambda t, f: f.update(tokens=0),
    "no curve": lambda t, f: f.pop("curve"),
    "a curve by words": lambda t, f: f.update(curve={"first": [0.1]}),
    "no losses": lambda t, f: t.pop("losses"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_a_state_that_no_run_has_written_is_refused_though_it_is_sealed(half_way, name):
    checkpoint, resume = half_way
    tensors, facts = unsealed(checkpoint.read_bytes())
    IMPOSSIBLE[name](tensors, facts)
    checkpoint.write_bytes(sealed(tensors, facts))
    with pytest.raises(ResumeError, match="or remove it to start again"):
        resume()


def test_a_pickle_is_never_loaded(half_way):
    checkpoint, resume = half_way
    torch.save({"identity": "", "step": 5}, checkpoint)
    with pytest.raises(ResumeError, match=r"cannot be read .*; finish it with that version, or remove it"):
        resume()


def test_a_full_disk_leaves_the_last_checkpoint(setting, half_way, monkeypatch):  # noqa: F811
    checkpoint, resume = half_way
    before = checkpoint.read_bytes()

    def full(number):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ResumeError, match=r"cannot be written .*No space left on device"):
            resume()
    assert checkpoint.read_bytes() == before
    assert torch.equal(resume().coefficients, run(setting).coefficients)
