"""Whatever a user gives: one line with cause and remedy, no traceback, and no more than a screen of it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from nsc.adapters.lora import read_adapter
from nsc.cli.terminal import LONGEST
from nsc.errors import AdapterError
from nsc.merging import api
from tests.cli.test_cli import arguments, files, refused, run  # noqa: F401
from tests.tiny import random_factors, write_adapter

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefg", "bcdefgh", strict=True)
)
DEEP = "[" * 100_000


def told(result) -> str:
    """The message of a refusal, which is no traceback and of no great length."""
    text = refused(result)
    assert text.count("\n") < 12 and len(text) < LONGEST + 100, text[:2000]
    return text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (BOMB, "aliases"),
        ("settings: " + BOMB.replace("\n", "\n  "), "cannot be read as YAML"),
        (DEEP, "cannot be read as YAML"),
        ("a" * 1000 + ": 1", "unknown key"),
        ("base: " + "b" * 100_000 + "\nsteps: [1]", "steps must be a whole number"),
        ("steps: !!int x", "cannot be read as YAML"),
        ("steps: 1\nsteps: 2", "given twice"),
        ("steps: " + "9" * 400, "steps must be a whole number"),
        ("steps: " + "9" * 5000, "cannot be read as YAML"),
        ("start: .nan", "start must be finite"),
        ("lr: .inf", "lr must be finite"),
        ("eps: -1", "eps must be 0 or more"),
        ("betas: [2, 3]", "betas must be at least 0 and below 1"),
        ("weight_decay: -.inf", "weight_decay must be finite"),
        ("preferences: {a: .nan}", "the preference for a must be finite"),
        ("target_modules: q_proj", "target_modules must be"),
        ("dtype: nn", "dtype must be one of auto"),
        ("? [a]\n: 1", "cannot be read as YAML"),
        ("\x00", "cannot be read as YAML"),
        ("steps: 2020-01-01", "steps must be a whole number"),
        ("start: " + "9" * 400, "start must be a number"),
    ],
    ids=range(21),
)
def test_yaml_files(arguments, tmp_path, text, said):  # noqa: F811
    (tmp_path / "c.yaml").write_text(text)
    assert said in told(run(*arguments(tmp_path / "out", "--config", tmp_path / "c.yaml")))
    assert [p.name for p in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--device", "warp"), "device warp cannot be used"),
        (("--device", "meta"), "device meta cannot be used"),
        pytest.param(
            ("--device", "cuda"),
            "device cuda cannot be used",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA"),
        ),
        (("--rank", 0), "rank must be 1 or more, not 0"),
        (("--rank", -4), "rank must be 1 or more, not -4"),
        (("--set", "steps=!!int x"), "--set steps: '!!int x' is not valid YAML"),
        (("--set", "start=.nan"), "start must be finite"),
        (("--set", "steps=*a"), "is not valid YAML"),
        (("--set", "k" * 100_000 + "=1"), "unknown key"),
        (("--set", "lr=" + "1" * 100_000), "lr"),
        (("--tokens-per-pass", "9" * 5000), "must be a whole number or auto"),
        (("--tokens-per-pass", "²"), "must be a whole number or auto"),
    ],
    ids=range(12),
)
def test_options_are_refused_before_anything_is_read(monkeypatch, arguments, tmp_path, options, said):  # noqa: F811
    monkeypatch.setattr(api, "merge_by_learning", None)
    assert said in told(run(*arguments(tmp_path / "out", *options)))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("out", ["file/out", "x" * 300], ids=["below a file", "too long"])
def test_a_place_that_cannot_be_written_is_refused_before_learning(monkeypatch, arguments, tmp_path, out):  # noqa: F811
    monkeypatch.setattr(api, "merge_by_learning", None)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in told(run(*arguments(tmp_path / out)))


@pytest.mark.parametrize("what", ["--adapter", "--data", "--base"])
def test_names_that_no_file_has(arguments, tmp_path, what):  # noqa: F811
    long, key = "x" * 5000, what.removeprefix("--")
    change = {key: [f"plain={long}"], "where": long}
    told(run(*arguments(tmp_path / "out", **{k: v for k, v in change.items() if (k == "where") == (what == "--base")})))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (DEEP.encode(), "is not JSON"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"text": [1]}', "field text holds a list"),
        (b'{"' + b"k" * 100_000 + b'": 1}', "not the expected text"),
        (b'{"text": "a\0b"}', "NUL byte"),
        (b"\xff\xfe{\0", "is not UTF-8"),
        (b"null", "holds a NoneType"),
    ],
    ids=range(8),
)
def test_rows(arguments, files, tmp_path, line, said):  # noqa: F811
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "word1"}\n' + line)
    result = run(*arguments(tmp_path / "out", data=[f"plain={tmp_path / 'rows.jsonl'}", f"rslora={files['rslora']}"]))
    assert said in told(result)


SOUND = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
CONFIGS = {
    "r text": {"r": "4"},
    "r infinite": {"r": float("inf")},
    "r huge": {"r": 10**400},
    "r negative": {"r": -4},
    "r true": {"r": True},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha huge": {"lora_alpha": 10**400},
    "alpha a list": {"lora_alpha": [8]},
    "ranks a list": {"rank_pattern": ["q_proj"]},
    "rank text": {"rank_pattern": {"q_proj": "4"}},
    "alphas nested": {"alpha_pattern": {"q_proj": {"a": 1}}},
    "bad expression": {"rank_pattern": {"(": 4}},
    "catastrophic expression": {"rank_pattern": {r"(\w|\w\w|[a-z.])*[A-Z]": 4}},
    "task a list": {"task_type": ["CAUSAL_LM"]},
    "modules a number": {"modules_to_save": 5},
    "modules a text": {"modules_to_save": "score"},
    "targets numbers": {"target_modules": [1]},
    "base a number": {"base_model_name_or_path": 5},
    "unknown and long": {"more": "x" * 100_000},
    "bias a list": {"bias": [1]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_adapter_configs(tmp_path, name):
    path = write_adapter(tmp_path / "a", random_factors(["layers.0.self_attn.q_proj"]), **CONFIGS[name])
    result = run("inspect", path)
    if name == "unknown and long" or "expression" in name:  # told among the problems
        assert result.exit_code == 0 and len(result.output) < LONGEST
        with pytest.raises(AdapterError, match=r"unknown to this version|no regular expression|takes longer than"):
            read_adapter(path)
    else:
        assert "adapter 'a'" in told(result)


@pytest.mark.parametrize("text", [DEEP, "null", "[]", '{"r": ' + "9" * 5000 + "}", "\ud800"], ids=range(5))
def test_adapter_configs_that_are_none(tmp_path, text):
    path = write_adapter(tmp_path / "a", random_factors(["layers.0.self_attn.q_proj"]))
    (path / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    assert "adapter 'a'" in told(run("inspect", path))


BASES = {
    "no JSON": "{",
    "deep": DEEP,
    "a list": "[]",
    "unknown type": '{"model_type": "magic"}',
    "type a list": '{"model_type": ["llama"]}',
    "sizes text": {"hidden_size": "x"},
    "no heads": {"num_attention_heads": 0},
    "layers without end": {"num_hidden_layers": 10**400},
    "layers negative": {"num_hidden_layers": -1},
    "rope a number": {"rope_scaling": 3},
    "activation unknown": {"hidden_act": "magic"},
}


@pytest.mark.parametrize("name", BASES)
def test_base_configs(base, arguments, tmp_path, name):  # noqa: F811
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config, change = copy / "config.json", BASES[name]
    config.write_text(change if isinstance(change, str) else json.dumps(json.loads(config.read_text()) | change))
    told(run(*arguments(tmp_path / "out", "--steps", 1, where=copy)))
    assert not (tmp_path / "out").exists()


def test_an_error_that_nobody_foresaw_is_one_line_too(monkeypatch, arguments, tmp_path):  # noqa: F811
    def broken(*args, **kwargs):
        raise RuntimeError("first\nsecond \x1b[31m \ud800" + "x" * 100_000)

    monkeypatch.setattr(api, "merge_by_learning", broken)
    text = told(run(*arguments(tmp_path / "out")))
    assert text.startswith("RuntimeError: first second \\x1b[31m \\ud800") and "python -X dev -m nsc prints" in text
