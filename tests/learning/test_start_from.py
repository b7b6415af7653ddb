"""Matching from a merge: no step gives it back, a step is the plain loop's; written, replayed without it, resumed."""

import itertools
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

import nsc
import nsc.learning.loop as learning
from nsc.adapters.lora import read_adapters
from nsc.bases.base_model import Base
from nsc.config import MergeConfig, learned_settings
from nsc.data.sources import read_data
from nsc.data.text import read_texts
from nsc.errors import AdapterError, NameMismatch, NSCError, ResumeError
from nsc.evaluation.start import find_start, started
from nsc.learning.coefficients import starts
from nsc.learning.held_back import hold_back
from nsc.learning.preparation import Problem, prepare, stack_on
from nsc.recipes.merged_factors import factors_to_fit
from nsc.recipes.updates import dense
from nsc.seal import unsealed
from tests.cli.test_cli import refused, run
from tests.learning import test_match
from tests.learning.test_match import NEW, SINGLE, TASKS, Setting, exact, found, plain
from tests.merging.test_method_merges import command, weights
from tests.tiny import random_factors, write_adapter

GRANULARITIES = ["task", "layer", "rank", "factors"]
SCALE = 0.6
setting, experts = test_match.setting, test_match.experts  # fixtures


@pytest.fixture(scope="module")
def folder(setting, tmp_path_factory) -> Path:
    """A merge of the three adapters as ``nsc merge`` writes it."""
    out = tmp_path_factory.mktemp("merge") / "tsv"
    nsc.merge(setting.base, setting.adapters, method="tsv", scale=SCALE, progress=False).save(out)
    return out


def merge(setting: Setting, start, **settings: Any) -> nsc.MergeResult:
    told = (
        dict(method="match", start_from=start, steps=4, borrow_rows=0, lr=0.02, max_new_tokens=NEW, progress=False)
        | settings
    )
    return nsc.merge(setting.base, setting.adapters, setting.texts, **told)


def updates(result: nsc.MergeResult) -> dict[str, Tensor]:
    return {name: dense(result.merged.update(name)) for name in result.modules}


def assert_same(one: nsc.MergeResult, other: nsc.MergeResult, rtol: float = 1e-6) -> None:
    theirs = updates(other)
    for name, update in updates(one).items():
        assert (update - theirs[name]).norm() <= rtol * theirs[name].norm(), name


# --- no step ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_without_a_step_it_is_the_merge_in_the_folder(setting, folder, granularity):
    result = merge(setting, folder, steps=0, granularity=granularity)
    assert_same(result, nsc.apply(folder))
    assert result.report.tasks == [*TASKS, "start"] and result.report.started == {"from": str(folder)}
    if granularity == "factors":
        ranks = {name: sum(module.ranks[:-1]) for name, module in result.stack.modules.items()}
        assert {name: len(f.A) for name, f in result.record.factors.items()} == ranks
    else:
        assert all(row == [0, 0, 0, 1] for row in result.report.coefficients)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("method", ["ssr", "task-arithmetic"])
def test_without_a_step_it_is_the_methods_merge_at_its_best_scale(setting, method, granularity):
    """Of the rows that are learned from: those held back choose the step, and nothing else."""
    rows = hold_back(setting.texts, 0)[0]
    told = dict(method=method, search="match", progress=False)
    expected = nsc.merge(setting.base, setting.adapters, rows, **told)
    assert expected.recipe.scale != 1
    result = merge(setting, method, steps=0, granularity=granularity, max_new_tokens=16)  # answers as long as there
    assert_same(result, expected)
    assert result.report.started["scale"] == expected.recipe.scale and result.report.started["error"] == 0
    text = result.report.to_markdown()
    assert f"- started from {method} at scale {expected.recipe.scale:g}" in text and "best approximation" not in text


def test_without_rows_held_back_all_are_searched_on(setting):
    expected = nsc.merge(setting.base, setting.adapters, setting.texts, method="ssr", search="match", progress=False)
    assert_same(merge(setting, "ssr", steps=0, stop="last", max_new_tokens=16), expected)


def test_a_dense_update_starts_from_its_best_approximation(setting):
    result = merge(setting, "ties", steps=0)
    told = result.report.started
    whole = nsc.merge(setting.base, setting.adapters, method="ties", scale=told["scale"], progress=False)
    errors, mine = [], updates(result)
    for name, update in updates(whole).items():
        rank = sum(result.stack.modules[name].ranks[:-1])
        u, sigma, vh = torch.linalg.svd(update.double(), full_matrices=False)
        best = u[:, :rank] * sigma[:rank] @ vh[:rank]
        torch.testing.assert_close(mine[name], best, rtol=0, atol=1e-5)
        errors.append((sigma[rank:].norm() / sigma.norm()).item())
    assert told["error"] == pytest.approx(max(errors), rel=1e-4) and max(errors) > 0.1
    assert f"relative error at most {told['error']:.3g}" in result.report.summary()


