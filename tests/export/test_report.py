"""What the reader of a merge is told, and whether it is true."""

import json
import re
from dataclasses import replace

import matplotlib.colors
import pytest
import torch
from PIL import Image

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.loading import load_tokenizer
from nsc.data.packing import collate
from nsc.data.text import tokenize
from nsc.export.programs import vllm_rank
from nsc.export.report import draw_heat_map
from nsc.learning.objective import NullSpaceObjective
from tests.tiny import random_factors, write_adapter


@pytest.fixture(scope="module")
def out(merged, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "out"
    merged.save(folder)
    return folder


def merge(base, adapters, texts, **settings):
    return nsc.merge(base, adapters, texts, **({"steps": 3, "progress": False} | settings)).report


def test_untrained_are_those_at_or_after_the_last_target(merged):
    last = [name for name in merged.modules if name.startswith("layers.3.")]
    there = merged.stack.present[[merged.modules.index(name) for name in last]]
    expected = {
        f"{name} ({t})"
        for name, row in zip(last, there, strict=True)
        for t, p in zip(merged.tasks, row, strict=True)
        if p
    }
    assert set(merged.report.untrained) == expected and "layers.3.self_attn.q_proj (plain)" in expected
    assert "without gradient, left at 0.4: 10" in merged.report.summary()


def test_an_earlier_target_leaves_more_untrained(base, adapters, texts):
    report = merge(base, adapters, texts, target_blocks=(1,), target_modules=("v_proj",))
    assert {re.match(r"layers\.(\d)", name)[1] for name in report.untrained} == {"1", "2", "3"}
    assert report.targets == ["layers.1.self_attn.v_proj"]


def test_ranks_scales_and_drift(merged):
    report = merged.report
    assert report.ranks == {"plain": "4", "rslora": "4", "double": "8", "pattern": "2-6"}
    assert report.scales == {"plain": "1", "rslora": "4", "double": "2", "pattern": "0.5-4"}
    assert report.merged_rank == 4 + 4 + 8 + 6 and report.vllm_max_lora_rank == 32
    drift = (merged.coefficients - 0.4).abs()
    assert report.max_drift == drift.max().item() and len(report.bounded) == (drift > 0.15 - 1e-6).sum()


def test_ratios_are_the_objectives_over_all_samples(merged, base, texts):
    tokens = tokenize(load_tokenizer(Base(str(base))), texts, max_length=512)
    rows = [(ids, k) for k, samples in enumerate(tokens.values()) for ids in samples]
    batch = collate([ids for ids, _ in rows], [k for _, k in rows], pad_id=0, causal=True)
    lam = {"before": torch.full_like(merged.coefficients, 0.4), "after": merged.coefficients}
    for when, told in (("before", merged.report.ratio_before), ("after", merged.report.ratio_after)):
        with merged_layers(merged.model, merged.stack, lam[when]) as layers:
            objective = NullSpaceObjective(merged.model, layers, merged.stack, merged.report.targets)
            torch.testing.assert_close(torch.tensor(told), objective.ratios(batch).nanmean(0), rtol=0, atol=1e-5)
    assert all(
        after < before for after, before in zip(merged.report.ratio_after, merged.report.ratio_before, strict=True)
    )


@pytest.mark.parametrize(
    ("rank", "needed"),
    [(1, 8), (8, 8), (9, 16), (96, 128), (256, 256), (257, 320), (321, 512), (512, 512), (513, None)],
)
def test_vllm_rank(rank, needed):
    assert vllm_rank(rank) == needed


def test_a_rank_beyond_vllm_is_said(merged):
    assert "none: vLLM stops at 512" in replace(merged.report, merged_rank=600, vllm_max_lora_rank=None).summary()


def test_drift_warnings(base, adapters, texts):
    calm = merge(base, adapters, texts, lr=1e-3)
    assert calm.warnings == [] and calm.bounded == [] and 0 < calm.max_drift <= 3.1e-3
    bounded = merge(base, adapters, texts, lr=0.2)
    assert any("were stopped by max_drift=0.15" in w for w in bounded.warnings) and bounded.max_drift <= 0.15 + 1e-6
    assert len(bounded.warnings) == 1 and set(bounded.bounded).isdisjoint(bounded.untrained)
    far = merge(base, adapters, texts, lr=0.2, max_drift=None)
    assert far.max_drift > 0.3 and "the objective alone cannot tell" in far.warnings[0] and far.bounded == []
    assert "bound none" in far.summary() and f"warning: {far.warnings[0]}" in far.summary()


def test_rank_deficient_adapters_are_warned_of(base, tmp_path, texts):
    factors = random_factors([f"model.layers.{i}.self_attn.v_proj" for i in range(4)], m=16)
    A = factors["model.layers.2.self_attn.v_proj"][0]
    A[3] = A[0]
    report = merge(base, {"a": write_adapter(tmp_path / "a", factors)}, {"a": texts["plain"]})
    assert any(
        re.search(r"adapter a: lora_A is rank-deficient in 1 modules, first layers\.2", w) for w in report.warnings
    )
    assert "1 rank-deficient" in report.conditions["a"]


def test_conditions_are_those_of_the_worst_A(merged):
    for k, task in enumerate(merged.tasks):
        A = [m.A.double().split(m.ranks)[k] for m in merged.stack.modules.values() if m.ranks[k]]
        worst = max(torch.linalg.cond(a @ a.mT).sqrt().item() for a in A)
        assert float(merged.report.conditions[task]) == pytest.approx(worst, rel=0.01)


def test_json_holds_everything(out, merged):
    report = json.loads((out / "report.json").read_text())
    assert report["modules"] == merged.modules and report["tasks"] == merged.tasks
    assert torch.equal(torch.tensor(report["coefficients"]), merged.coefficients)
    assert report["proofs"] and report["seconds_per_step"] > 0 and report["peak_memory_gib"] > 0.05
    assert report["ratios_by_target"].keys() == set(report["targets"])
    assert not re.search(r"\b(NaN|Infinity)\b", (out / "report.json").read_text())


def test_an_absent_adapter_is_null_in_json(base, adapters, texts):
    report = merge(base, adapters, texts, target_modules=("q_proj", "v_proj")).to_dict()
    ratios = report["ratios_by_target"]["layers.3.self_attn.q_proj"]
    assert [ratio is None for ratio in ratios] == [task == "rslora" for task in report["tasks"]]
    conditions = report["conditions_by_module"]["layers.0.mlp.down_proj"]
    assert [c is None for c in conditions] == [task != "rslora" for task in report["tasks"]]
    json.dumps(report, allow_nan=False)


def test_model_card(out, merged, base):
    card = (out / "README.md").read_text()
    front = card.split("---")[1]
    assert "library_name: peft" in front and "base_model" not in front and f"- base: {base.name}\n" in card
    rows = {cells[1].strip(): cells[2:-1] for line in card.splitlines() if len(cells := line.split("|")) == 7}
    for name, row, present in zip(merged.modules, merged.coefficients, merged.stack.present, strict=True):
        for cell, value, there in zip(rows[name], row.tolist(), present.tolist(), strict=True):
            assert cell.strip().rstrip(" *") == (f"{value:.4f}" if there else "-")
            assert cell.strip().endswith("*") == (there and name.startswith("layers.3."))
    assert "hidden states to" in card and "![coefficients](coefficients.png)" in card


def test_heat_map(out, merged, tmp_path):
    with Image.open(out / "coefficients.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 300 and image.height > 300
    draw_heat_map(tmp_path / "cold.png", replace(merged.report, coefficients=[[0.4] * 4] * 20))
    with Image.open(tmp_path / "cold.png") as cold, Image.open(out / "coefficients.png") as warm:
        assert blue(warm) > 0.02 > blue(cold)


def blue(image: Image.Image) -> float:
    """Share of saturated blue pixels: coefficients above their start."""
    pixels = torch.frombuffer(
        bytearray(image.convert("RGB").crop((0, 0, 600, image.height)).tobytes()), dtype=torch.uint8
    )
    hsv = matplotlib.colors.rgb_to_hsv(pixels.view(-1, 3).numpy() / 255)
    return float(((hsv[:, 0] > 0.5) & (hsv[:, 0] < 0.7) & (hsv[:, 1] > 0.5)).mean())


@pytest.mark.parametrize("tasks", [["$x$_a", "b^{", "c|d", "100 %"], ["a" * 60, "语", "ü", "-"]])
def test_strange_task_names_neither_break_nor_lose_the_table(merged, tmp_path, tasks):
    rename = dict(zip(merged.tasks, tasks, strict=True))
    columns = {
        f: {rename[t]: v for t, v in getattr(merged.report, f).items()} for f in ("ranks", "scales", "conditions")
    }
    report = replace(merged.report, tasks=tasks, **columns)
    draw_heat_map(tmp_path / "map.png", report)
    with Image.open(tmp_path / "map.png") as image:
        image.load()
    widths = {
        len(re.findall(r"(?<!\\)\|", line)) for line in report.to_markdown().splitlines() if line.startswith("| layers")
    }
    head = next(line for line in report.to_markdown().splitlines() if line.startswith("| module"))
    assert widths == {6} and len(re.findall(r"(?<!\\)\|", head)) == 6
