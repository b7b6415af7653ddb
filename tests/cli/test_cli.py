"""The command line as a user meets it: results, plain errors, interrupts and resumes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from nsc.cli import app
from nsc.config import MergeConfig
from nsc.learning import loop
from tests.export.test_proof import ADAPTER, FULL, corrupted
from tests.tiny import rewrite

STEPS = 200
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory, texts) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("data")
    for task, rows in texts.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": row, "label": 1}) + "\n" for row in rows))
    return {task: folder / f"{task}.jsonl" for task in texts}


@pytest.fixture
def arguments(base, adapters, files):
    """``nsc merge`` of two adapters; ``changes`` replace the tasks' adapters or data, ``more`` follows."""

    def build(out: Path, *more: object, adapter=(), data=(), where: object = base) -> list[str]:
        tasks = ("plain", "rslora")
        places = list(adapter) or [f"{task}={adapters[task]}" for task in tasks]
        rows = list(data) or [f"{task}={files[task]}" for task in tasks]
        pairs = [part for p in places for part in ("--adapter", p)] + [part for d in rows for part in ("--data", d)]
        return ["merge", "--base", str(where), *pairs, "--out", str(out), *map(str, more)]

    return build


def run(*args: object):
    return CliRunner().invoke(app, [str(a) for a in args])


def refused(result) -> str:
    """The one message of a refusal, after checking that it is one: exit code 1, no traceback, nothing on stdout."""
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit) and not result.stdout
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().split("nsc: ")
    assert len(last) == 2
    return last[1]


def coefficients(out: Path):
    return load_file(out / "coefficients.safetensors")["coefficients"]


def start(command: list[str], log: Path) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=open(log, "w"), env=environment, cwd=log.parent)


