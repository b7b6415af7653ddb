"""The pieces of examples/answer_suite.py and answer_merges.py on a tiny LLaMA and made-up rows."""

import json
import random
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny import WORDS, rewrite, save_base, word_tokenizer

sys.path.append(str(Path(__file__).parents[2] / "examples"))
import answer_merges as merges
import answer_suite as suite
from encoder_suite import read_rows, samples_of

from nsc.data.text import read_texts, tokenize

TASKS = {
    "kind": suite.Task("texts", "word0 word1", ("word50", "word51", "word52"), 12),
    "echo": suite.Task("pairs", "word2", suite.Pair("text_b", "text_a", 1), 12, "ROUGE-L"),
}
CHAT = (
    "{% for message in messages %}<s>{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>word3\n{% endif %}"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Rows whose words tell their answer; some come twice, some of the training are in the test, some are long."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for dataset in ("texts", "pairs"):
        rows = []
        for i in range(150):
            words = [WORDS[i % 3], *rng.choices(WORDS, k=rng.randint(4, 6) if i % 10 else 20)]
            if dataset == "texts":
                rows.append({"text": " ".join(words), "label": i % 3})
            else:
                rows.append({"text_a": " ".join(words[:3]), "text_b": " ".join(words), "label": i % 2})
        parts = {"train": rows[:100] + rows[:9] + rows[100:110], "test": rows[100:]}
        for part, chosen in parts.items():
            (folder / f"{dataset}_{part}.jsonl").write_text("\n".join(map(json.dumps, chosen)) + "\n")
    return folder


@pytest.fixture(scope="module")
def out(data, tmp_path_factory):
    """The suite of TASKS at a tiny scale."""
    folder = tmp_path_factory.mktemp("answers")
    save_base(folder / "base")
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "base")
    with pytest.MonkeyPatch.context() as patch:
        for module in (suite, merges):
            patch.setattr(module, "TASKS", TASKS)
            patch.setattr(module, "MAX_LENGTH", 20)
            patch.setattr(module, "MAX_NEW_TOKENS", 4)
        patch.setattr(suite, "VALIDATION", 6)
        patch.setattr(suite, "TEST", 20)
        patch.setattr(suite, "LEARNING_RATE", 3e-2)
        patch.setattr("encoder_suite.RESAMPLES", 50)
        patch.setattr(merges, "SCALES", {"task-arithmetic": (0.2, 1.0)})
        few = {"method": "match", "steps": 2, "batch_size": 2}
        patch.setattr(
            merges,
            "MERGES",
            {
                "sum-labels": merges.Merge({"method": "task-arithmetic"}, 0, labels=True),
                "match": merges.Merge(few, 16),
            },
        )
        suite.train_suite(data, folder, list(TASKS))
        yield folder


@pytest.fixture(scope="module")
def tokenizer(out):
    return AutoTokenizer.from_pretrained(out / "base")


def test_no_prompt_is_in_two_parts_and_none_is_cut(out, data, tokenizer):
    for task in TASKS.values():
        parts = suite.split(data, task, tokenizer)
        texts = [row.text for part in parts for row in part]
        assert len(set(texts)) == len(texts)
        assert max(len(ids) for ids in tokenizer(texts)["input_ids"]) <= 20
        long = [text for text in read_texts(data / f"{task.dataset}_train.jsonl#{text_field(task)}") if len(text) > 99]
        assert long and not any(words in text for words in long for text in texts)
        assert abs(len(parts.train) - len(parts.unlabeled) - 6) <= 1 and len(parts.validation) == 6
        assert suite.split(data, task, tokenizer) == parts


def text_field(task: suite.Task) -> str:
    return "text" if task.metric == "exact match" else "text_b"


def test_answers_are_words_of_classes_or_the_other_text_of_the_labels_pairs(out, data, tokenizer):
    for row in suite.split(data, TASKS["kind"], tokenizer).train:
        assert row.text.startswith("<s>word0 word1</s>\n<s>word") and row.text.endswith("</s>\n<s>word3\n")
        assert row.answer == f"word{50 + int(row.text.split('<s>word')[2].split()[0])}"
    taken = {row["text_b"]: row["text_a"] for row in read_rows(data / "pairs_train.jsonl") if row["label"] == 1}
    for row in suite.split(data, TASKS["echo"], tokenizer).train:
        assert row.answer == taken[row.text.split("<s>")[2].split("</s>")[0]]


def test_nsc_reads_the_prompts_that_experts_are_trained_on(out, data, tokenizer):
    for name, task in TASKS.items():
        parts = suite.split(data, task, tokenizer)
        read = read_texts(out / f"unlabeled/{name}.jsonl")
        assert read == [row.text for row in parts.unlabeled]
        assert tokenize(tokenizer, {name: read}, 20)[name] == [tokenizer(text)["input_ids"] for text in read]
        assert all(set(row) == {"text"} for row in read_rows(out / f"unlabeled/{name}.jsonl"))


def test_the_loss_is_that_of_each_answers_tokens_alone(out, data, tokenizer):
    rows = suite.split(data, TASKS["echo"], tokenizer).train[:5]
    rows = [row._replace(answer=" ".join(row.answer.split()[: 1 + i % 3])) for i, row in enumerate(rows)]
    model = AutoModelForCausalLM.from_pretrained(out / "base").double()
    losses = []
    for row in rows:
        prompt, answer = (tokenizer(text)["input_ids"] for text in (row.text, f"{row.answer}</s>"))
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += F.cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    assert len(losses) > 2 * len(rows)
    assert suite.answer_loss(model, tokenizer, rows).item() == pytest.approx(np.mean(losses), rel=1e-5)


