"""Merges made from rows, through the whole house: written, proven, reported, recorded, replayed, searched, compared."""

import json
from pathlib import Path

import pytest
import torch

import nsc
from nsc.errors import DataError, NSCError
from nsc.methods import METHODS
from nsc.recipes.updates import dense
from tests.cli.test_cli import refused, run
from tests.merging.test_method_merges import command, described, weights
from tests.runtime.ranks import together
from tests.tiny import random_factors, write_adapter

TASKS = ("plain", "rslora", "pattern")
FROM_ROWS = [name for name, method in METHODS.items() if method.inputs]
from_rows = pytest.mark.parametrize("method", FROM_ROWS)


@pytest.fixture(scope="module")
def three(adapters) -> dict[str, Path]:
    return {task: adapters[task] for task in TASKS}


@pytest.fixture(scope="module")
def data(texts) -> dict[str, list[str]]:
    return {task: texts[task] for task in TASKS}


def merge(base, adapters, data, method, **more) -> nsc.MergeResult:
    """At scale 1, as far as ``more`` says nothing else."""
    return nsc.merge(base, adapters, data, method=method, **({"search": "none", "progress": False} | more))


@from_rows
def test_written_proven_and_replayed_without_rows(base, three, data, tmp_path, method):
    result = merge(base, three, data, method, scale=1.25)
    proof = result.save(tmp_path / "out")
    assert proof.weights < 1e-6 and proof.outputs < 1e-5 < 1e-3 < proof.effect
    again = nsc.apply(tmp_path / "out")
    again.save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert again.report.fitted == result.report.fitted and again.report.fitted["rows"]
    assert again.report.settings == result.report.settings and again.report.line == METHODS[method].line
    record = described(tmp_path / "out")
    assert record["method"] == method and record["factors"] and set(record["data"]) == set(TASKS)
    ranks = json.loads((tmp_path / "out/report.json").read_text())["ranks_by_module"]
    assert ranks == {name: sum(module.ranks) for name, module in result.stack.modules.items()}


@from_rows
def test_the_scale_is_outside(base, three, data, method):
    one, other = merge(base, three, data, method), merge(base, three, data, method, scale=1.5)
    for name in one.modules:
        torch.testing.assert_close(dense(other.merged.update(name)), 1.5 * dense(one.merged.update(name)))


@from_rows
def test_the_report_says_what_it_was_made_from(base, three, data, tmp_path, method):
    result = merge(base, three, data, method, scale=1.25)
    told = result.report.to_dict()["fitted"]
    assert told["rows"] == dict.fromkeys(TASKS, 5) and told["tokens"] == dict.fromkeys(TASKS, 25)
    assert set(told["conditions"]) == set(result.modules) and min(told["conditions"].values()) >= 1
    of_tasks = METHODS[method].inputs.of == "u"
    assert set(told["errors"]) == (set(TASKS) if of_tasks else {"all tasks"}) and min(told["errors"].values()) > 0
    text = result.report.summary()
    assert "fitted on 5 rows of plain (25 tokens)" in text and "condition number of the equations: at most" in text
    assert ("error |D x - D_k x|^2 / |D_k x|^2 on these rows: " + ("plain" if of_tasks else "all tasks")) in text


def test_processes_merge_as_one_does_and_others_are_refused(base, three, data, tmp_path):
    def work(rank):
        result = merge(base, three, data, "regmean", search="match")
        with pytest.raises(NSCError, match="rank 1 differ from those of rank 0"):
            merge(base, three, {task: rows[: 5 - rank] for task, rows in data.items()}, "ssr", scale=1)
        return {name: dense(result.merged.update(name)).numpy() for name in result.modules}, result.report.fitted

    expected = merge(base, three, data, "regmean", search="match")
    first, second = together(tmp_path, 2, work, environment=True)
    for name in expected.modules:
        torch.testing.assert_close(torch.tensor(first[0][name]), dense(expected.merged.update(name)), rtol=0, atol=1e-5)
        assert (first[0][name] == second[0][name]).all()
    assert first[1] == second[1] and first[1]["rows"] == expected.report.fitted["rows"]


def test_errors_are_those_at_the_scale(base, three, data):
    """Of the least squares, so scale 1 is near the best of all tasks together; 0 has the error 1."""
    at = {s: merge(base, three, data, "ssr", scale=s).report.fitted["errors"] for s in (0.0, 1.0, 2.0)}
    assert at[0.0] == pytest.approx(dict.fromkeys(TASKS, 1.0))
    assert sum(at[1.0].values()) < sum(at[2.0].values())


