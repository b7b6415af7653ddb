"""The scale of one merge, searched by the verb itself: what merging anew at every scale finds, kept by the record."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

import nsc
from nsc.adapters.lora import read_adapters
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.roles import choose_targets
from nsc.data.labelled import Labelled
from nsc.errors import DataError, NSCError
from nsc.evaluation.scale_search import LabelledLoss
from nsc.evaluation.scoring import exams_of
from nsc.learning.generation import batches_of
from nsc.learning.ratios import NullSpaceRatio
from nsc.merging import tuning
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.spec import read_recipe
from nsc.recipes.updates import dense
from tests.cli.test_cli import refused, run
from tests.merging.test_method_merges import command, described, weights

TASKS = ("plain", "rslora")
RANGE = (0.2, 0.4)  # 0.2 to 0.4 in steps of 0.1, then of 0.01
FEW = {"evaluation_samples": 2, "max_length": 32}


@pytest.fixture(scope="module")
def two(adapters) -> dict[str, Path]:
    return {task: adapters[task] for task in TASKS}


@pytest.fixture(scope="module")
def rows(texts, tmp_path_factory) -> dict[str, dict[str, Path]]:
    """Kind of rows -> task -> file; labels are answers."""
    folder, found = tmp_path_factory.mktemp("rows"), {"data": {}, "validation": {}}
    for task in TASKS:
        for kind in found:
            label = {"answer": "word1 word2"} if kind == "validation" else {}
            lines = [json.dumps({"text": text} | label) for text in texts[task][:3]]
            found[kind][task] = folder / f"{task}_{kind}.jsonl"
            found[kind][task].write_text("\n".join(lines))
    return found


def searched(base, adapters, rows, search, **more) -> nsc.MergeResult:
    """A merge by ties, as far as ``more`` says no other."""
    kind = "validation" if search == "labels" else "data"
    asked = {"method": "ties", "scales": RANGE, "progress": False, kind: rows[kind]} | more
    return nsc.merge(base, adapters, search=search, **asked)


@pytest.fixture(scope="module")
def values(base, two, texts):
    """A base of its own, and what either search minimises in it, put together by hand."""
    model = loading.load_body(Base(str(base)), "auto", "cpu")
    result = nsc.merge(base, two, method="ties", progress=False)
    labelled = {task: Labelled(texts[task][:3], ["word1 word2"] * 3) for task in TASKS}
    labels = LabelledLoss(model, exams_of(Base(str(base), model), read_adapters(two), labelled, 512))
    targets, samples = choose_targets(model, result.modules, None, None), {task: texts[task][:3] for task in TASKS}
    batches = batches_of(Base(str(base), model), result.stack, targets, samples, nsc.MergeConfig())[1]
    return model, {"labels": labels, "null-space": NullSpaceRatio(result.stack, targets, batches, torch.device("cpu"))}


@pytest.mark.parametrize("search", ["labels", "null-space"])
@pytest.mark.parametrize("method", ["ties", "core-ties"])
def test_the_scale_is_that_of_merging_anew_at_every_scale(base, two, rows, values, method, search):
    model, by_hand = values[0], {}
    result = searched(base, two, rows, search, method=method)
    told = result.report.searched
    for scale in told["curve"]:
        anew = as_one(Combination(result.stack, read_recipe(method, scale=scale)))
        with merged_layers(model, anew, torch.ones(len(anew.names), 1)), torch.no_grad():
            by_hand[scale] = values[1][search](model)
    assert told["curve"] == pytest.approx(by_hand, rel=1e-5) and len(by_hand) > 10
    assert len({round(value, 7) for value in by_hand.values()}) == len(by_hand)  # the scale matters
    assert result.recipe.scale == told["best"] == min(by_hand, key=by_hand.get)
    expected = nsc.merge(base, two, method=method, scale=told["best"], progress=False)
    for name in result.modules:
        assert torch.equal(dense(result.merged.update(name)), dense(expected.merged.update(name)))


def test_a_planted_minimum_is_found_inside_and_its_edge_is_a_warning(base, two, rows, monkeypatch):
    class Planted:
        """Least where the first layer's update is 0.33 of what it is at scale 1."""

        def __init__(self, *_):
            self.targets = []

        def __call__(self, model):
            return (model.get_submodule("layers.0.self_attn.q_proj").lam.item() - self.best) ** 2

    monkeypatch.setattr(tuning, "evaluation_ratio", Planted)
    for best, found, edge in [(0.33, 0.33, False), (0.7, 0.4, True), (0.0, 0.2, True)]:
        Planted.best = best
        result = searched(base, two, rows, "null-space")
        assert result.recipe.scale == result.report.settings["scale"] == found
        assert [w for w in result.report.warnings if "the last of the range searched" in w] == (
            [f"its best scale, {found}, is the last of the range searched; a better one may lie outside"] * edge
        )
    assert searched(base, two, rows, "null-space", scales=None).report.searched["scales"] == [0.1, 1.5]


