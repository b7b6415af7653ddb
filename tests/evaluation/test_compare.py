"""All methods on tiny adapters: the table says what each merge scores by itself, and nothing is lost on the way."""

import json
import math

import pytest
import torch
import transformers
import yaml

import nsc
from nsc.adapters.lora import read_adapters
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.cli.compare_command import read_assignments
from nsc.errors import DataError, NSCError
from nsc.evaluation.compare import compare
from nsc.evaluation.scale_search import Grid
from nsc.evaluation.table import Comparison, Row, scored
from nsc.methods import LowRank
from nsc.recipes.combination import Combination
from nsc.recipes.spec import read_recipe
from nsc.runtime.memory import PeakMemory
from tests.cli.test_cli import refused, run
from tests.test_docs import snippets
from tests.tiny import WORDS, random_factors, write_adapter

METHODS = ["task-arithmetic", "ties", "nsc", "nsc+ties"]
GRID = Grid(0.2, 1.0, (0.4, 0.2))
CONFIG = {"steps": 3, "lr": 0.05, "batch_size": 2}
TASKS = {"colour": 3, "size": 1}  # outputs of their heads


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Two adapters with a head each: of three classes, and of one number."""
    made = {}
    for seed, (task, outputs) in enumerate(TASKS.items()):
        names = [f"model.layers.{i}.self_attn.{kind}" for i in range(4) for kind in ("q_proj", "v_proj")]
        factors = {n: random_factors([n], m=16 if "v_proj" in n else 32, seed=seed)[n] for n in names}
        head = torch.randn(outputs, 32, generator=torch.Generator().manual_seed(seed))
        path = tmp_path_factory.mktemp("heads") / task
        made[task] = write_adapter(path, factors, alpha=0.6, saved={"score.weight": head}, task_type="SEQ_CLS")
    return made


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Kind of rows -> task -> file."""
    folder, found = tmp_path_factory.mktemp("rows"), {}
    for at, kind in enumerate(("data", "test", "validation")):
        found[kind] = {}
        for k, (task, outputs) in enumerate(TASKS.items()):
            lines = []
            for i in range(6):
                text = " ".join(WORDS[(11 * at + 7 * k + 3 * i + j) % 60] for j in range(3 + i))
                lines.append({"text": text} | ({} if kind == "data" else {"label": i % 3 if outputs > 1 else i / 6}))
            found[kind][task] = folder / f"{task}_{kind}.jsonl"
            found[kind][task].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory, base, heads, rows):
    """One comparison of METHODS, searched by labels, and the folder it wrote."""
    out = tmp_path_factory.mktemp("compare") / "out"
    found = compare(
        base,
        heads,
        rows["data"],
        rows["test"],
        METHODS,
        out,
        validation=rows["validation"],
        search="labels",
        grid=GRID,
        config=CONFIG,
        progress=False,
    )
    return found, out