def test_one_adapter_is_returned(base, adapters, texts):
    result = merge(base, {"plain": adapters["plain"]}, {"plain": texts["plain"]}, "regmean")
    for name in result.modules:
        torch.testing.assert_close(
            dense(result.merged.update(name)), result.stack.modules[name].delta(torch.ones(1)), rtol=1e-5, atol=1e-6
        )


def test_weights_of_tasks_and_learned_coefficients(base, three, data):
    merged = merge(base, three, data, "nsc+ssr", steps=2, lr=0.05)
    taken = merge(base, three, data, "ssr", coefficients=merged.coefficients)
    for name in merged.modules:
        torch.testing.assert_close(dense(merged.merged.update(name)), dense(taken.merged.update(name)))
    assert merged.recipe.label == "nsc+ssr" and merge(base, three, data, "nsc+regmean++", steps=1).record.factors


@pytest.mark.parametrize("method", ["ssr", "regmean"])
def test_the_scale_is_searched(base, three, data, tmp_path, method):
    result = merge(base, three, data, method, search="null-space", scales=(0.8, 1.0), evaluation_samples=2)
    assert result.recipe.scale == result.report.searched["best"] in result.report.searched["curve"]
    same = merge(base, three, data, method, scale=result.recipe.scale)
    for name in result.modules:
        assert torch.equal(dense(result.merged.update(name)), dense(same.merged.update(name)))
    result.save(tmp_path / "out")
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    assert weights(tmp_path / "out") == weights(tmp_path / "again")


SEARCHED = [*FROM_ROWS, "zero-interference"]


@pytest.mark.parametrize("method", SEARCHED)
def test_the_scale_is_searched_by_match_where_rows_are_given(base, three, data, method):
    """As if the search had been asked for; not where a scale is given, or none is wanted."""
    found, asked = (merge(base, three, data, method, search=search) for search in (None, "match"))
    told = found.report.searched
    assert told["search"] == "match" and told["curve"] == asked.report.searched["curve"]
    assert found.recipe == asked.recipe and found.recipe.scale == min(told["curve"], key=told["curve"].get) != 1
    for more in ({"search": "none"}, {"search": None, "scale": 1.0}):
        fixed = merge(base, three, data, method, **more)
        assert fixed.recipe.scale == 1 and not fixed.report.searched
    for name in found.modules:
        updates = [dense(one.merged.update(name)) for one in (found, fixed)]
        torch.testing.assert_close(updates[0], found.recipe.scale * updates[1])


def test_nothing_else_is_searched_by_default(base, three, data):
    for method, rows in (("zero-interference", None), ("task-arithmetic", data), ("core-ties", data)):
        result = merge(base, three, rows, method, search=None)
        assert result.recipe.scale == 1 and not result.report.searched and result.model is None


@pytest.mark.parametrize("case", ["device_map", "keep_modules"])
def test_a_scale_that_cannot_be_searched_is_1_with_a_warning(base, three, data, tmp_path, case):
    """Unless the search was asked for."""
    method, more, why = "nsc+ssr", {"steps": 1, "lr": 0.05}, "the whole base on one device"
    if case == "device_map":
        more["device_map"] = "auto"
    else:
        names = [f"model.layers.{i}.self_attn.v_proj" for i in range(4)]
        factors = {n: (a, b[:16]) for n, (a, b) in random_factors(names).items()}
        saved = {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}
        three = {"plain": write_adapter(tmp_path / "a", factors, saved=saved)}
        method, more, why = "ssr", {"keep_modules": ("up_proj",)}, "layers that each task keeps"
    rows = {task: data[task] for task in three}
    result = merge(base, three, rows, method, search=None, **more)
    (warning,) = [text for text in result.report.warnings if "could not be searched" in text]
    assert warning.startswith("the scale is 1, for it could not be searched by match: ") and why in warning
    assert result.recipe.scale == 1 and result.record.factors and not result.report.searched
    with pytest.raises(NSCError, match=why):
        merge(base, three, rows, method, search="match", **more)


def test_rows_that_do_not_go_with_the_adapters_are_no_reason_for_scale_1(base, three, data):
    with pytest.raises(DataError, match="no data for pattern"):
        merge(base, three, {task: data[task] for task in TASKS[:2]}, "zero-interference", search=None)


@pytest.fixture(scope="module")
def files(data, tmp_path_factory) -> dict[str, Path]:
    folder, found = tmp_path_factory.mktemp("rows"), {}
    for task, rows in data.items():
        found[task] = folder / f"{task}.txt"
        found[task].write_text("\n".join(rows))
    return found


