"""Whatever lies in a file: a named error, or what stock PEFT, plain Python or the sound file says. Nothing else.

2,000 cases, always the same; ``make fuzz`` (FUZZ=25) takes 25 times as many.
"""

import json
import os
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import nsc
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import match_adapters
from nsc.bases.base_model import Base
from nsc.bases.weights import shard_names
from nsc.cli.job import Job, gather
from nsc.config import MergeConfig
from nsc.data.text import read_texts
from nsc.errors import NSCError
from nsc.export.description import digest_of
from nsc.export.record import Record
from nsc.learning.checkpoint import read, save
from nsc.learning.state import begin
from tests.fuzz.mutations import EDITS, VALUES, edited, places, with_value
from tests.tiny import random_factors, save_base, updates_of, write_adapter

TIMES = int(os.environ.get("FUZZ", "1"))
NAMES = [f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj", "v_proj")]
LONGEST = 20_000  # characters of an error, where an adapter has many faults


def cases(count: int):
    return settings(
        max_examples=count * TIMES,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def outcome(work):
    """What ``work`` returns; None for a named error, which has something to say and not too much."""
    try:
        return work()
    except NSCError as error:
        assert 10 < len(str(error)) < LONGEST
        return None


class Tiny(nn.Module):
    """Linear layers with the names of a LLaMA's, for stock PEFT to load adapters onto."""

    def __init__(self):
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(nn.Module() for _ in range(2))
        for layer in self.model.layers:
            layer.self_attn = nn.Module()
            layer.self_attn.q_proj, layer.self_attn.v_proj = nn.Linear(6, 5), nn.Linear(6, 5)


def stock_updates(path: Path):
    """Module -> float64 update as PEFT applies it; None where PEFT cannot load the adapter."""
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(Tiny(), path)
    except Exception:
        return None
    return updates_of(model)


def our_updates(path: Path):
    """Module -> float64 update as it is merged."""
    adapter = read_adapter(path, "a")
    shapes = {name.removeprefix("model."): (5, 6) for name in NAMES}
    places = match_adapters({"a": adapter}, shapes)["a"]
    return {places[name]: f.scale * f.B.double() @ f.A.double() for name, f in adapter.factors.items()}


def require_stock(path: Path) -> None:
    """Refused by name, or the updates are PEFT's; of an adapter that PEFT cannot load, finite or refused."""
    ours = outcome(lambda: our_updates(path))
    if ours is None or (stock := stock_updates(path)) is None:
        return
    stock = {name: update for name, update in stock.items() if update.any()}  # what the file lacks stays at zero
    ours = {name: update for name, update in ours.items() if update.any()}
    assert stock.keys() <= ours.keys()
    for name, update in stock.items():
        torch.testing.assert_close(ours[name], update, rtol=1e-6, atol=0, equal_nan=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("fuzz") / "adapter"
    return write_adapter(path, random_factors(NAMES, r=4, d=6, m=5), target_modules=["q_proj", "v_proj"])


CHANGES = st.dictionaries(
    st.sampled_from(
        [
            "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "modules_to_save", "bias", "init_lora_weights", "fan_in_fan_out", "peft_type", "task_type", "use_dora",
            "layers_to_transform", "layers_pattern", "base_model_name_or_path", "lora_dropout", "more",
        ]
    ),
    VALUES,
    max_size=2,
)  # fmt: skip
SOUND = st.fixed_dictionaries(
    {},
    optional={
        "lora_alpha": st.one_of(st.integers(1, 64), st.floats(1e-3, 1e3)),
        "use_rslora": st.booleans(),
        "alpha_pattern": st.dictionaries(
            st.sampled_from(["q_proj", "v_proj", r".*0.*q_proj", "layers.1.self_attn.v_proj"]),
            st.integers(1, 9),
            max_size=2,
        ),
        "target_modules": st.sampled_from([NAMES, ["q_proj"], r".*\.(q|v)_proj", ["self_attn.q_proj", "v_proj"]]),
        "layers_to_transform": st.sampled_from([None, 0, [0, 1]]),
        "exclude_modules": st.sampled_from([None, ["v_proj"], r".*v_proj"]),
    },
)  # fmt: skip


@cases(300)
@given(SOUND, CHANGES)
def test_adapter_configs(adapter, sound, changes):
    file = adapter / "adapter_config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | sound | changes))
        require_stock(adapter)
    finally:
        file.write_text(before)


@cases(300)
@given(EDITS, st.booleans())
def test_adapter_tensors(adapter, edits, in_header):
    file = adapter / "adapter_model.safetensors"
    before = file.read_bytes()
    split = 8 + int.from_bytes(before[:8], "little")
    head, body = (
        (edited(before[:split], edits), before[split:])
        if in_header
        else (before[:split], edited(before[split:], edits))
    )
    try:
        file.unlink()  # not written in place: what was read before is mapped
        file.write_bytes(head + body)
        require_stock(adapter)
    finally:
        file.unlink()
        file.write_bytes(before)


ROW = st.one_of(
    VALUES.map(lambda value: json.dumps({"text": value}).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: json.dumps({"messages": value}).encode()),
    VALUES.map(lambda value: json.dumps({"conversations": [{"from": "human", "value": value}]}).encode()),
    st.binary(max_size=12),
    st.sampled_from([b"[" * 5000, b'{"text": "\\ud800"}', b"9" * 5000, b'{"text": "a", "more": NaN}', b"\xef\xbb\xbf"]),
)


@cases(350)
@given(st.lists(ROW, min_size=1, max_size=3), st.sampled_from([".jsonl", ".txt"]))
def test_rows(tmp_path_factory, rows, suffix):
    file = tmp_path_factory.getbasetemp() / f"rows{suffix}"
    file.write_bytes(b"\n".join(rows))
    texts = outcome(lambda: read_texts(file))
    said = [text if isinstance(text, str) else "".join(said for _, said in text.turns) for text in texts or ()]
    assert texts is None or (texts and all(text.strip() and text.encode() is not None for text in said))


SETTINGS = st.dictionaries(
    st.sampled_from([*MergeConfig().to_dict(), *Job.__dataclass_fields__, "more"]), VALUES, max_size=3
)


@cases(350)
@given(SETTINGS, EDITS, st.integers(0, 3))
def test_yaml(tmp_path_factory, values, edits, count):
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    sound = {"base": "b", "adapters": {"a": "x"}, "data": {"a": "rows.jsonl"}, "out": "out", "steps": 3}
    text = yaml.safe_dump(sound | values, allow_unicode=True).encode("utf-8", "surrogatepass")
    file.write_bytes(edited(text, edits[:count]))
    found = outcome(lambda: gather({}, (), file))
    if found is not None:
        job, config = found
        assert job.base and job.adapters and job.out and MergeConfig.from_dict(config.to_dict()) == config


@pytest.fixture(scope="module")
def recorded(tmp_path_factory, merged) -> tuple[Path, Record]:
    folder = tmp_path_factory.mktemp("recorded")
    merged.record.write(folder)
    return folder, Record.read(folder)


def same(one: Record, other: Record) -> bool:
    return torch.equal(one.coefficients, other.coefficients) and replace(one, coefficients=None) == replace(
        other, coefficients=None
    )


@cases(200)
@given(EDITS, st.sampled_from(["merge.yaml", "coefficients.safetensors"]))
def test_records(recorded, edits, name):
    folder, sound = recorded
    before = (folder / name).read_bytes()
    try:
        (folder / name).unlink()
        (folder / name).write_bytes(edited(before, edits))
        found = outcome(lambda: Record.read(folder))
        assert found is None or not found.verified or same(found, sound)
    finally:
        (folder / name).unlink()
        (folder / name).write_bytes(before)


@cases(100)
@given(st.data(), VALUES)
def test_records_of_other_values(recorded, data, value):
    """Sealed again, so that types and bounds alone are left to refuse."""
    folder, _ = recorded
    file = folder / "merge.yaml"
    before = file.read_text()
    values = yaml.safe_load(before)
    del values["digest"]
    values = with_value(values, data.draw(st.sampled_from(places(values)[1:])), value)
    try:
        text = yaml.safe_dump(values)
        file.write_text(yaml.safe_dump(values | {"digest": digest_of(yaml.safe_load(text))}))
        found = outcome(lambda: Record.read(folder))
        assert found is None or isinstance(found.base, str)
        if found is not None:
            outcome(lambda: nsc.apply(folder))
    finally:
        file.write_text(before)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    config = MergeConfig(steps=6)
    state = begin(nn.Parameter(torch.full((3, 2), 0.4)), torch.zeros(3, 2, dtype=torch.bool), config, "one")
    for step in range(4):
        state.theta.grad = torch.full((3, 2), 0.1 * step + 0.1)
        state.update()
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint.pt"
    save(state, path, 64)
    return path


@cases(250)
@given(EDITS)
def test_checkpoints(checkpoint, edits):
    before = checkpoint.read_bytes()
    sound = read(checkpoint, "one", 6)
    try:
        checkpoint.write_bytes(edited(before, edits))
        found = outcome(lambda: read(checkpoint, "one", 6))
        assert found is None or (torch.equal(found["theta"], sound["theta"]) and found["step"] == sound["step"])
    finally:
        checkpoint.write_bytes(before)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", max_shard_size="20KB")


@cases(150)
@given(st.data(), VALUES, EDITS, st.booleans())
def test_base_files(base_folder, data, value, edits, bytewise):
    """A config or shard index: read by transformers or refused; and no shard lies outside of the folder."""
    file = base_folder / data.draw(st.sampled_from(["config.json", "model.safetensors.index.json"]))
    before = file.read_bytes()
    values = json.loads(before)
    changed = with_value(values, data.draw(st.sampled_from(places(values))), value)
    try:
        file.write_bytes(edited(before, edits) if bytewise else json.dumps(changed).encode())
        found = outcome(lambda: (Base(str(base_folder)).model, shard_names(base_folder)))
        assert found is None or all((base_folder / name).parent == base_folder and "/" not in name for name in found[1])
    finally:
        file.write_bytes(before)
