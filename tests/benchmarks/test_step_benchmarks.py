"""The cases of the step benchmark at toy size: what runs against what, what is cut, predicted, shown."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, ViTConfig

from tests.tiny import LLAMA, VISION

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import models  # noqa: E402
import predict  # noqa: E402
import predict_step  # noqa: E402
import race  # noqa: E402
import ranks  # noqa: E402
import step_targets  # noqa: E402
import table  # noqa: E402
from targets import Results  # noqa: E402

from nsc.config import MergeConfig  # noqa: E402
from nsc.performance.timing import nsc_step  # noqa: E402

TEXT = LlamaConfig(**LLAMA)
CLIP = CLIPVisionConfig(**VISION)
TINY = {
    "text": models.Case("tiny", TEXT, 3, 2, 7, dtype="float32"),
    "images": models.Case("tiny", ViTConfig(**VISION), 3, 2, dtype="float32"),
    "both": models.Case("tiny", TEXT, 3, 1, 7, CLIP, dtype="float32"),
}
H200 = predict.GPUS["H200"]


@pytest.mark.parametrize("name", TINY)
def test_nsc_and_the_loop_do_the_same_work(name, tmp_path):
    """The same loss at the first step and after it; a tower's features are made once, or once a task and step."""
    case = TINY[name]
    model = models.random_body(case.config, case.dtype)
    run = race.Race.of(case, model, tmp_path)
    assert run.batch.task.shape == (case.tasks * case.samples, case.tokens)
    with nsc_step(model, run.stack, run.targets, [run.batch], MergeConfig(lr=3e-4)) as step:
        for _ in range(2):
            torch.testing.assert_close(step(), run.loop_step(), rtol=0, atol=1e-5)
    assert run.floor_step().shape[:2] == (case.tasks * case.samples, case.tokens)


def test_the_tower_runs_in_every_step_of_the_loop_only(tmp_path, monkeypatch):
    calls = []
    forward = models.Tower.forward
    monkeypatch.setattr(
        models.Tower, "forward", lambda self, pixels: calls.append(len(pixels)) or forward(self, pixels)
    )
    case = TINY["both"]
    model = models.random_body(case.config, case.dtype)
    run = race.Race.of(case, model, tmp_path)
    assert calls == [3] and "pixel_values" not in run.batch.inputs
    with nsc_step(model, run.stack, run.targets, [run.batch], MergeConfig()) as step:
        step()
    run.floor_step()
    assert calls == [3]
    run.loop_step()
    assert calls == [3, 1, 1, 1]


def test_cases_are_those_of_the_issue():
    shapes = {str(c): (c.tasks, c.samples, c.tokens, c.config.num_hidden_layers) for c in models.CASES}
    assert shapes["ViT-B/16, bfloat16"] == (20, 32, 197, 12)
    assert shapes["LLaMA-3-8B, bfloat16"] == (6, 2, 96, 32)
    assert shapes["LLaVA-1.5-7B, bfloat16"] == (6, 1, 640, 32)
    assert shapes["SmolLM2-135M, float32"] == shapes["SmolLM2-135M, bfloat16"] == (6, 2, 64, 30)


@pytest.mark.parametrize("case", models.CASES, ids=str)
def test_a_gpu_runs_whole_cases_and_a_cpu_says_what_it_cut(case, monkeypatch):
    monkeypatch.setattr(models, "CUDA", True)
    assert case.here() is case and case.cut == ""
    monkeypatch.setattr(models, "CUDA", False)
    small = case.here()
    assert (small is case) == (case.model == "SmolLM2-135M")
    for cut, whole in ((small.config.num_hidden_layers, case.config.num_hidden_layers), (small.samples, case.samples)):
        assert cut == whole or f"{cut} of {whole}" in small.cut
    assert small.tasks == case.tasks and small.config.hidden_size == case.config.hidden_size