def flags(files) -> list[str]:
    return [part for task, file in files.items() for part in ("--data", f"{task}={file}")]


@pytest.mark.parametrize("method", ["ssr", "regmean++"])
def test_the_command_and_its_record_as_a_config(base, three, files, tmp_path, method):
    more = ("--method", method, "--set", "ridge=0.1", "--max-length", 4)
    done = run(*command(base, three, tmp_path / "out", *more, *flags(files)))
    assert done.exit_code == 0, done.output
    told = described(tmp_path / "out")
    assert told["settings"]["ridge"] == 0.1 and told["settings"]["max_length"] == 4
    assert told["searched"]["search"] == "match" and told["settings"]["scale"] == told["searched"]["best"]
    again = run("merge", "--config", tmp_path / "out/merge.yaml", "--out", tmp_path / "again")
    assert again.exit_code == 0 and weights(tmp_path / "again") == weights(tmp_path / "out")
    assert run(*command(base, three, tmp_path / "1", *more, "--search", "none", *flags(files))).exit_code == 0
    assert "searched" not in described(tmp_path / "1") and described(tmp_path / "1")["settings"]["scale"] == 1


@from_rows
def test_rows_are_asked_for(base, three, data, tmp_path, method):
    with pytest.raises(NSCError, match=rf"method {method.replace('+', '.')} is made from unlabeled rows: give --data"):
        merge(base, three, None, method)
    assert "a merge needs data: give --data" in refused(run(*command(base, three, tmp_path / "x", "--method", method)))
    with pytest.raises(DataError, match="no data for pattern"):
        merge(base, three, {task: data[task] for task in TASKS[:2]}, method)


def test_zero_interference_needs_none(base, three, tmp_path):
    done = run(*command(base, three, tmp_path / "out", "--method", "zero-interference"))
    assert done.exit_code == 0, done.output
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    assert weights(tmp_path / "out") == weights(tmp_path / "again")
    assert not (tmp_path / "out/factors.safetensors").exists()


def test_images(tmp_path):
    from tests.tiny import linears, save_image_base, tiny_vit

    pytest.importorskip("PIL.Image")
    base, model = save_image_base(tmp_path / "base"), tiny_vit()
    names = [name for name in linears(model) if name.endswith(("query", "value", "q_proj", "v_proj"))]
    made = {t: write_adapter(tmp_path / t, random_factors(names, seed=i), alpha=1) for i, t in enumerate("ab")}
    generator = torch.Generator().manual_seed(0)
    rows = {task: list(torch.randint(256, (3, 8, 8, 3), dtype=torch.uint8, generator=generator)) for task in "ab"}
    for method in ("ssr", "regmean"):
        result = merge(base, made, rows, method)
        assert result.report.fitted["tokens"] == {"a": 15, "b": 15}
        assert result.save(tmp_path / method).weights < 1e-6


def test_prompts_with_images(llava, llava_adapters, questions, tmp_path):
    with pytest.raises(NSCError, match="ssr works on the factors"):
        merge(llava, llava_adapters, questions, "ssr")
    result = merge(llava, llava_adapters, questions, "ssr", keep_modules=("linear_1", "linear_2"))
    assert result.report.fitted["rows"] == dict.fromkeys(llava_adapters, 4)
    assert result.save(tmp_path / "out").weights < 1e-6


def test_compared(base, three, data, tmp_path):
    """Beside a method without rows, each a row of the table."""
    test = {task: [(text, "word1") for text in rows] for task, rows in data.items()}
    methods = ["task-arithmetic", "zero-interference", "ssr", "regmean"]
    told = {"progress": False, "settings": {"regmean": {"scale": 0.9}}}
    found = nsc.compare(base, three, data, test, methods, tmp_path / "out", **told)
    rows = {row.method: row for row in found.rows[2:]}
    assert list(rows) == methods and not any(row.refused for row in rows.values())
    for name in ("zero-interference", "ssr"):
        asked = merge(base, three, data, name, search="match").report.searched
        assert rows[name].curve == pytest.approx(asked["curve"], rel=1e-4) and rows[name].scale == asked["best"]
    assert rows["task-arithmetic"].scale == 1 and rows["regmean"].scale == 0.9
    assert not rows["task-arithmetic"].curve and not rows["regmean"].curve
    unsearched = nsc.compare(base, three, data, test, ["ssr"], tmp_path / "no", search="none", progress=False)
    assert unsearched.rows[2].scale == 1 and not unsearched.rows[2].curve
    with pytest.raises(NSCError, match="ssr needs unlabeled rows"):
        nsc.compare(base, three, {}, test, ["ssr"], tmp_path / "none", progress=False)
