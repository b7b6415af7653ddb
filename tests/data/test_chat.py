"""Conversations as rows: every shape that people have, written by the base's template, and each refusal by name."""

import json
from pathlib import Path
from typing import Any

import pytest

from nsc.config import MergeConfig
from nsc.data.image_text import read_prompts
from nsc.data.text import read_texts, texts_alone, tokenize
from nsc.errors import DataError
from nsc.merging.api import merge
from tests.tiny import linears, random_factors, save_tokenizer, tiny_llama, word_tokenizer, write_adapter

TEMPLATE = (  # a token before every turn, as most templates put one, and the first of them is the tokenizer's own
    "{{ bos_token }} {% for message in messages %}"
    "{% if message['role'] == 'system' and not loop.first %}{{ raise_exception('system comes first') }}{% endif %}"
    "{{ {'system': 'word10', 'user': 'word11', 'assistant': 'word12'}[message['role']] }} {{ message['content'] }} "
    "{% endfor %}{% if add_generation_prompt %}word12{% endif %}"
)
TURNS = [("system", "word1"), ("user", "word2 word3"), ("assistant", "word4")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]
WRITTEN = "<s> word10 word1 word11 word2 word3 word12 word4"
ASKED = "<s> word10 word1 word11 word2 word3 word12"
SHAREGPT = [dict(zip(("from", "value"), turn, strict=True)) for turn in TURNS]
HUMAN = [
    message | {"from": {"user": "human", "assistant": "gpt"}.get(message["from"], "system")} for message in SHAREGPT
]
PARTS = [{"role": role, "content": [{"type": "text", "text": content}]} for role, content in TURNS]


@pytest.fixture
def tokenizer() -> Any:
    """One that puts <s> before every text, and whose template writes it too."""
    from tokenizers.processors import TemplateProcessing

    made = word_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.chat_template = TEMPLATE
    return made


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words(tokenizer: Any, rows: list[Any], answered: bool = False, most: int = 99) -> list[str]:
    """What is tokenised of rows, as words."""
    return [" ".join(tokenizer.convert_ids_to_tokens(i)) for i in tokenize(tokenizer, {"a": rows}, most, answered)["a"]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": MESSAGES},
        {"messages": MESSAGES, "prompt": "word9", "label": 1},
        {"messages": PARTS},
        {"conversations": HUMAN},
        {"conversations": SHAREGPT},
        {"conversations": MESSAGES},
        {"messages": [message | {"name": None, "tool_calls": None} for message in MESSAGES]},
    ],
    ids=lambda row: json.dumps(row)[:40],
)
def test_every_shape_is_written_by_the_template(tmp_path, tokenizer, row):
    file = jsonl(tmp_path / "rows.jsonl", row, {"text": "word5"})
    for rows in (read_texts(file), read_texts([row, "word5"]), read_prompts(file), texts_alone(file, "no images")):
        assert words(tokenizer, rows) == [WRITTEN, "<s> word5"]
        assert words(tokenizer, rows, answered=True) == [ASKED, "<s> word5"]


def test_lists_of_messages_and_named_fields(tmp_path, tokenizer):
    assert words(tokenizer, read_texts([MESSAGES, HUMAN])) == [WRITTEN, WRITTEN]
    assert words(tokenizer, texts_alone([MESSAGES], "no images")) == [WRITTEN]
    file = jsonl(tmp_path / "rows.jsonl", {"messages": MESSAGES, "chosen": HUMAN, "prompt": "word9"})
    assert words(tokenizer, read_texts(f"{file}#chosen")) == [WRITTEN]
    assert read_texts(f"{file}#prompt") == ["word9"]


def test_parquet(tmp_path, tokenizer):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": MESSAGES, "text": None}, {"messages": None, "text": "word5"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert words(tokenizer, read_texts(tmp_path / "rows.parquet")) == [WRITTEN, "<s> word5"]


def test_without_the_last_answer_it_is_asked_for_only_where_the_row_is_to_be_answered(tokenizer):
    rows = read_texts([MESSAGES[:2]])
    assert words(tokenizer, rows) == [ASKED.removesuffix(" word12")]
    assert words(tokenizer, rows, answered=True) == [ASKED]
    assert words(tokenizer, rows, most=4) == ["<s> word10 word1 word11"]


def test_the_same_text_on_every_day(tokenizer):
    (chat,) = read_texts([MESSAGES[1:2]])
    tokenizer.chat_template = "\n {% set day = strftime_now('%d %b %Y') %}{{ day }} {{ messages[0]['content'] }}"
    undated = tokenizer.chat_template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    written = chat.written(tokenizer, answered=False)
    tokenizer.chat_template = undated
    assert written == chat.written(tokenizer, answered=False) == "\n26 Jul 2024 word2 word3"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": []}, "line 2: .*empty"),
        ({"messages": [{"role": "user", "content": " "}]}, "line 2: .*empty"),
        ({"messages": "[]"}, "line 2: messages holds a str"),
        ({"conversations": {"from": ["human"], "value": ["a"]}}, "line 2: conversations holds a dict"),
        ({"messages": ["a"]}, "line 2: message 1 is a str"),
        ({"messages": [{"content": "a"}]}, "line 2: message 1 .*role None"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "narrator", "content": "b"}]},
            "message 2 .*narrator",
        ),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "message 1 .*role"),
        ({"messages": [{"role": "user", "text": "a"}]}, "line 2: message 1 holds a NoneType"),
        ({"messages": [{"role": "user", "content": 3}]}, "line 2: message 1 holds a int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "line 2: message 1 holds .*image"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]}, "line 2: message 1 holds"),
        ({"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}]}]}, "line 2: message 1 .*tool"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "line 2 holds half of a surrogate"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_conversation_is_refused_by_name(tmp_path, row, said):
    file = jsonl(tmp_path / "rows.jsonl", "a", row)
    with pytest.raises(DataError, match=said):
        read_texts(file)


@pytest.mark.parametrize(
    ("template", "turns", "answered", "said"),
    [
        (None, MESSAGES, False, "text 1: .*no chat template.*rows of text"),
        (TEMPLATE, MESSAGES[::-1], False, "text 1: .*system comes first"),
        ("{{ messages[0]['content']['text'] + 1 }}", MESSAGES, False, "text 1: .*template"),
        ("{{ bos_token }} {{ messages[0]['content'] }}", MESSAGES, False, "text 1: .*leaves out"),
        (TEMPLATE, [MESSAGES[0], MESSAGES[2]], True, "text 1: .*no turn of a user"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(tokenizer, template, turns, answered, said):
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=said):
        tokenize(tokenizer, {"a": read_texts([turns])}, 99, answered)


def test_a_merge_learns_from_conversations_as_from_their_text(tmp_path):
    model = tiny_llama("AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "base")
    save_tokenizer(tmp_path / "base")
    (tmp_path / "base/chat_template.jinja").write_text(TEMPLATE)
    names = [name for name in linears(model) if name.endswith("q_proj")]
    adapters = {t: write_adapter(tmp_path / t, random_factors(names, seed=i)) for i, t in enumerate("ab")}
    settings = MergeConfig(steps=2, batch_size=1, dtype="float32", device="cpu")
    results = [
        merge(str(tmp_path / "base"), adapters, {"a": [MESSAGES], "b": [{"conversations": HUMAN[:2]}]}, settings),
        merge(str(tmp_path / "base"), adapters, {"a": [WRITTEN], "b": [ASKED.removesuffix(" word12")]}, settings),
    ]
    assert results[0].coefficients.tolist() == results[1].coefficients.tolist()