def test_experts_have_row_spaces_of_their_own_and_are_trained_once(out, data):
    tensors = [load_file(out / f"adapters/{name}/adapter_model.safetensors") for name in TASKS]
    key = next(key for key in tensors[0] if "lora_A" in key)
    assert (tensors[0][key] - tensors[1][key]).abs().max() > 0.01
    assert all(len(file) == 4 * 2 * 2 and not any("lora" not in key for key in file) for file in tensors)
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.*")}
    suite.train_suite(data, out, list(TASKS))
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.*")} == before


def greedy(model, tokenizer, prompt: str) -> str:
    """The answer to a single prompt, token by token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 4 and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@torch.no_grad()
def test_answers_are_those_of_prompts_alone_one_token_after_another(out, tokenizer, monkeypatch):
    monkeypatch.setattr(suite, "ANSWERED", 7)
    model = suite.answering(out / "base", out / "adapters/kind").float()
    prompts = read_texts(out / "unlabeled/kind.jsonl")[:16]
    answers = suite.answers_of(model, tokenizer, prompts)
    assert answers == [greedy(model, tokenizer, prompt) for prompt in prompts] and len(set(answers)) > 1
    plain = AutoModelForCausalLM.from_pretrained(out / "base")
    expert = PeftModel.from_pretrained(plain, out / "adapters/kind")
    assert answers[0] == greedy(expert, tokenizer, prompts[0])


def test_rouge_is_the_f1_of_the_longest_common_subsequence():
    def longest(a: list[str], b: list[str]) -> int:
        of = [{c for n in range(len(x) + 1) for c in combinations(x, n)} for x in (a, b)]
        return max(map(len, of[0] & of[1]))

    rng = random.Random(0)
    for _ in range(60):
        a, b = (rng.choices("abcd", k=rng.randint(1, 7)) for _ in range(2))
        expected = 2 * longest(a, b) / (len(a) + len(b))
        assert suite.rouge_l(" ".join(a), " ".join(b)) == suite.rouge_l(" ".join(b), " ".join(a)) == expected
    assert suite.rouge_l("Isn't it?", "isn t IT") == 1 and suite.rouge_l("", "a") == 0


def test_an_exact_match_minds_neither_case_nor_punctuation():
    assert suite.exact_match("Person.", "person") == 1
    assert suite.exact_match("a person", "person") == suite.exact_match("", "person") == 0


def test_the_table_holds_each_scores_mean_its_share_and_the_same_resamples(out, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["answer_merges.py", "--out", str(out)])
    merges.main()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[-6:]]
    by_name = {line[0]: line for line in lines}
    kept = json.loads((out / "scores.json").read_text())
    assert list(by_name) == ["merge", "---", "fine-tuned", "base alone", "sum-labels", "match"]
    rows = {name: read_rows(out / f"test/{name}.jsonl") for name in TASKS}
    shares = {}
    for model in ("fine-tuned", "base alone", "match"):
        ratios = []
        for i, name in enumerate(TASKS):
            said = [json.loads((out / f"answers/{m}/{name}_test.json").read_text()) for m in (model, "fine-tuned")]
            score = suite.rouge_l if name == "echo" else suite.exact_match
            reached, expert = (
                np.array([score(x, row["answer"]) for x, row in zip(answers, rows[name], strict=True)])
                for answers in said
            )
            assert by_name[model][2 + i] == f"{reached.mean():.3f}"
            if model in kept[name]:
                assert kept[name][model] == pytest.approx(reached.mean())
            drawn = samples_of(len(reached)).numpy()
            ratios.append(reached[drawn].mean(1) / expert[drawn].mean(1))
        shares[model] = np.mean(ratios, axis=0)
        assert by_name[model][4] == f"**{shares[model][0]:.1%}**"
    low, high = np.percentile(shares["match"][1:], [2.5, 97.5])
    assert by_name["match"][5] == f"{low:.1%} to {high:.1%}"
    assert shares["fine-tuned"] == pytest.approx(1)


def test_labels_choose_the_scale_whose_answers_score_best(out):
    best = merges.best_scale("sum-labels", out, list(TASKS))
    reached = {}
    for scale in (0.2, 1.0):
        means = []
        for name in TASKS:
            answers = json.loads((out / f"answers/sum-labels-{scale:g}/{name}_validation.json").read_text())
            means.append(suite.scores_of(out, name, answers, "validation").mean().item())
        reached[scale] = np.mean(means)
    assert reached[0.2] != reached[1.0] and best == max(reached, key=reached.get)


def test_a_merge_whose_names_fit_no_layer_is_refused(out, tmp_path):
    merges.merged(out, list(TASKS), None, method="task-arithmetic").save(tmp_path / "merged")
    rewrite(tmp_path / "merged/adapter_model.safetensors", lambda tensors: tensors.pop(next(iter(tensors))))
    with pytest.raises(UserWarning, match="missing adapter keys"):
        suite.answering(out / "base", tmp_path / "merged")
