"""A merge said by a file is the merge said by flags; every wrong word in it is named with the right one."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from nsc.checks import expected
from nsc.cli.job import Job, gather, read_assignment, read_file
from nsc.config import PRESETS, MergeConfig
from nsc.errors import NSCError
from tests.cli.test_cli import refused, run

JOB = dict(base="b", adapters={"a": "x"}, data={"a": "y"}, out="o")


def written(path: Path, **values) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def said(base, adapters, texts, tmp_path) -> dict:
    """What two adapters of the tiny LLaMA need, as a file has it."""
    tasks = ("plain", "rslora")
    for task in tasks:
        (tmp_path / f"{task}.txt").write_text("\n".join(texts[task]))
    return dict(
        base=str(base),
        adapters={task: str(adapters[task]) for task in tasks},
        data={task: str(tmp_path / f"{task}.txt") for task in tasks},
    )


def test_a_file_says_what_the_flags_say(said, tmp_path):
    settings = dict(steps=2, lr="1e-2", max_drift=None, target_modules=["v_proj"], target_blocks=[2], graphs=False)
    file = written(tmp_path / "a.yaml", **said, out=str(tmp_path / "a"), rank=6, seed=3, tokens_per_pass=40, **settings)
    assert run("merge", "--config", file).exit_code == 0
    flags = ["--steps", 2, "--lr", 0.01, "--max-drift", -1, "--target-module", "v_proj", "--target-block", 2]
    flags += ["--no-graphs", "--rank", 6, "--seed", 3, "--tokens-per-pass", 40, "--base", said["base"]]
    for task, path in said["adapters"].items():
        flags += ["--adapter", f"{task}={path}", "--data", f"{task}={said['data'][task]}"]
    assert run("merge", *flags, "--out", tmp_path / "b").exit_code == 0
    first, second = (yaml.safe_load((tmp_path / out / "merge.yaml").read_text()) for out in "ab")
    assert first["settings"] == second["settings"] and first["rank"] == second["rank"] == 6
    assert first["settings"]["lr"] == 0.01 and first["settings"]["max_drift"] is None
    assert (tmp_path / "a/adapter_model.safetensors").read_bytes() == (
        tmp_path / "b/adapter_model.safetensors"
    ).read_bytes()


def test_a_saved_record_is_such_a_file(said, tmp_path):
    file = written(tmp_path / "a.yaml", **said, steps=2, lr=0.05, seed=5, batch_size=1)
    assert run("merge", "--config", file, "--out", tmp_path / "first").exit_code == 0
    again = run("merge", "--config", tmp_path / "first/merge.yaml", "--out", tmp_path / "second")
    assert again.exit_code == 0, again.stderr
    one, two = (load_file(tmp_path / out / "coefficients.safetensors")["coefficients"] for out in ("first", "second"))
    assert one.equal(two) and (one != 0.4).any()


def test_what_goes_before_what(tmp_path):
    file = written(tmp_path / "a.yaml", **JOB, preset="vit", lr=0.5, seed=1, dtype="bfloat16")
    flags = dict(steps=7, out="p", adapters={"b": "z"}, data={"b": "w"})
    job, settings = gather(flags, ["seed=2", "steps=8"], file)
    assert job == Job("b", {"a": "x", "b": "z"}, {"a": "y", "b": "w"}, "p", preset="vit")
    assert settings == MergeConfig(steps=7, lr=0.5, batch_size=32, seed=2, dtype="bfloat16")
    _, settings = gather(dict(preset="fast"), [], file)
    assert settings == MergeConfig(**PRESETS["fast"], batch_size=32, seed=1, dtype="bfloat16")


@pytest.mark.parametrize(
    ("preset", "steps", "lr", "batch_size"),
    [("vit", 100, 1e-3, 32), ("llama", 500, 3e-4, 2), ("llava", 500, 3e-4, 1), ("paper", 500, 3e-4, 2)],
)
def test_the_papers_settings(preset, steps, lr, batch_size):
    _, settings = gather(JOB | {"preset": preset})
    assert settings == MergeConfig(steps=steps, lr=lr, batch_size=batch_size, start=0.4, weight_decay=0.0)
    assert MergeConfig.preset(preset) == settings and settings.lr * settings.steps <= settings.max_drift + 1e-12


def test_every_field_can_be_said(tmp_path):
    """And means what it meant: a config, written plainly, comes back equal."""
    config = MergeConfig(target_modules=("q_proj",), target_blocks=(1, 2), max_drift=None, betas=(0.5, 0.6), shard=True)
    file = written(tmp_path / "a.yaml", **JOB, **config.to_dict())
    assert gather({}, [], file)[1] == config
    assert gather({}, [], written(tmp_path / "b.yaml", **JOB, settings=config.to_dict()))[1] == config
    words = [f"{key}={yaml.safe_dump(value).removesuffix('...' + chr(10))}" for key, value in config.to_dict().items()]
    assert len(words) == len(fields(MergeConfig)) and gather(JOB, words)[1] == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(step=5), "unknown key step; did you mean steps? Known keys: adapters, base, base_id, batch_size"),
        (dict(adapter={"a": "x"}), "unknown key adapter; did you mean adapters?"),
        (dict(settings={"learning_rate": 1}), "unknown key learning_rate; did you mean "),
        (dict(settings=[1]), "settings must be a mapping of settings to values, not [1]"),
        (dict(methods="nsc"), "unknown key methods; did you mean method?"),
        (dict(method="tie"), "there is no method tie; did you mean "),
        (dict(method="task-arithmetic", steps=5), "of method task-arithmetic, unknown key steps; did you mean "),
        (dict(steps="many"), "steps must be a whole number, not 'many'"),
        (dict(steps=1.5), "steps must be a whole number, not 1.5"),
        (dict(steps=True), "steps must be a whole number, not True"),
        (dict(lr="fast"), "lr must be a number, not 'fast'"),
        (dict(lr=True), "lr must be a number, not True"),
        (dict(max_drift="far"), "max_drift must be a number or null, not 'far'"),
        (dict(graphs="yes, please"), "graphs must be true or false, not 'yes, please'"),
        (dict(dtype=None), "dtype must be text, not None"),
        (dict(target_modules="o_proj"), "target_modules must be a list of text or null, not 'o_proj'"),
        (dict(betas=[0.9]), "betas must be a list of 2: a number, a number, not [0.9]"),
        (dict(adapters=["x"]), "adapters must be a mapping of text to text, not ['x']"),
        (dict(adapters={"a": ["x"]}), "adapters must be a mapping of text to text"),
        (dict(preset="slow"), "unknown preset 'slow'; the presets are paper, fast, vit, llama, llava"),
        (dict(lr=-1), "lr must be positive, not -1"),
    ],
    ids=str,
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, change, message):
    file = written(tmp_path / "a.yaml", **JOB | change)
    text = refused(run("merge", "--config", file))
    unplaced = "preset" in change or change.get("lr") == -1 or change.get("method") == "tie"
    assert message in text and "\n" not in text and (str(file) in text or unplaced)


def test_what_is_wrong_in_an_assignment_is_named():
    assert read_assignment("target_modules=[q_proj, v_proj]") == ("target_modules", ("q_proj", "v_proj"))
    assert read_assignment("lr=1e-3") == ("lr", 1e-3) and read_assignment("max_drift=") == ("max_drift", None)
    for text, message in {
        "steps": "--set 'steps' must read KEY=VALUE",
        "stepz=1": "--set unknown key stepz; did you mean steps?",
        "base=x": "--set unknown key base",
        "steps=x": "--set steps must be a whole number, not 'x'",
        "steps=[": "--set steps: '[' is not valid YAML",
    }.items():
        with pytest.raises(NSCError) as error:
            read_assignment(text)
        assert message in str(error.value)


def test_what_is_missing_can_be_said_both_ways(tmp_path):
    text = refused(run("merge", "--base", "b", "--out", tmp_path / "o"))
    assert text.strip() == (
        "a merge needs adapters: give --adapter TASK=PATH, or adapters: in the file of --config;"
        " data: give --data TASK=FILE, or data: in the file of --config"
    )
    text = refused(run("merge", "--config", written(tmp_path / "a.yaml", adapters={"a": "x"})))
    assert "needs base: give --base, or base: in" in text and "out: give --out" in text and "adapters" not in text


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "a.yaml").write_text("a: [")
    (tmp_path / "b.yaml").write_text("- a\n")
    for name, message in (("a", "cannot be read as YAML"), ("b", "must hold a mapping"), ("c", "cannot be read")):
        with pytest.raises(NSCError, match=message):
            read_file(tmp_path / f"{name}.yaml")


def test_set_reaches_the_merge(said, tmp_path):
    file = written(tmp_path / "a.yaml", **said)
    done = run("merge", "--config", file, "--out", tmp_path / "o", "--set", "steps=1", "--set", "evaluation_samples=2")
    assert done.exit_code == 0, done.stderr
    settings = yaml.safe_load((tmp_path / "o/merge.yaml").read_text())["settings"]
    assert settings["steps"] == 1 and settings["evaluation_samples"] == 2


def test_types_in_words():
    assert expected(dict[str, float] | None) == "a mapping of text to a number or null"
