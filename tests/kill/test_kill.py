"""Merges killed by SIGKILL: what is there afterwards is whole or absent, and going on ends where no kill would have.

A merge of the command line runs in a process of its own. Python's audit events tell it of each file that it opens for
writing, renames or removes, and it kills itself at one of them. ``make kill`` takes every one of these events, and 100
random moments; ``make test`` a handful.

``make kill`` forks its processes from a server that has imported what a merge needs and has done nothing else. Forks of
pytest share tqdm's lock: one that is killed while it holds that lock hangs all later ones. ``make test`` kills at file
events only, where no lock is held, and forks pytest itself, which has imported everything anyway.
"""

import faulthandler
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

import nsc.learning.loop as learning
from nsc.cli import app
from nsc.export.record import Record
from nsc.paths import CHECKPOINT

RANDOM = int(os.environ.get("KILLS", "0"))
HANDFUL = 3
HUNG_SECONDS = 100  # of a merge that takes less than one
CONTEXT = multiprocessing.get_context("forkserver" if RANDOM else "fork")
if RANDOM:
    CONTEXT.set_forkserver_preload(
        [
            __name__,
            "matplotlib.backends.backend_agg",
            "nsc.cli.job",
            "nsc.export.output",
            "nsc.export.proof",
            "nsc.merging.api",
            "peft.utils.transformers_weight_conversion",
            "transformers.modelcard",
            "transformers.models.llama.modeling_llama",
        ]
    )
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "shutil.copyfile", "fsync")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def merge(command: list[str], home: Path, event: int | None = None) -> None:
    """Run in a child: the merge, which dies at a file event below ``home``, or notes how many there are."""
    torch.set_num_threads(1)  # a thread pool does not survive a fork
    learning.CHECKPOINT_SECONDS = -1  # a checkpoint after every step
    seen, sync = 0, os.fsync

    def hook(name: str, args: tuple) -> None:
        nonlocal seen
        writes = name in CHANGES or (name == "open" and isinstance(args[2], int) and args[2] & WRITES)
        if writes and any(isinstance(arg, (str, os.PathLike)) and str(arg).startswith(str(home)) for arg in args):
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    os.fsync = lambda handle: (hook("fsync", (home,)), sync(handle))[1]
    sys.addaudithook(hook)
    os.dup2(os.open(home.parent / f"{home.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdout = sys.stderr
    faulthandler.dump_traceback_later(HUNG_SECONDS, exit=True, file=2)
    try:
        app(command, standalone_mode=False)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    (home.parent / f"{home.name}.events").write_text(str(seen))
    os._exit(0)


def die_with_the_lock_of_the_bars() -> None:
    tqdm.get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)


def started(command: list[str], home: Path, event: int | None = None):
    child = CONTEXT.Process(target=merge, args=(command, home, event))
    child.start()
    return child


def finished(command: list[str], home: Path, event: int | None = None) -> int | None:
    child = started(command, home, event)
    child.join(HUNG_SECONDS + 20)
    return child.exitcode


@pytest.fixture(scope="module")
def command(base, adapters, texts, tmp_path_factory) -> Callable[[Path], list[str]]:
    """The merge of two adapters, in four steps, into a folder."""
    rows = tmp_path_factory.mktemp("rows")
    pairs: list[str] = []
    for task in ("plain", "rslora"):
        (rows / f"{task}.txt").write_text("\n".join(texts[task]))
        pairs += ["--adapter", f"{task}={adapters[task]}", "--data", f"{task}={rows / task}.txt"]
    return lambda home: [
        "merge",
        "--base",
        str(base),
        *pairs,
        "--out",
        str(home / "out"),
        "--steps",
        "4",
        "--lr",
        "0.05",
    ]


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory) -> tuple[Path, int, float]:
    """The merge that nobody kills, how many file events it has, and its seconds."""
    home = tmp_path_factory.mktemp("whole") / "home"
    home.mkdir()
    if RANDOM:
        finished(["--help"], home)  # the server imports first, which is no part of the seconds of a merge
    began = time.monotonic()
    assert finished(command(home), home) == 0, home.with_name("home.log").read_text()
    events = int(home.with_name("home.events").read_text())
    assert events > 20
    return home / "out", events, time.monotonic() - began


def contents(out: Path) -> dict[str, bytes]:
    """What has to be the same bits, whenever it was made."""
    return {name: (out / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")}


def require_sound(home: Path, command: list[str], whole: Path) -> None:
    """A folder is there as a whole or not at all; going on gives the same bits, and leaves nothing behind."""
    out, partial = home / "out", home / "out.partial"
    if not out.exists():
        resume = ["--resume"] if (partial / CHECKPOINT).exists() else []
        assert finished([*command, *resume], home) == 0, home.with_name(f"{home.name}.log").read_text()
        assert not partial.exists(), [p.name for p in partial.iterdir()]
    record, expected = Record.read(out), Record.read(whole)
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in whole.iterdir())
    assert record.verified and torch.equal(record.coefficients, expected.coefficients)
    assert contents(out) == contents(whole)


def test_killed_at_file_events(command, whole, tmp_path):
    expected, events, _ = whole
    chosen = range(events) if RANDOM else random.Random(0).sample(range(events), HANDFUL)
    for event in chosen:
        home = tmp_path / f"event-{event}"
        home.mkdir()
        assert finished(command(home), home, event) == -signal.SIGKILL, event
        require_sound(home, command(home), expected)
        shutil.rmtree(home)


@pytest.mark.skipif(not RANDOM, reason="make kill")
def test_killed_at_random_moments(command, whole, tmp_path):
    expected, _, seconds = whole
    moments = random.Random(1)
    for number in range(RANDOM):
        home = tmp_path / f"moment-{number}"
        home.mkdir()
        child = started(command(home), home)
        time.sleep(moments.uniform(0, seconds))
        child.kill()
        child.join(60)
        require_sound(home, command(home), expected)
        shutil.rmtree(home)


@pytest.mark.skipif(not RANDOM, reason="make kill")
def test_killed_with_the_lock_of_the_bars(command, tmp_path):
    tqdm.get_lock()  # which a fork of this process would share
    child = CONTEXT.Process(target=die_with_the_lock_of_the_bars)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert finished(command(tmp_path), tmp_path) == 0, tmp_path.with_name(f"{tmp_path.name}.log").read_text()