@pytest.mark.parametrize("rank", [2, 100])
def test_factors_of_another_rank(setting, folder, rank):
    result = merge(setting, folder, steps=0, granularity="factors", factor_rank=rank)
    written = max(sum(module.ranks[:-1]) for module in result.stack.modules.values())  # in every module, padded
    for name, update in updates(nsc.apply(folder)).items():
        kept = min(rank, written)  # no more than the merge has
        u, sigma, vh = torch.linalg.svd(update, full_matrices=False)
        assert len(result.record.factors[name].A) == kept
        torch.testing.assert_close(
            dense(result.merged.update(name)), u[:, :kept] * sigma[:kept] @ vh[:kept], rtol=0, atol=1e-6
        )


# --- a step -----------------------------------------------------------------------------------------------------------


def problem_of(setting: Setting, start: Any, **settings: Any) -> Problem:
    """What ``nsc.merge`` learns, before it does, in float64."""
    ours = dict(dtype="float64", device="cpu", batch_size=3, steps=2, max_new_tokens=NEW, graphs=False)
    given = {"start_from": start, **settings}
    config = find_start(MergeConfig(**{**learned_settings("match", given), "borrow_rows": 0, **ours, **given}))
    read = read_adapters(setting.adapters)
    base, matched = stack_on(Base(str(setting.base)), read, config)
    exact(base.model)
    samples = read_data(setting.texts, read, read_texts)
    begun = started(base, matched, samples, config)
    return prepare(base, begun.matched, begun.samples, config, factors_to_fit(begun.matched.stack, config))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("start", ["folder", "ssr"])
def test_a_step_is_the_plain_loop_over_peft_models(setting, experts, folder, granularity, start):
    problem = problem_of(setting, folder if start == "folder" else start, granularity=granularity)
    theta = torch.zeros(1 if granularity == "task" else len(problem.stack.names), problem.stack.owned.shape[1])
    for row, module in zip(theta, problem.stack.modules.values(), strict=False):
        ranks = module.ranks if granularity == "rank" else (1, 1, 1, 1)
        row[sum(ranks[:3]) : sum(ranks)] = 1
    loss, gradient = plain(experts, problem, start=theta)
    got = found(problem)
    torch.testing.assert_close(got[0], loss, **SINGLE)
    torch.testing.assert_close(got[1], gradient, **SINGLE)
    assert 0.05 < loss < 1 and gradient.abs().max() > 1e-3


def test_the_distance_of_the_start_is_on_the_curve_and_falls(setting, folder):
    result = merge(setting, folder, steps=20, lr=0.05)
    curve = {step: sum(values) / 3 for step, values in result.report.distances.items()}
    distance = merge(setting, folder, steps=0).report.distances["0"]
    assert result.report.distances["0"] == distance and distance[3] == 0
    assert curve[str(result.report.kept)] < 0.9 * curve["0"] and result.report.kept > 0


@pytest.mark.parametrize("granularity", ["task", "layer", "rank"])
def test_a_bound_is_from_each_ones_own_start(setting, folder, granularity):
    told = dict(method="nsc", objective="null-space+match", granularity=granularity, max_drift=0.03, steps=6, lr=0.02)
    result = merge(setting, folder, **told)
    moved = (result.coefficients - starts(result.stack, MergeConfig(**told_of(told, folder)))).abs()
    assert moved.max() == pytest.approx(0.03, rel=1e-5) == result.report.max_drift
    if granularity == "layer":
        assert any("(start)" in name for name in result.report.bounded)
    assert "largest drift from the start: 0.03" in result.report.summary()


def told_of(settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k != "method"} | {"start_from": folder, "start": 0}


# --- written, replayed, resumed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_written_proven_and_replayed_without_the_folder(setting, folder, tmp_path, granularity):
    gone = shutil.copytree(folder, tmp_path / "gone")
    result = merge(setting, gone, granularity=granularity)
    shutil.rmtree(gone)
    proof = result.save(tmp_path / "out")
    assert proof.weights < 1e-5 and proof.outputs < 1e-4 < proof.effect
    again = nsc.apply(tmp_path / "out")
    again.save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert again.report.started == result.report.started == {"from": str(gone)}
    assert again.report.coefficients == result.report.coefficients and again.report.tasks == result.report.tasks
    record = yaml.safe_load((tmp_path / "out/merge.yaml").read_text())
    assert set(record["adapters"]) == set(TASKS) and record["settings"]["start_from"] == gone.name
    assert record["settings"]["unseen"] == [] and (tmp_path / "out/start.safetensors").exists()
    page = (tmp_path / "out/README.md").read_text()
    assert f"- started from {gone.name}; its coefficients, called start, started at 1" in page and "unseen" not in page
    assert f"adapter: {', '.join(TASKS)}\n" in page