def test_predictions_are_of_the_plan():
    case = step_targets.LLAMA
    flops = 4 * 6.98e9 * 12 * 96
    assert predict_step.floor(case, H200) == pytest.approx(flops / H200.rate, rel=0.06)
    for case in (step_targets.LLAMA, step_targets.LLAVA, step_targets.VIT):
        floor, ours, loop = (f(case, H200) for f in (predict_step.floor, predict_step.seconds, predict_step.loop))
        assert floor < ours < loop
    without = replace(step_targets.LLAVA, length=640, tower=None)
    images = 6 * 577 * 2 * 303e6 / H200.rate
    assert predict_step.loop(step_targets.LLAVA, H200) - predict_step.loop(without, H200) == pytest.approx(
        images, rel=0.1
    )
    assert predict_step.in_8_bits().total < step_targets.GPU_MEMORY < 2 * 68e9 + 10e9


def entry(name: str, **info) -> dict:
    made = {"device": "NVIDIA H200", "threads": 1, "commit": "abc", "date": "2026-01-01", "torch": "2", "triton": "3"}
    return {"fullname": name, "extra_info": info, "stats": {"median": 1.0, "min": 1.0}, "made": made}


def step_entry(model: str, nsc: float, loop: float, floor: float, **info) -> dict:
    times = {"nsc": nsc, "loop": loop, "floor": floor, "ratio": loop / nsc, "over_floor": nsc / floor}
    usual = dict(
        kind="step",
        model=model,
        dtype="bfloat16",
        seconds=times,
        cpu_seconds=times,
        mfu=0.5,
        split={"base": 1.0},
        split_of=1.0,
        peak_beyond_weights=25 * 10**8,
        cut="",
        launch="eager",
        tokens=5,
    )
    return entry(model, **usual | info)


def test_only_what_was_measured_is_shown_as_measured():
    nothing = [target.measured(Results([])) for target in step_targets.step_targets()]
    assert nothing == [""] * 8
    results = Results([step_entry("LLaMA-3-8B", 0.1, 0.5, 0.09), step_entry("LLaVA-1.5-7B", 0.2, 0.5, 0.19)])
    shown = [target.measured(results) for target in step_targets.step_targets()]
    assert shown[:4] == [
        "5.00x (100 ms against 500 ms)",
        "2.50x (200 ms against 500 ms)",
        "",
        "1.11x (100 ms against 90.0 ms)",
    ]
    assert shown[4:] == ["", "", "2.5 GB", ""]  # steps times their number is no measured merge
    cut = Results([step_entry("LLaMA-3-8B", 0.1, 0.5, 0.09, cut="2 of 32 blocks")])
    assert step_targets.step_targets()[0].measured(cut) == ""
    assert all(target.predicted(H200) for target in step_targets.step_targets())


def test_a_cpu_is_never_in_the_columns_of_a_gpu():
    cpu = [step_entry("SmolLM2-135M", 1.0, 2.0, 0.9), entry("r", kind="ranks", speedup=1.95, one=0.1, two=0.1026)]
    for one in cpu:
        one["made"] = one["made"] | {"device": "CPU H200 lookalike"}
    shown = table.cpu_targets_table({"cpu": cpu})
    assert "1.111x (1.00 s against 0.90 s)" in shown and "1.95x (100 ms alone, 103 ms together)" in shown
    assert table.targets_table({"cpu": cpu}) == table.targets_table({})
    assert table.cpu_targets_table({"gpu": [step_entry("SmolLM2-135M", 1.0, 2.0, 0.9)]}).count("x (") == 0
    whole = table.TABLES["step"]({"cpu": cpu})
    assert "| 1.00 s" in whole.replace("1000 ms", "1.00 s") and "base 100.0%" in whole


def test_one_process_alone_and_in_a_team_of_one():
    """What each of two processes runs, here without the other: twice the rows take it longer."""
    found = ranks.main(1, 2)
    assert found["tokens"] == 384 and found["speedup"] == 2 * found["one"] / found["two"] > 0