def test_the_base_is_loaded_once_and_each_layer_merged_once_for_all_scales(base, two, rows, tmp_path, monkeypatch):
    loads, updates, passes = [], [], []
    load, update, matrices = loading.load_body, Combination.update, Combination.matrices
    monkeypatch.setattr(loading, "load_body", lambda *args: loads.append(args) or load(*args))
    monkeypatch.setattr(Combination, "update", lambda self, name: updates.append(name) or update(self, name))
    monkeypatch.setattr(Combination, "matrices", lambda self: passes.append(1) or matrices(self))
    result = searched(base, two, rows, "labels", method="knots-ties")
    assert len(loads) == 1 and updates == result.modules
    surveyed = len(passes)
    assert "outputs not compared" not in str(result.save(tmp_path / "out", rank=4))
    assert len(loads) == 1 and len(passes) == surveyed > 0
    for name, module in load(Base(str(base)), "auto", "cpu").state_dict().items():
        assert torch.equal(module, result.model.state_dict()[name])


@pytest.mark.parametrize("search", ["labels", "null-space"])
def test_the_record_holds_the_scale_and_how_it_was_found(base, two, rows, tmp_path, search, monkeypatch):
    result = searched(base, two, rows, search, **FEW)
    proof = result.save(tmp_path / "out", full=True)
    assert proof.outputs < 1e-5 < 1e-3 < proof.effect
    record, kind = described(tmp_path / "out"), "validation" if search == "labels" else "data"
    assert record["settings"]["scale"] == result.recipe.scale and "max_length" not in record["settings"]
    told = record["searched"]
    assert told["search"] == search and told["scales"] == list(RANGE) and told["steps"] == [0.1, 0.01]
    assert told["rows"] == {task: path.name for task, path in rows[kind].items()} and told["max_length"] == 32
    assert told["curve"][told["best"]] == min(told["curve"].values()) and told["best"] == result.recipe.scale
    assert record["data"] == (told["rows"] if search == "null-space" else {})
    assert bool(record["targets"]) == (search == "null-space")
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert {float(s): x for s, x in report["searched"]["curve"].items()} == told["curve"]
    assert report["searched"]["seconds"] == told["seconds"] > 0
    card = (tmp_path / "out/README.md").read_text()
    assert f"- scale: {told['best']:g}, of {len(told['curve'])} from 0.2 to 0.4" in card and " (best) |" in card
    monkeypatch.setattr(tuning, "search_scale", None)
    again = nsc.apply(tmp_path / "out")
    again.save(tmp_path / "again", full=True)
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    local = told | {"rows": {task: str(path) for task, path in rows[kind].items()}}
    assert described(tmp_path / "again")["searched"] == told and dict(again.report.searched) == local


