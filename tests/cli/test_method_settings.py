"""How a method is said: by flags, files, records and Python, with what settings and coefficients; what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import nsc
from nsc.errors import NSCError
from nsc.merging import from_recipe
from nsc.methods import METHODS
from tests.cli.test_cli import refused, run
from tests.merging.test_method_merges import command, described, merge, weights
from tests.tiny import rewrite

TASKS = ("plain", "rslora")


@pytest.fixture(scope="module")
def two(adapters) -> dict[str, Path]:
    return {task: adapters[task] for task in TASKS}


def test_by_flags_a_file_and_a_record(base, two, tmp_path):
    """All say the same merge, and Python too; no data are asked for."""
    flags = ("--method", "ties", "--density", 0.3, "--scale", 0.4, "--rank", 4, "--set", "elect=count")
    done = run(*command(base, two, tmp_path / "flags", *flags))
    assert done.exit_code == 0 and "hidden states to" in done.stdout, done.stderr
    assert "merged by ties" in done.stderr and "density 0.3" in done.stderr
    said = dict(method="ties", density=0.3, scale="4e-1", elect="count", rank=4, base=str(base))
    file = tmp_path / "ties.yaml"
    file.write_text(yaml.safe_dump(said | {"adapters": {task: str(path) for task, path in two.items()}}))
    assert run("merge", "--config", file, "--out", tmp_path / "file").exit_code == 0
    assert run("merge", "--config", tmp_path / "file/merge.yaml", "--out", tmp_path / "record").exit_code == 0
    merge(base, two, "ties", density=0.3, scale=0.4, elect="count").save(tmp_path / "python", rank=4)
    assert run("apply", tmp_path / "record", "--out", tmp_path / "apply").exit_code == 0
    found = {weights(tmp_path / out) for out in ("flags", "file", "record", "python", "apply")}
    assert len(found) == 1
    record = described(tmp_path / "record")
    assert record["method"] == "ties" and record["rank"] == 4 and record["settings"]["density"] == 0.3
    assert not (tmp_path / "flags/coefficients.safetensors").exists()


def test_dense_without_a_form_is_refused_before_any_work(base, two, tmp_path, monkeypatch, texts):
    for name in ("read_adapters", "combine"):
        monkeypatch.setattr(from_recipe, name, None)
    text = refused(run(*command(base, two, tmp_path / "out", "--method", "ties")))
    assert "ties works on every entry of the dense updates" in text and "--rank" in text and "--full" in text
    monkeypatch.undo()
    with pytest.raises(NSCError, match="give --rank to truncate it, or --full"):
        merge(base, two, "ties").save(tmp_path / "out")
    assert not list(tmp_path.iterdir())


REFUSED = {
    "density of another": (("--method", "svd", "--density", 0.2), "method svd has no setting density; it has"),
    "density of nsc": (("--density", 0.2), "method nsc has no setting density"),
    "steps": (("--method", "core-ties", "--steps", 5), "method core-ties has no setting steps"),
    "set": (("--method", "core-ties", "--set", "lr=1"), "--set of method core-ties, unknown key lr; did you mean"),
    "preset": (("--method", "svd", "--preset", "vit"), "method svd learns nothing, so it takes no preset"),
    "percent": (("--method", "core-ties", "--density", 20), "density"),
    "name": (("--method", "core-tie"), "there is no method core-tie; did you mean core-ties"),
    "resume": (("--method", "core-ties", "--resume"), "nothing to resume"),
    "no data": (("--method", "nsc+core-ties"), "a merge needs data"),
    "coefficients of nsc": (("--coefficients", "x", "--data", "plain=x"), "coefficients belong to other methods"),
    "no coefficients": (("--method", "core-ties", "--coefficients", "/nowhere"), "/nowhere holds no readable record"),
    "strange task": (("--method", "core-ties", "--set", "weights={typo: 2}"), "weights names typo, which is no task"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together(base, two, tmp_path, case):
    flags, said = REFUSED[case]
    text = refused(run(*command(base, two, tmp_path / "out", *flags)))
    assert said in text and "\n" not in text.strip() and not list(tmp_path.iterdir())


def test_settings_of_learning_are_refused_in_python(base, two):
    with pytest.raises(NSCError, match="method core-ties has no setting steps"):
        merge(base, two, "core-ties", steps=5)
    with pytest.raises(NSCError, match="learns nothing, so it takes no steps"):
        nsc.merge(base, two, config=nsc.MergeConfig(steps=5), method="core-ties", progress=False)
    with pytest.raises(NSCError, match="method nsc has no setting density"):
        merge(base, two, "nsc", density=0.5)


def test_a_preset_and_a_rank_of_the_methods_own(base, two, tmp_path):
    assert run(*command(base, two, tmp_path / "a", "--method", "core-ties", "--preset", "peft")).exit_code == 0
    assert described(tmp_path / "a")["settings"]["preset"] == "peft"
    assert run(*command(base, two, tmp_path / "b", "--method", "svd", "--rank", 6)).exit_code == 0
    assert described(tmp_path / "b")["settings"]["rank"] == 6 and described(tmp_path / "b")["rank"] is None
    assert json.loads((tmp_path / "b/report.json").read_text())["merged_rank"] == 6
    again = run("merge", "--config", tmp_path / "b/merge.yaml", "--out", tmp_path / "c")
    assert again.exit_code == 0 and weights(tmp_path / "b") == weights(tmp_path / "c")


def test_an_earlier_merge_by_another_method_gives_the_job_alone(base, two, texts, tmp_path):
    data = {task: texts[task] for task in TASKS}
    nsc.merge(base, two, data, steps=1, progress=False).save(tmp_path / "nsc")
    flags = ("--config", tmp_path / "nsc/merge.yaml", "--method", "core-ties", "--out", tmp_path / "out")
    assert run("merge", *flags).exit_code == 0
    assert "steps" not in described(tmp_path / "out")["settings"]


def test_coefficients_are_matched_by_fingerprint_then_name_or_refused(base, adapters, two, merged, texts, tmp_path):
    merged.save(tmp_path / "all")
    with pytest.raises(NSCError, match="also belong to double, which is not merged here"):
        merge(base, two, "core-ties", coefficients=tmp_path / "all")
    renamed = {f"{task}2": path for task, path in reversed(adapters.items())}
    taken = merge(base, renamed, "core-ties", coefficients=tmp_path / "all")
    assert torch.equal(taken.coefficients, merged.coefficients.flip(1)) and not taken.report.warnings
    other = shutil.copytree(adapters["plain"], tmp_path / "other")
    rewrite(other / "adapter_model.safetensors", lambda t: next(iter(t.values())).mul_(2))
    changed = merge(base, {**adapters, "plain": other}, "core-ties", coefficients=tmp_path / "all")
    assert "another adapter of the same name: plain" in changed.report.warnings[0]
    with pytest.raises(NSCError, match="have none for adapter stranger"):
        merge(base, {**adapters, "stranger": other}, "core-ties", coefficients=tmp_path / "all")
    with pytest.raises(NSCError, match=r"coefficients \(2, 2\) must be finite and of shape \(20, 4\)"):
        merge(base, adapters, "core-ties", coefficients=torch.ones(2, 2))
    data = {task: texts[task] for task in TASKS}
    nsc.merge(base, two, data, steps=0, granularity="rank", progress=False).save(tmp_path / "rank")
    with pytest.raises(NSCError, match="belong to rank rows"):
        merge(base, two, "core-ties", coefficients=tmp_path / "rank")
    with pytest.raises(NSCError, match="one weight per layer and task, which granularity rank does not learn"):
        nsc.merge(base, two, data, method="nsc+core-ties", granularity="rank", progress=False)


def test_the_list_of_methods():
    listed = json.loads(run("methods", "--json").stdout)
    assert {row["name"] for row in listed} >= {*METHODS, "nsc", "adamerging"} and all(row["source"] for row in listed)
    text = run("methods").stdout
    assert all(f"{name} " in text and method.line in text for name, method in METHODS.items()) and "core-ties" in text