def test_how_a_methods_merge_was_made_is_recorded(setting, tmp_path):
    result = merge(setting, "ties")
    result.save(tmp_path / "out")
    again = nsc.apply(tmp_path / "out")
    assert set(result.report.started) == {"from", "scale", "distance", "error"}
    assert again.report.started == result.report.started and not again.report.fitted
    assert torch.equal(again.coefficients, result.coefficients)
    assert_same(again, result, rtol=0)


def test_a_merge_that_was_started_from_another_can_be_started_from(setting, folder, tmp_path):
    merge(setting, folder).save(tmp_path / "one")
    assert_same(merge(setting, tmp_path / "one", steps=0), nsc.apply(tmp_path / "one"))


@pytest.mark.parametrize("granularity", ["rank", "factors"])
@pytest.mark.parametrize("start", ["folder", "ssr"])
def test_interrupted_and_resumed_equals_uninterrupted(
    setting,
    folder,
    tmp_path,
    monkeypatch,
    granularity,
    start,
):
    start = folder if start == "folder" else start
    whole, calls, step = merge(setting, start, granularity=granularity), itertools.count(), learning.take_step

    def interrupting(*args):
        if next(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return step(*args)

    state = tmp_path / "state.pt"
    with monkeypatch.context() as patched:
        patched.setattr(learning, "take_step", interrupting)
        with pytest.raises(KeyboardInterrupt):
            merge(setting, start, granularity=granularity, checkpoint=state)
    assert unsealed(state.read_bytes())[1]["step"] == 2
    resumed = merge(setting, start, granularity=granularity, checkpoint=state, resume=True)
    assert resumed.report.losses == whole.report.losses and resumed.report.distances == whole.report.distances
    for name in whole.modules:
        assert torch.equal(dense(resumed.merged.update(name)), dense(whole.merged.update(name)))


def test_it_is_resumed_from_the_same_start_alone_wherever_it_lies(setting, folder, tmp_path):
    state = {"checkpoint": tmp_path / "state.pt"}
    whole = merge(setting, folder, **state)
    moved = shutil.copytree(folder, tmp_path / "moved")
    assert torch.equal(merge(setting, moved, **state, resume=True).coefficients, whole.coefficients)
    nsc.merge(setting.base, setting.adapters, method="tsv", scale=0.5, progress=False).save(tmp_path / "other")
    for other in (tmp_path / "other", "tsv"):
        with pytest.raises(ResumeError, match="other adapters, data or settings"):
            merge(setting, other, **state, resume=True)


def test_the_command_and_its_record_as_a_config(setting, folder, tmp_path):
    rows = []
    for task, texts in setting.texts.items():
        (tmp_path / f"{task}.txt").write_text("\n".join(texts))
        rows += ["--data", f"{task}={tmp_path / task}.txt"]
    told = ["--method", "match", "--steps", 2, "--set", "max_new_tokens=2", *rows]
    for name, flags in {"flag": ("--start-from", folder), "set": ("--set", f"start_from={folder}")}.items():
        done = run(*command(setting.base, setting.adapters, tmp_path / name, *told, *flags))
        assert done.exit_code == 0, done.output
        assert "starting from" in done.output
    assert run("merge", "--config", tmp_path / "flag/merge.yaml", "--out", tmp_path / "again").exit_code == 0
    assert weights(tmp_path / "flag") == weights(tmp_path / "set") == weights(tmp_path / "again")
    wrong = ("--method", "ties", "--start-from", folder)
    said = refused(run(*command(setting.base, setting.adapters, tmp_path / "x", *wrong)))
    assert "method ties has no setting start_from" in said


def test_compared(setting, folder, tmp_path):
    """Beside the same method from its own start."""
    test = {task: [(text, "word1") for text in rows] for task, rows in setting.texts.items() if task == "tokens"}
    one = {"tokens": setting.adapters["tokens"]}, {"tokens": setting.texts["tokens"]}
    ours = {"steps": 2, "max_new_tokens": 2}
    for granularity in ("rank", "factors"):
        settings = {"match": {"start_from": "svd", "granularity": granularity}}
        methods = dict(config=ours, settings=settings, progress=False)
        table = nsc.compare(setting.base, *one, test, ["match", "match-layer"], tmp_path / granularity, **methods)
        assert not any(row.refused for row in table.rows) and table.rows[2].scores
    told = json.loads((tmp_path / "rank/compare.json").read_text())
    assert told["rows"][2]["settings"]["learned"]["start_from"] == "svd"


# --- refused ----------------------------------------------------------------------------------------------------------

MATCH = {"objective": "match", "start_from": "ssr", "start": 0, "max_drift": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (MATCH | {"objective": "null-space"}, "the objective is null-space: give match or null-space"),
        (MATCH | {"objective": "both"}, "the objective is both: give match"),
        (MATCH | {"start": 0.4}, "so start must be 0, not 0.4"),
        (MATCH | {"link": "softplus", "start": 0.1}, "link softplus cannot give: leave link at identity"),
        (MATCH | {"link": "clip"}, "link clip cannot give: leave link at identity"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(NSCError, match=message):
        MergeConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start_from": "nowhere"}, "nowhere is neither the folder of a merged adapter nor a method: `nsc methods`"),
        ({"start_from": "match"}, "match names a method that learns: make that merge in a run of its own and give its"),
        ({"start_from": "nsc+ties"}, "nsc.ties names a method that learns"),
        ({"start_from": "auto"}, "auto names a method that learns"),
        ({"start_from": "ssr", "weights": "int8"}, "ssr makes that merge first, on the whole base: leave out weights"),
        ({"start_from": "tsv", "method": "auto"}, "auto takes no start_from, which belongs to matching alone"),
        (
            {"start_from": "tsv", "method": "nsc+ties", "objective": "null-space+match"},
            r"nsc\+ties takes no start_from, which belongs to matching alone",
        ),
    ],
)
def test_what_is_no_start_is_refused_before_anything_is_read(setting, settings, message):
    with pytest.raises(NSCError, match=message):
        nsc.merge("nowhere", setting.adapters, setting.texts, **({"method": "match", "progress": False} | settings))


def test_a_folder_that_does_not_go_with_the_adapters_is_refused(setting, folder, tmp_path):
    nsc.merge(setting.base, setting.adapters, method="tsv", progress=False).save(tmp_path / "full", full=True)
    with pytest.raises(NSCError, match=r"full holds a whole model \(--full\): save that merge as an adapter"):
        merge(setting, tmp_path / "full")
    with pytest.raises(AdapterError, match=r"has no adapter_config\.json"):
        merge(setting, tmp_path)
    with pytest.raises(NSCError, match=r"also holds score.weight \(modules_to_save\), and a start is LoRA alone"):
        merge(setting, setting.adapters["classes"])
    with pytest.raises(
        NameMismatch,
        match=r"start_from has none for layers\.0.*_proj, whose factors the adapters have: start from a merge",
    ):
        merge(setting, setting.adapters["tokens"])
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    wide = write_adapter(tmp_path / "wide", random_factors(names, d=48), target_modules=names)
    with pytest.raises(NameMismatch, match=r"adapter 'start_from': the update of .* Wrong base\?"):
        merge(setting, wide)


def test_adapters_that_do_not_go_with_a_start_are_refused(setting, folder, tmp_path):
    renamed = {"start": setting.adapters["tokens"]}, {"start": setting.texts["tokens"]}
    nsc.merge(setting.base, renamed[0], method="svd", progress=False).save(tmp_path / "one")
    told = dict(method="match", start_from=tmp_path / "one", progress=False)
    with pytest.raises(NSCError, match="an adapter is named start, as what start_from names is called"):
        nsc.merge(setting.base, *renamed, **told)
    some = {task: setting.texts[task] for task in TASKS[:2]}
    with pytest.raises(NSCError, match="ssr is made from rows of every task, and tokens has none"):
        nsc.merge(setting.base, setting.adapters, some, method="match", start_from="ssr", unseen=("tokens",))
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    factors = {n: (a, b[:16]) for n, (a, b) in random_factors(names).items()}
    saved = {"model.layers.0.mlp.up_proj.weight": torch.ones(48, 32)}
    whole = {"tokens": write_adapter(tmp_path / "a", factors, saved=saved)}
    with pytest.raises(NSCError, match=r"fine-tuned layers\.0\.mlp\.up_proj whole, and start_from is for layers with"):
        nsc.merge(setting.base, whole, {"tokens": setting.texts["tokens"]}, **told)


def test_its_coefficients_weight_no_other_method(setting, folder, tmp_path):
    merge(setting, folder, method="match-layer", steps=0).save(tmp_path / "out")
    with pytest.raises(NSCError, match="are beside a merge that was started from, so they weight no adapter alone"):
        nsc.merge(setting.base, setting.adapters, method="ties", coefficients=tmp_path / "out", progress=False)
