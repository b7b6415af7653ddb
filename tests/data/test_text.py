"""Unlabeled rows in, seeded batches out: every format, every refusal, and the laws of batching."""

import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from nsc.data.packing import collate
from nsc.data.sampling import draw
from nsc.data.text import TextBatches, read_texts, tokenize
from nsc.errors import DataError
from tests.tiny import WORDS, save_tokenizer


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("a string", "a string"),
        (dict(text="t", label=1), "t"),
        (dict(label=1, prompt="p"), "p"),
        (dict(text_a="a", text_b="b", label=0), "a\nb"),
        (dict(premise="p", hypothesis="h", text_a="only one of a pair"), "p\nh"),
        (dict(sentence1="1", sentence2="2"), "1\n2"),
        (dict(question="q", sentence="s"), "q\ns"),
        (dict(question="q", context="c", answers=["a"]), "q\nc"),
        (dict(instruction="do", input="this", output="done"), "do\nthis"),
        (dict(instruction="do", input=None, output="done"), "do"),
        (dict(sentence="s", label=1), "s"),
        (dict(text="ünïcode ∑ 语"), "ünïcode ∑ 语"),
        (dict(text="line\u2028separator\x85and\x0cform feed"), "line\u2028separator\x85and\x0cform feed"),
    ],
    ids=str,
)
def test_fields_are_found(file, row, text):
    assert read_texts(jsonl(file, row, row)) == [text, text]


def test_fields_are_named(file):
    jsonl(file, dict(text="t", title="a", body="b"))
    assert read_texts(f"{file}#title+body") == ["a\nb"] and read_texts(f"{file}#body") == ["b"]
    with pytest.raises(DataError, match=r"line 1 has the fields text, title, body.*FILE#field\+field"):
        read_texts(f"{file}#headline")


def test_a_number_sign_in_a_folder_name(tmp_path):
    (tmp_path / "c#").mkdir()
    file = jsonl(tmp_path / "c#" / "rows.jsonl", dict(text="t", title="a"))
    assert read_texts(file) == ["t"] and read_texts(f"{file}#title") == ["a"]


