"""AIM through the whole house: measured on rows, written, replayed without rows, searched, compared, refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsc
from nsc.errors import NSCError
from nsc.methods.aim import relaxed
from nsc.recipes.updates import dense
from tests.adapters.test_modules_to_save import whole  # noqa: F401 (a fixture)
from tests.cli.test_cli import refused, run
from tests.merging.test_method_merges import command, described, weights
from tests.merging.test_regression_merges import TASKS, data, files, flags, merge, three  # noqa: F401 (fixtures)


@pytest.mark.parametrize("method", ["task-arithmetic", "ssr", "nsc+core-ties"])
def test_written_recorded_and_replayed_without_rows(base, three, data, tmp_path, method):  # noqa: F811
    fast = {"steps": 1, "evaluation_samples": 1} if "nsc" in method else {}
    result = merge(base, three, data, method, scale=0.5, aim=0.4, **fast)
    bare = result.combination.with_recipe(replace(result.recipe, aim=None))
    for name in result.modules:
        a, D = result.record.magnitudes[name], dense(bare.update(name))
        assert a.shape == D.shape[1:] and (a > 0).any()
        torch.testing.assert_close(dense(result.merged.update(name)), relaxed(D, a, 0.4), rtol=1e-5, atol=1e-8)
    assert set(result.record.data) == set(TASKS)
    assert result.save(tmp_path / "out").outputs < 1e-5
    again = nsc.apply(tmp_path / "out")
    again.save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert described(tmp_path / "out")["settings"]["aim"] == 0.4 and again.report.settings["aim"] == 0.4


def test_layers_fine_tuned_whole(whole, texts, tmp_path):  # noqa: F811 (the fixture)
    base, made = whole
    rows = {task: list(texts.values())[k] for k, task in enumerate(made)}
    result = merge(base, made, rows, "task-arithmetic", aim=0.0)
    bare = merge(base, made, None, "task-arithmetic")
    (name, *_) = result.combination.whole
    a = result.record.magnitudes[name]
    torch.testing.assert_close(dense(result.merged.update(name)), relaxed(dense(bare.merged.update(name)), a, 0.0))
    bias = bare.merged.bias_update(name)
    assert bias is None or torch.equal(result.merged.bias_update(name), bias)
    result.save(tmp_path / "out", full=True)
    nsc.apply(tmp_path / "out").save(tmp_path / "again", full=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")


def test_its_rows_have_settings(base, three, data):  # noqa: F811
    short, long = (merge(base, three, data, "ties", aim=0.4, **more) for more in ({"max_length": 2}, {}))
    name = short.modules[0]
    assert not torch.allclose(short.record.magnitudes[name], long.record.magnitudes[name])
    with pytest.raises(NSCError, match="method ties has no setting max_length"):
        merge(base, three, None, "ties", max_length=2)


def test_searched_with_the_scale(base, three, data):  # noqa: F811
    search = dict(search="null-space", evaluation_samples=2, scales=(0.3, 0.4), over={"aim": [0.2, 1.0]})
    found = merge(base, three, data, "task-arithmetic", aim=0.4, **search)
    assert set(found.report.searched["tried"]) == {"0.2", "1.0"} and found.recipe.aim in (0.2, 1.0)
    with pytest.raises(NSCError, match="give a first value too, such as --set aim"):
        merge(base, three, data, "task-arithmetic", **search)


def test_compared(base, three, data, tmp_path):  # noqa: F811
    test = {task: [(text, "word1") for text in rows] for task, rows in data.items()}
    settings = {"ties": {"aim": 0.4}}
    found = nsc.compare(base, three, data, test, ["ties"], tmp_path / "out", settings=settings, progress=False)
    assert not found.rows[2].refused
    with pytest.raises(NSCError, match="ties needs unlabeled rows"):
        nsc.compare(base, three, {}, test, ["ties"], tmp_path / "none", settings=settings, progress=False)


def test_the_command_and_its_record_as_a_config(base, three, files, tmp_path):  # noqa: F811
    more = ("--method", "core-ties", "--set", "aim=0.4", "--max-length", 4)
    done = run(*command(base, three, tmp_path / "out", *more, *flags(files)))
    assert done.exit_code == 0, done.output
    again = run("merge", "--config", tmp_path / "out/merge.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0 and weights(tmp_path / "again") == weights(tmp_path / "out")
    assert "a merge needs data: give --data" in refused(
        run(*command(base, three, tmp_path / "x", "--method", "ties", "--set", "aim=0.4"))
    )


def test_rows_are_asked_for(base, three):  # noqa: F811
    with pytest.raises(NSCError, match="aim is measured on unlabeled rows: give --data TASK=FILE for each task"):
        merge(base, three, None, "core-ties", aim=0.4)


def test_a_damaged_record_is_refused(base, three, data, tmp_path):  # noqa: F811
    result = merge(base, three, data, "core-ties", aim=0.4)
    name = result.modules[0]
    for wrong in (torch.ones(3), -result.record.magnitudes[name]):
        folder: Path = tmp_path / str(len(wrong))
        folder.mkdir()
        replace(result.record, magnitudes={**result.record.magnitudes, name: wrong}).write(folder)
        with pytest.raises(NSCError, match=f"recorded magnitudes of {name}"):
            nsc.apply(folder)