def test_labels_are_of_heads_where_adapters_carry_them_and_need_no_metrics(base, adapters, texts, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.functional", None)
    told = {"plain": [(text, "word3") for text in texts["plain"]], "double": [(x, 1) for x in texts["double"]]}
    pair = {task: adapters[task] for task in told}
    result = nsc.merge(base, pair, method="ties", search="labels", validation=told, scales=RANGE, progress=False)
    assert len(set(result.report.searched["curve"].values())) > 10
    assert result.record.searched["rows"] == {task: "5 samples given in Python" for task in told}
    with pytest.raises(DataError, match="task double, labelled row 1: class 2, but the head has 2 outputs"):
        nsc.merge(base, pair, method="ties", search="labels", validation=told | {"double": [("x", 2)]}, progress=False)


def test_learned_coefficients_first(base, two, rows, tmp_path):
    """nsc+ties: learned once, then scaled, on the same base."""
    learning = {"method": "nsc+core-ties", "data": rows["data"], "steps": 2, "lr": 0.05}
    result = searched(base, two, rows, "labels", **learning)
    plain = nsc.merge(base, two, rows["data"], method="nsc", steps=2, lr=0.05, progress=False)
    assert torch.equal(result.coefficients, plain.coefficients)
    weighted = searched(base, two, rows, "labels", method="core-ties", coefficients=plain.coefficients)
    assert result.report.searched["curve"] == pytest.approx(weighted.report.searched["curve"], rel=1e-6)
    assert result.recipe.scale == weighted.recipe.scale and result.record.targets == plain.record.targets
    result.save(tmp_path / "out")
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    by_ratio = searched(base, two, rows, "null-space", **learning)
    assert len(by_ratio.report.searched["curve"]) > 10 and described(tmp_path / "out")["settings"]["steps"] == 2


def test_by_flags_and_by_a_file(base, two, rows, tmp_path):
    data = [part for task, path in rows["data"].items() for part in ("--data", f"{task}={path}")]
    told = [part for task, path in rows["validation"].items() for part in ("--validation", f"{task}={path}")]
    said = ("--method", "core-ties", "--search", "null-space", "--scales", *RANGE, "--max-length", 32)
    done = run(*command(base, two, tmp_path / "flags", *said, *data, "--set", "evaluation_samples=2"))
    assert done.exit_code == 0 and "scale: 0." in done.stderr, done.stderr
    python = searched(base, two, rows, "null-space", method="core-ties", **FEW)
    python.save(tmp_path / "python")
    assert weights(tmp_path / "python") == weights(tmp_path / "flags")
    file = tmp_path / "search.yaml"
    asked = {"base": str(base), "method": "core-ties", "search": "labels", "scales": list(RANGE), "max_length": 32}
    places = {"adapters": two, "validation": rows["validation"]}
    file.write_text(yaml.safe_dump(asked | {k: {t: str(p) for t, p in v.items()} for k, v in places.items()}))
    assert run("merge", "--config", file, "--out", tmp_path / "file").exit_code == 0
    assert described(tmp_path / "file")["searched"]["search"] == "labels"
    record = tmp_path / "file/merge.yaml"
    assert run("merge", "--config", record, "--out", tmp_path / "record").exit_code == 0  # at the scale found
    assert weights(tmp_path / "record") == weights(tmp_path / "file") and "searched" not in described(
        tmp_path / "record"
    )
    again = ("--config", record, "--search", "labels", "--scales", *RANGE, "--set", "max_length=32", *told)
    assert run("merge", *again, "--out", tmp_path / "again").exit_code == 0  # a search of the flags overrides it
    assert weights(tmp_path / "again") == weights(tmp_path / "file")
    fixed = ("--config", file, "--set", "scale=0.3", "--set", "max_length=32")
    assert "no setting max_length" in refused(run("merge", *fixed, "--out", tmp_path / "fixed"))


REFUSED = {
    "no such search": ({"search": "guess"}, "search must be one of none, labels, null-space, match, not guess"),
    "a method without scale": ({"method": "nsc"}, "method nsc has no scale to search.*nsc\\+ties"),
    "another": ({"method": "adamerging"}, "method adamerging has no scale to search.*adamerging\\+ties"),
    "a scale too": ({"scale": 0.4}, "a scale is given, so there is none to search: leave out"),
    "a recipe's scale too": ({"method": read_recipe("ties", scale=0.4)}, "a scale is given"),
    "no labels": ({"search": "labels"}, "needs labelled rows: give --validation TASK=FILE"),
    "no data": ({"data": None}, "needs unlabeled rows: give --data TASK=FILE"),
    "labels for ratios": (
        {"validation": {"plain": "x"}},
        "validation rows are only used by a search by labels: give --search",
    ),
    "labels for nothing": (
        {"search": "none", "validation": {"plain": "x"}},
        "validation rows are only used by a search",
    ),
    "a range of nothing": ({"search": "none", "scales": (0.1, 1)}, "scales are the range of a search: give --search"),
    "an empty range": ({"scales": (1.0, 0.5)}, "above 0 and ascending, not from 1.0 to 0.5"),
    "settings without search": ({"search": "none", "max_length": 9}, "method ties has no setting max_length; it has"),
    "settings of learning": ({"steps": 9}, "method ties has no setting steps; it has.* max_length"),
    "a config of learning": (
        {"config": nsc.MergeConfig(lr=1)},
        "takes no lr; of MergeConfig it takes only.* max_length",
    ),
    "a base in parts": ({"method": "nsc+ties", "weights": "int8"}, "whole base on one device: leave out weights"),
    "own layers by labels": (
        {"search": "labels", "validation": {"plain": "x"}, "keep_modules": ("norm",)},
        "keep_modules.*by null-space",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_search_is_refused_before_anything_is_read(case):
    change, why = REFUSED[case]
    asked = {"method": "ties", "search": "null-space", "data": {"plain": ["word1"]}, "progress": False} | change
    with pytest.raises(NSCError, match=why):
        nsc.merge("nowhere", {"plain": "nowhere"}, **asked)


FLAGS = {
    "no labels": (("--search", "labels"), "give --validation TASK=FILE"),
    "no data": (("--search", "null-space"), "a merge needs data: give --data TASK=FILE"),
    "a scale too": (("--search", "labels", "--validation", "plain=x", "--scale", 0.3), "a scale is given"),
    "set too": (("--search", "labels", "--validation", "plain=x", "--set", "scale=1"), "a scale is given"),
    "only rows": (("--validation", "plain=x"), "validation rows are only used by a search by labels"),
    "only a range": (("--scales", 0.1, 1), "scales are the range of a search"),
    "settings alone": (("--max-length", 9), "method core-ties has no setting max_length"),
    "nsc": (("--method", "nsc", "--data", "plain=x", "--search", "null-space"), "nsc has no scale to search"),
}


@pytest.mark.parametrize("case", FLAGS)
def test_flags_that_are_no_search(base, two, tmp_path, case):
    flags, why = FLAGS[case]
    text = refused(run(*command(base, two, tmp_path / "out", "--method", "core-ties", *flags)))
    assert why in text and "\n" not in text.strip() and not list(tmp_path.iterdir())


def test_rows_that_do_not_go_with_the_adapters(base, two, rows):
    one = {"plain": rows["validation"]["plain"]}
    with pytest.raises(DataError, match="must name the same tasks, not plain and plain, rslora"):
        searched(base, two, rows, "labels", validation=one)
    with pytest.raises(DataError, match="no data for rslora"):
        searched(base, two, rows, "null-space", data=one)


def test_a_setting_is_searched_with_the_scale(base, adapters, texts):
    """Each value is tried at its best scale, as if it had been searched alone."""
    of = {"a": adapters["plain"], "b": adapters["pattern"]}
    rows = {"a": texts["plain"], "b": texts["pattern"]}
    search = dict(method="core-ties", search="match", progress=False)
    both = nsc.merge(base, of, rows, over={"density": [0.1, 0.5]}, **search)
    alone = {value: nsc.merge(base, of, rows, density=value, **search) for value in (0.1, 0.5)}
    values = {str(v): m.report.searched["curve"][m.recipe.scale] for v, m in alone.items()}
    assert both.report.searched["tried"] == values
    best = alone[both.recipe.settings.density]
    assert both.recipe == best.recipe and min(values, key=values.get) == str(both.recipe.settings.density)


@pytest.mark.parametrize("over", [{"density": []}, {"density": [0.1], "elect": ["sign"]}])
def test_more_than_one_setting_or_none_is_no_search(base, adapters, texts, over):
    of, rows = {"a": adapters["plain"]}, {"a": texts["plain"]}
    with pytest.raises(NSCError, match="over takes one setting and its values"):
        nsc.merge(base, of, rows, method="core-ties", search="match", over=over, progress=False)