def test_text_file_and_texts_and_blank_lines(tmp_path, file):
    text = tmp_path / "rows.txt"
    text.write_bytes(b"\xef\xbb\xbffirst\r\n\r\n  second  \n")
    assert read_texts(text) == ["first", "second"]
    file.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\n"b"\n{"text": "  "}')
    assert read_texts(file) == ["a", "b"]
    assert read_texts(["x", " ", "y"]) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n\n{"text": \n"b"\n', "line 3 is not JSON"),
        (b'{"text": "a"}\n{"text": "b"} x\n', "line 2 is not JSON"),
        (b'{"text": "a"}\n["b"]\n', "line 2 holds a list"),
        (b'"a"\n3\n', "line 2 holds a int"),
        (b'{"text": "a"}\n{"words": "b", "label": 1}\n', "line 2 has the fields words, label"),
        (b'{"text": "a"}\n{"prompt": [{"role": "user"}]}\n', "line 2: field prompt holds a list"),
        (b'{"text": "caf\xe9"}\n', r"not UTF-8 text \(byte 13\)"),
        (b"", "no text"),
        (b'\n \n{"text": ""}\n{"text": null}', "no text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unreadable_lines_are_named(file, content, said):
    file.write_bytes(content)
    with pytest.raises(DataError, match=said) as error:
        read_texts(file)
    assert str(file) in str(error.value)


def test_missing_and_foreign_sources(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl does not exist"):
        read_texts(tmp_path / "nowhere.jsonl")
    (tmp_path / "rows.csv").write_text("a,b\n")
    with pytest.raises(DataError, match=r"rows\.csv is neither \.jsonl nor \.txt"):
        read_texts(tmp_path / "rows.csv")
    with pytest.raises(DataError, match="the given list holds no text"):
        read_texts([])


@pytest.mark.parametrize(
    ("spec", "asked"),
    [
        ("hub:glue:mnli:validation", ("glue", "mnli", "validation")),
        ("hub:user/set", ("user/set", None, "train")),
        ("hub:user/set::test", ("user/set", None, "test")),
    ],
)
def test_hub(monkeypatch, spec, asked):
    calls = []

    def load(name, config, split):
        calls.append((name, config, split))
        return [dict(premise="p", hypothesis="h", label=0), dict(premise="q", hypothesis="i", label=1)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    assert read_texts(spec) == ["p\nh", "q\ni"] and read_texts(f"{spec}#hypothesis") == ["h", "i"]
    assert calls == [asked, asked]


def test_hub_refusals(monkeypatch):
    def fail(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=fail))
    with pytest.raises(DataError, match=r"'user/set' \(config None, split train\) cannot be loaded: no network"):
        read_texts("hub:user/set")
    rows = SimpleNamespace(load_dataset=lambda *args, **kwargs: [dict(words="w")])
    monkeypatch.setitem(sys.modules, "datasets", rows)
    with pytest.raises(DataError, match=r"hub:user/set row 1 has the fields words"):
        read_texts("hub:user/set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the datasets library: pip install"):
        read_texts("hub:user/set")


def numbered(task: int, count: int) -> list[list[int]]:
    """Samples that say whose they are: sample i of task k is 100 k + i, repeated i + 1 times."""
    return [[100 * task + i] * (i + 1) for i in range(count)]


TOKENS = {"a": numbered(1, 5), "b": numbered(2, 3)}


def firsts(batches: TextBatches, step: int) -> list[int]:
    """The first token of every sample of a step, in the order in which they are drawn."""
    drawn = [ids[i][0] for task, ids in batches.tokens.items() for i in drawn_of(batches, task, step)]
    assert sorted(drawn) == sorted(t for batch in batches(step) for t in first_tokens(batch))
    return drawn


def drawn_of(batches: TextBatches, task: str, step: int) -> list[int]:
    return draw(len(batches.tokens[task]), batches.batch_size, step, f"{batches.seed}/{task}")


def first_tokens(batch) -> list[int]:
    return batch.inputs["input_ids"][:, 0].tolist()


def test_batches_are_a_function_of_seed_and_step():
    batches = TextBatches(TOKENS, 2, pad_id=0, seed=3)
    backwards = [firsts(batches, step) for step in reversed(range(12))]
    assert [firsts(TextBatches(TOKENS, 2, pad_id=0, seed=3), step) for step in range(12)] == backwards[::-1]
    other = TextBatches(TOKENS, 2, pad_id=0, seed=4)
    assert [firsts(batches, s) for s in range(5)] != [firsts(other, s) for s in range(5)]


def test_every_sample_once_per_turn_and_turns_differ():
    batches = TextBatches(TOKENS, 2, pad_id=0)
    seen = [token for step in range(15) for token in firsts(batches, step)]
    a, b = [t for t in seen if t < 200], [t for t in seen if t >= 200]
    assert len(a) == len(b) == 30
    turns = [a[5 * i : 5 * i + 5] for i in range(6)]
    assert all(sorted(turn) == [100, 101, 102, 103, 104] for turn in turns)
    assert all(Counter(b[3 * i : 3 * i + 3]) == Counter([200, 201, 202]) for i in range(10))
    assert len(set(map(tuple, turns))) > 1


def test_a_task_draws_the_same_samples_whatever_other_tasks_there_are():
    together, alone = TextBatches(TOKENS, 2, pad_id=0), TextBatches({"b": TOKENS["b"]}, 2, pad_id=0)
    assert [firsts(together, s)[2:] for s in range(9)] == [firsts(alone, s) for s in range(9)]


@pytest.mark.parametrize("causal", [True, False])
def test_weights_sum_to_one_and_padding_weighs_nothing(causal):
    batch = collate([[5, 6, 7], [8], [9, 9]], [0, 0, 2], pad_id=63, causal=causal)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7], [8, 63, 63], [9, 9, 63]]
    expected = torch.tensor([[1 / 6, 1 / 6, 1 / 6], [1 / 2, 0, 0], [1 / 2, 1 / 2, 0]])
    torch.testing.assert_close(batch.weight, expected)
    assert batch.task.tolist() == [[0] * 3, [0] * 3, [2] * 3]
    sums = torch.zeros(3).index_add(0, batch.task.flatten(), batch.weight.flatten())
    torch.testing.assert_close(sums, torch.tensor([1.0, 0.0, 1.0]))
    assert ("attention_mask" in batch.inputs) != causal
    if not causal:
        assert torch.equal(batch.inputs["attention_mask"] > 0, expected > 0)


def test_samples_of_many_are_tokenised_when_they_are_asked_for(tmp_path, monkeypatch):
    """The same ids as at once, of no more rows than are drawn; a sample without tokens is named by its own number."""
    save_tokenizer(tmp_path)
    tokenizer, seen = AutoTokenizer.from_pretrained(tmp_path), []
    texts = {"a": [*WORDS[:40], ""], "b": WORDS[:3]}

    def watched(rows, **how):
        seen.extend(rows)
        return tokenizer(rows, **how)

    at_once = tokenize(tokenizer, {"a": texts["a"][:40]}, 4)["a"]
    monkeypatch.setattr("nsc.data.text.AT_ONCE", 5)
    tokens = tokenize(watched, texts, 4)
    assert seen == texts["b"] == WORDS[:3] and len(tokens["a"]) == 41
    batches = TextBatches(tokens, 2, pad_id=0)
    drawn = next(row for row in (batches.drawn(0)["a"], batches.drawn(1)["a"]) if 40 not in row)
    picks = [("a", i) for i in drawn]
    assert batches.prompts_of(picks)[0] == [at_once[i] for _, i in picks]
    answered = batches.with_answers({picks[0]: [7, 8, 9]}, "full")
    assert answered.prompts_of(picks)[0] == [[*at_once[picks[0][1]], 7, 8], at_once[picks[1][1]]]
    assert answered.counted_of(picks[0]) == slice(0, 3) and answered.counted_of(picks[1]) == slice(0, 1)
    assert sorted(seen[3:]) == sorted(texts["a"][i] for _, i in picks)
    assert tokens["a"][2:4] == at_once[2:4] and tokens["a"][-2] == at_once[39]
    with pytest.raises(DataError, match="sample 41 of task a has no token"):
        tokens["a"][40]
    with pytest.raises(IndexError):
        tokens["a"][41]


def test_tokenize_cuts_and_refuses_a_sample_without_tokens(tmp_path):
    save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenize(tokenizer, {"a": [" ".join(WORDS[:9]), WORDS[0]]}, max_length=4)
    assert tokens == {"a": [[4, 5, 6, 7], [4]]}
    with pytest.raises(DataError, match="sample 2 of task a has no token"):
        tokenize(tokenizer, {"a": [WORDS[0], ""]}, max_length=4)