def plain_scores(base, heads, rows, deltas) -> dict[str, float]:
    """Accuracy and Pearson of the base with these dense updates in its weights, without any of our code's forwards."""
    body = loading.load_body(Base(str(base)), "float32", "cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    for name, delta in deltas.items():
        body.get_submodule(name).weight += delta.float()
    scores = {}
    for task, adapter in read_adapters(heads).items():
        told = [json.loads(line) for line in rows["test"][task].read_text().splitlines()]
        with torch.no_grad():
            states = [body(torch.tensor([tokenizer(row["text"])["input_ids"]]))[0][0, -1] for row in told]
        logits = torch.stack(states) @ adapter.saved["score.weight"].T
        labels = torch.tensor([float(row["label"]) for row in told])
        right = (logits.argmax(1) == labels).float().mean()
        scores[task] = (right if TASKS[task] > 1 else torch.corrcoef(torch.stack((logits[:, 0], labels)))[0, 1]).item()
    return scores


def test_a_row_is_what_its_merge_scores(base, heads, rows, whole, tmp_path):
    found, _ = whole
    stack = nsc.merge(base, heads, rows["data"], steps=0, progress=False).stack
    deltas = {"heads alone": {}}
    for method in ("task-arithmetic", "ties"):
        recipe = read_recipe(method, scale=found.row(method).scale)
        combination = Combination(stack, recipe)
        updates = {name: combination.update(name) for name in stack.names}
        deltas[method] = {name: u.B @ u.A if isinstance(u, LowRank) else u for name, u in updates.items()}
    learned = nsc.merge(base, heads, rows["data"], **CONFIG, progress=False)
    deltas["nsc"] = {
        name: stack.modules[name].delta(row) for name, row in zip(stack.names, learned.coefficients, strict=True)
    }
    for k, task in enumerate(stack.tasks):
        alone = {name: stack.modules[name].delta(torch.eye(2)[k]) for name in stack.names}
        mine = plain_scores(base, heads, rows, alone)[task]
        assert found.row("fine-tuned").scores[task] == pytest.approx(mine, abs=1e-5)
    for method, updates in deltas.items():
        expected = plain_scores(base, heads, rows, updates)
        assert found.row(method).scores == pytest.approx(expected, abs=1e-5), method
    assert len({round(row.scores["size"], 4) for row in found.rows}) == len(found.rows)  # they do differ


def test_shares_and_their_mean_are_of_the_adapters_alone(whole):
    found, _ = whole
    alone = found.row("fine-tuned")
    assert alone.shares == {task: 100 for task in TASKS} and alone.mean == 100
    for row in found.rows:
        shares = {task: 100 * row.scores[task] / alone.scores[task] for task in TASKS}
        assert row.shares == pytest.approx(shares) and row.mean == pytest.approx(sum(shares.values()) / 2)


def test_what_was_done_is_told_of_every_method(whole):
    found, _ = whole
    assert [row.method for row in found.rows] == ["fine-tuned", "heads alone", *METHODS]
    assert [bool(row.optimisation) for row in found.rows[2:]] == [False, False, True, True]
    for row in found.rows[2:]:
        assert bool(row.search) == bool(row.preparation) == (row.method != "nsc")
        assert row.method == "nsc" or row.curve[row.scale] == min(row.curve.values())
    assert found.row("nsc").optimisation == found.row("nsc+ties").optimisation  # learned once
    assert found.row("nsc").scale is None and set(found.row("ties").curve) >= {0.2, 0.6, 1.0}


def test_table_picture_json_and_record_lie_in_the_folder(whole):
    found, out = whole
    assert sorted(file.name for file in out.iterdir()) == ["compare.json", "compare.md", "compare.png", "compare.yaml"]
    assert not out.with_name("out.partial").exists()
    assert (out / "compare.md").read_text(encoding="utf-8") == found.to_markdown()
    assert Comparison.read(out / "compare.json") == found
    header, _, *lines = found.to_markdown().splitlines()
    assert "colour accuracy ↑" in header and "size pearson ↑" in header
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[:6]]
    assert [row[0] for row in cells] == [row.method for row in found.rows]
    assert cells[3][2] == f"{found.row('ties').scores['colour']:.3f} ({found.row('ties').shares['colour']:.1f} %)"
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    record = yaml.safe_load((out / "compare.yaml").read_text(encoding="utf-8"))
    assert record["methods"]["ties"]["recipe"]["density"] == 0.2 and record["methods"]["nsc"]["learned"]["steps"] == 3
    assert record["search"] == "labels" and list(record["adapters"]) == list(TASKS)


def test_what_cannot_be_merged_is_a_row_with_its_reason(base, heads, rows, tmp_path, monkeypatch):
    update = Combination.update

    def broken(self, name):
        if self.recipe.name == "ties":
            raise NSCError("its core is\nsingular")
        found = update(self, name)
        return found if self.recipe.name != "dare" else found * math.nan

    monkeypatch.setattr(Combination, "update", broken)
    found = compare(
        base,
        heads,
        {},
        rows["test"],
        ["ties", "dare", "task-arithmetic"],
        tmp_path / "out",
        progress=False,
        settings={"task-arithmetic": {"scale": 0.3}},
    )
    ties, dare, plain = found.rows[2:]
    assert ties.refused == "its core is singular" and "layers.0.self_attn.q_proj is not finite" in dare.refused
    assert plain.scale == 0.3 and not plain.search and not plain.refused
    assert "- ties is refused: its core is singular" in found.to_markdown()


def test_an_interrupted_comparison_goes_on_where_it_was(base, heads, rows, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", (base, heads, {}, rows["test"])
    update = Combination.update

    def interrupted(self, name):
        if self.recipe.name == "ties":
            raise KeyboardInterrupt
        return update(self, name)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Combination, "update", interrupted)
        compare(*arguments, ["task-arithmetic", "ties"], out, progress=False)
    with pytest.raises(NSCError, match="add --resume"):
        compare(*arguments, ["task-arithmetic", "ties"], out, progress=False)
    with pytest.raises(NSCError, match="other adapters, rows or settings"):
        compare(*arguments, ["ties"], out, resume=True, config={"max_length": 3}, progress=False)
    made = []
    monkeypatch.setattr(Combination, "update", lambda self, name: made.append(self.recipe.name) or update(self, name))
    found = compare(*arguments, ["task-arithmetic", "ties"], out, resume=True, progress=False)
    assert set(made) == {"ties"} and [row.method for row in found.rows[2:]] == ["task-arithmetic", "ties"]
    out.rename(tmp_path / "out.partial")
    made.clear()
    other = {"ties": {"density": 0.5}}
    compare(*arguments, ["ties", "task-arithmetic"], out, resume=True, settings=other, progress=False)
    assert set(made) == {"ties"}  # its settings are others