def wait_until(holds, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or hung, before the signal"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, base, adapters, files) -> Path:
    """``python -m nsc merge`` from beginning to end in a process of its own."""
    home = tmp_path_factory.mktemp("whole")
    pairs = [a for t in ("plain", "rslora") for a in ("--adapter", f"{t}={adapters[t]}", "--data", f"{t}={files[t]}")]
    command = ["merge", "--base", str(base), *pairs, "--out", str(home / "out"), "--steps", str(STEPS)]
    process = start([sys.executable, "-m", "nsc", *command], home / "stderr")
    stdout = process.communicate(timeout=120)[0].decode()
    told = (home / "stderr").read_text()
    assert process.returncode == 0, told
    assert re.fullmatch(r"proof: adapter: 16 modules reloaded, .*hidden states to .*\nwritten to .*out\n", stdout)
    assert f"{STEPS}/{STEPS}" in told and "measured at 1: layers.3.self_attn.v_proj" in told and "loss" in told
    assert not (home / "out.partial").exists()
    return home / "out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda n: n.name)
def test_an_interrupted_run_ends_where_the_uninterrupted_one_does(uninterrupted, tmp_path, arguments, number):
    out, checkpoint = tmp_path / "out", tmp_path / "out.partial" / "checkpoint.pt"
    often = "import nsc.learning.loop; nsc.learning.loop.CHECKPOINT_SECONDS = 0.1; from nsc.cli import app; app()"
    launcher = ["-c", often] if number == signal.SIGKILL else ["-m", "nsc"]
    command = arguments(out, "--steps", STEPS)
    process = start([sys.executable, *launcher, *command], log := tmp_path / "stderr")
    under_way = (
        checkpoint.exists if number == signal.SIGKILL else lambda: re.search(rf" [1-9]\d*/{STEPS}", log.read_text())
    )
    wait_until(under_way, process)
    process.send_signal(number)
    process.communicate(timeout=60)
    told = log.read_text()
    assert process.returncode == (-9 if number == signal.SIGKILL else 130) and "Traceback" not in told
    assert (
        checkpoint.exists() and not out.exists() and [p.name for p in checkpoint.parent.iterdir()] == ["checkpoint.pt"]
    )
    if number != signal.SIGKILL:
        assert told.endswith("nsc: interrupted; the coefficients so far are saved, go on with --resume\n")

    assert "there is an interrupted merge in" in refused(run(*command))
    assert "made with other adapters, data or settings" in refused(run(*command, "--resume", "--seed", 1))
    assert "past the 1 that were asked for" in refused(run(*arguments(out, "--steps", 1, "--resume")))
    resumed = run(*command, "--resume")
    assert resumed.exit_code == 0 and not re.search(rf"\b0/{STEPS}", resumed.stderr)
    assert coefficients(out).equal(coefficients(uninterrupted)) and not checkpoint.parent.exists()
    assert (out / "adapter_model.safetensors").read_bytes() == (
        uninterrupted / "adapter_model.safetensors"
    ).read_bytes()


def test_an_interrupt_before_anything_was_learned(monkeypatch, arguments, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("nsc.bases.loading.load_body", interrupt)
    result = run(*arguments(tmp_path / "out"))
    assert result.exit_code == 130 and result.stderr == "nsc: interrupted; nothing was saved\n"


@pytest.mark.parametrize("option", [(), ("--rank", 4), ("--full",)], ids=str)
def test_forms_and_their_replay(arguments, tmp_path, option):
    first = run(*arguments(tmp_path / "out", "--steps", 2, *option))
    assert first.exit_code == 0 and first.stdout.startswith(
        "proof: full model" if "--full" in option else "proof: adapter"
    )
    again = run("apply", tmp_path / "out", "--out", tmp_path / "again", *(o for o in option if o == "--full"))
    assert again.exit_code == 0 and f"written to {tmp_path / 'again'}" in again.stdout
    assert "exists already" in refused(run("apply", tmp_path / "out", "--out", tmp_path / "again"))
    name = "model.safetensors" if "--full" in option else "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert run("apply", tmp_path / "again", "--out", tmp_path / "exact", "--exact").exit_code == 0
    ranks = {
        t.shape[0] for key, t in load_file(tmp_path / "exact/adapter_model.safetensors").items() if "lora_A" in key
    }
    assert ranks == {8}
    assert "exclude one another" in refused(
        run("apply", tmp_path / "out", "--out", tmp_path / "x", "--exact", "--rank", 2)
    )


def test_options_reach_the_merge(arguments, tmp_path):
    more = [
        "--steps",
        1,
        "--lr",
        0.01,
        "--start",
        0.5,
        "--batch-size",
        1,
        "--max-length",
        3,
        "--max-drift",
        -1,
        "--seed",
        7,
    ]
    more += ["--target-module", "v_proj", "--target-block", 1, "--target-block", 2, "--dtype", "bfloat16"]
    more += ["--weight-decay", 0.1, "--tokens-per-pass", 9, "--layers", "weights"]
    more += ["--gradient-checkpointing", "--no-graphs"]
    assert run(*arguments(tmp_path / "out", *more)).exit_code == 0
    record = yaml.safe_load((tmp_path / "out/merge.yaml").read_text())
    assert record["targets"] == ["layers.1.self_attn.v_proj", "layers.2.self_attn.v_proj"]
    expected = dict(steps=1, lr=0.01, start=0.5, batch_size=1, max_length=3, max_drift=None, seed=7, weight_decay=0.1)
    expected |= dict(target_modules=["v_proj"], target_blocks=[1, 2], dtype="bfloat16", tokens_per_pass=9)
    expected |= dict(layers="weights", gradient_checkpointing=True, graphs=False)
    assert expected.items() <= record["settings"].items()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict(adapter=["plain"]), "--adapter 'plain' must read TASK=PLACE"),
        (dict(adapter=["=x"]), "--adapter '=x' must read TASK=PLACE"),
        (dict(data=["plain="]), "--data 'plain=' must read TASK=PLACE"),
        (dict(adapter=["a=x", "a=y"]), "--adapter names task a twice"),
        (dict(data=["plain=nowhere.jsonl", "rslora=x.jsonl"]), "data nowhere.jsonl does not exist"),
        (dict(data=["plain=x.jsonl"]), "no data for rslora"),
        (dict(adapter=["plain=/nowhere"], data=["plain=x.jsonl"]), "adapter folder /nowhere does not exist"),
        (dict(where="/nowhere"), "base '/nowhere' cannot be loaded"),
    ],
    ids=str,
)
def test_errors_are_one_line_and_nothing_is_left(arguments, tmp_path, change, said):
    text = refused(run(*arguments(tmp_path / "out", **change)))
    assert said in text and "\n" not in text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--preset", "slow"), "unknown preset 'slow'; the presets are paper, fast"),
        (("--tokens-per-pass", "many"), "--tokens-per-pass must be a whole number or auto, not 'many'"),
        (("--layers", "dense"), "layers must be one of auto, factors, weights, not dense"),
    ],
)
def test_options_that_cannot_be(arguments, tmp_path, options, said):
    assert said in refused(run(*arguments(tmp_path / "out", *options)))
    assert not list(tmp_path.iterdir())


def test_a_preset_gives_what_is_not_given(arguments, tmp_path):
    """The presets travel equally far; an option overrides its preset."""
    paper, fast = (MergeConfig.preset(name) for name in ("paper", "fast"))
    assert paper == MergeConfig() and paper.steps * paper.lr == pytest.approx(fast.steps * fast.lr)
    assert run(*arguments(tmp_path / "out", "--preset", "fast", "--steps", 1)).exit_code == 0
    settings = yaml.safe_load((tmp_path / "out/merge.yaml").read_text())["settings"]
    assert settings["steps"] == 1 and settings["lr"] == fast.lr


def test_existing_out_contradictions_and_nothing_to_resume(arguments, tmp_path):
    (tmp_path / "there").mkdir()
    assert "exists already" in refused(run(*arguments(tmp_path / "there")))
    assert "give one of them" in refused(run(*arguments(tmp_path / "out", "--rank", 4, "--full")))
    assert "'/nowhere' is no folder" in refused(run(*arguments(tmp_path / "out", "--full", where="/nowhere")))
    assert "there is no checkpoint at" in refused(run(*arguments(tmp_path / "out", "--resume")))
    assert "no readable record" in refused(run("apply", tmp_path, "--out", tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]


def test_an_unreadable_checkpoint(arguments, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial/checkpoint.pt").write_bytes(b"PK\x03\x04 torn")
    assert "cannot be read" in refused(run(*arguments(tmp_path / "out", "--resume")))


@pytest.mark.parametrize(("option", "case"), [((), "module dropped"), ((), "alpha doubled"), (("--full",), "NaN")])
def test_a_failed_proof_costs_neither_the_coefficients_nor_an_exit_code_zero(
    monkeypatch, arguments, tmp_path, option, case
):
    writer, cases = ("write_full_model", FULL) if option else ("write_adapter", ADAPTER)
    command = arguments(tmp_path / "out", "--steps", 2, *option)
    with monkeypatch.context() as patch:
        corrupted(patch, writer, cases[case])
        assert re.search(r"read back|lacks", refused(run(*command)))
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(loop, "take_step", None)  # nothing is learned again
    result = run(*command, "--resume")
    assert result.exit_code == 0 and (tmp_path / "out").is_dir() and not (tmp_path / "out.partial").exists()


def test_nan_in_the_base(arguments, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    rewrite(copy / "model.safetensors", lambda t: t["model.norm.weight"].fill_(float("nan")))
    assert "nan of their norm" in refused(run(*arguments(tmp_path / "out", "--steps", 1, where=copy)))
    assert not (tmp_path / "out").exists()


def test_inspect(adapters):
    result = run("inspect", *(adapters[t] for t in ("plain", "double")))
    assert result.exit_code == 0 and "plain" in result.stdout and "row-space overlap" in result.stdout
    report = json.loads(run("inspect", "--json", adapters["double"]).stdout)
    assert report[0]["name"] == "double" and report[0]["saved"] == ["score.weight"]
    assert "does not exist" in refused(run("inspect", "/nowhere"))