def test_a_null_space_search_needs_no_label(base, heads, rows, tmp_path):
    found = compare(
        base,
        heads,
        rows["data"],
        rows["test"],
        ["task-arithmetic"],
        tmp_path / "out",
        search="null-space",
        grid=GRID,
        progress=False,
    )
    row = found.rows[2]
    assert row.curve[row.scale] == min(row.curve.values()) < 1 and len(set(row.curve.values())) == len(row.curve)


@pytest.mark.parametrize(
    "change, why",
    [
        ({"methods": ["tie"]}, "did you mean ties"),
        ({"search": "guess"}, "search must be one of"),
        ({"search": "labels"}, "--validation"),
        ({"methods": ["nsc"]}, "nsc needs unlabeled rows"),
        ({"search": "null-space"}, "the search needs unlabeled rows"),
        ({"settings": {"dare": {}}}, "for dare"),
        ({"settings": {"ties": {"densety": 1}}}, "no setting densety"),
        ({"config": {"step": 1}}, "unknown setting step"),
    ],
)
def test_what_is_asked_wrongly_is_refused_before_anything_runs(base, heads, rows, tmp_path, change, why):
    asked = {"methods": ["ties"], "progress": False} | change
    with pytest.raises(NSCError, match=why):
        compare(base, heads, {}, rows["test"], asked.pop("methods"), tmp_path / "out", **asked)
    assert not list(tmp_path.iterdir())


def test_validation_rows_are_not_test_rows(base, heads, rows, tmp_path):
    with pytest.raises(DataError, match="task colour: 6 validation rows are also test rows"):
        compare(
            base,
            heads,
            {},
            rows["test"],
            ["ties"],
            tmp_path / "out",
            validation=rows["test"],
            search="labels",
            progress=False,
        )


def test_a_task_without_a_share_is_in_nobodys_mean():
    metrics = {"good": "accuracy", "bad": "pearson"}
    alone = {"good": 0.8, "bad": -0.1}
    row = scored(Row("ties"), {"good": 0.6, "bad": 0.3}, alone, metrics)
    assert row.mean == pytest.approx(75) and math.isnan(row.shares["bad"])
    assert row.notes == ("bad has no share of fine-tuned: the adapter alone reaches -0.1; it is in no mean",)
    told = Comparison(metrics, (row,)).to_markdown()
    assert "0.300 (-)" in told and "- ties: bad has no share" in told
    broken = scored(Row("dare"), {"good": math.nan, "bad": 0.3}, {"good": 0.8, "bad": 0.5}, metrics)
    assert math.isnan(broken.mean)


def test_settings_of_the_command_line():
    common, own = read_assignments(["steps=5", "ties.scale=0.4", "nsc+ties.density=0.1", "nsc.lr=1e-2"])
    assert common == {"steps": 5}
    assert own == {"ties": {"scale": 0.4}, "nsc+ties": {"density": 0.1}, "nsc": {"lr": "1e-2"}}
    with pytest.raises(NSCError, match="unknown key stepz"):
        read_assignments(["stepz=5"])


def test_the_command(base, heads, rows, tmp_path):
    pairs = [a for t in TASKS for a in ("--adapter", f"{t}={heads[t]}", "--test", f"{t}={rows['test'][t]}")]
    words = ["compare", "--base", base, *pairs, "--out", tmp_path / "out"]
    done = run(*words, "--methods", "ties, task-arithmetic", "--set", "ties.scale=0.4", "--metric", "size=spearman")
    assert done.exit_code == 0, done.stderr
    assert (
        "| ties | 0.4 |" in done.stdout and "size spearman ↑" in done.stdout and f"written to {tmp_path}" in done.stdout
    )
    assert "ties at scale 0.4:" in done.stderr
    assert "exists already" in refused(run(*words, "--methods", "ties"))


def test_peak_memory_sees_what_was_held_for_a_moment():
    peak = PeakMemory(torch.device("cpu"))
    if peak.growth() is None:
        pytest.skip("this system does not tell")
    size = 64 * 2**20
    held = torch.ones(size // 4)
    del held
    assert size * 0.9 < peak.growth() < size * 2
    assert PeakMemory(torch.device("cpu")).growth() < size / 2  # the peak before it is forgotten


def test_the_python_of_the_page(base, heads, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = snippets("docs/comparing.md")
    names = {"nsc": nsc, "base": base, "adapters": heads, "data": {}, "test": rows["test"]}
    exec(code, names)
    assert names["found"].row("ties").scale == 0.4 and (tmp_path / "compared/compare.md").exists()
