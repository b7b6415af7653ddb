"""The benchmarks' own logic: what they count, how they time, what they refuse, and the tables made of it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import cases  # noqa: E402
import correct  # noqa: E402
import doors  # noqa: E402
import layers  # noqa: E402
import predict  # noqa: E402
import record  # noqa: E402
import shapes  # noqa: E402
import step_targets  # noqa: E402
import table  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402

SHAPE = shapes.Shape("odd", "17 rows", 17, 48, 40, (4, 4, 4))
BF16 = torch.bfloat16


def tensors(tree) -> list[torch.Tensor]:
    found = [tree] if isinstance(tree, torch.Tensor) else tree
    return [x for x in found if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("work", [w for w in cases.PASSES if w.step != cases.BOTH], ids=str)
def test_bytes_are_those_of_the_tensors(work):
    """Inputs and outputs once each, but for columns of u outside the own segment, a Gram, offsets, and scalars."""
    inputs = work.inputs(SHAPE, BF16, "cpu")
    moved = sum(x.numel() * x.element_size() for x in [*tensors(inputs), *tensors(work.reference(*inputs))])
    unread = 0
    if "ratio" in work.op:
        unread = SHAPE.n * (SHAPE.r - SHAPE.own) * 2 + 8 * 4 + 4 + (4 * SHAPE.r**2 if work.variant else 0)
    assert work.moved(SHAPE, 2) == moved - unread


@pytest.mark.parametrize(
    "work", [w for w in cases.PASSES if w.op.startswith("lora") and w.op != cases.MOMENTS], ids=str
)
def test_flops_are_those_of_the_product(work):
    shape = replace(SHAPE, n=256, d=128, m=192, ranks=(16,) * 3)
    with FlopCounterMode(display=False) as counter:
        work.reference(*work.inputs(shape, BF16, "meta"))
    assert counter.get_total_flops() <= work.flops(shape) <= 1.03 * counter.get_total_flops()


def test_flops_of_moments_are_those_of_a_symmetric_product():
    """Half of a product of u with itself, which the reference makes in full for each task; and the energy."""
    shape, work = replace(SHAPE, ranks=(12,)), predict.find(cases.MOMENTS, "forward")
    with FlopCounterMode(display=False) as counter:
        work.reference(*work.inputs(shape, BF16, "meta"))
    n, d, r = shape.n, shape.d, shape.r
    assert work.flops(shape) == counter.get_total_flops() - n * r * (r - 1) + 2 * n * d


def test_both_passes_are_the_sum_of_each():
    forward, backward, both = (predict.find("null_space_ratio", s) for s in ("forward", "backward", cases.BOTH))
    assert both.moved(SHAPE, 2) == forward.moved(SHAPE, 2) + backward.moved(SHAPE, 2)
    assert predict.of_pass(both, SHAPE) == predict.of_pass(forward, SHAPE) + predict.of_pass(backward, SHAPE)


@pytest.mark.parametrize("work", cases.PASSES, ids=str)
def test_every_provider_agrees_with_float64(work):
    inputs = work.inputs(SHAPE, torch.float32, "cpu")
    want = tensors(work.reference(*correct.exact(inputs)))
    for name, function in cases.providers(work, SHAPE).items():
        got = correct.results(function, inputs)
        kept = {"linear": want[:1], "linear + norm": [want[0], want[-1].sqrt()]}.get(name, want)
        assert correct.error(got, kept) < 1e-5, name


@pytest.mark.parametrize("name", layers.PROVIDERS)
def test_layers_agree_and_are_counted(name):
    layer = layers.Layer(SHAPE, torch.float32, "cpu")
    z, dy = torch.randn(17, 48), torch.randn(17, 40)
    step = layers.PROVIDERS[name](layer)
    if name != "bare":
        assert correct.error(step(z, dy), layers.exact_layer(layer, z, dy)) < 1e-4
    least = {"bare": 0, "merged": predict.saved_by_merged(SHAPE), "peft": predict.saved_by_peft(SHAPE)}[name]
    assert least <= step.saved_bytes(z, dy) <= 2 * least + 64  # the least is counted for bfloat16


def test_error_sees_one_wrong_row_and_nan():
    want = [torch.randn(1000, 8).double(), torch.randn(50).double()]
    assert correct.error([x.float() for x in want], want) < 1e-6
    wrong = want[0].clone()
    wrong[7] *= 1.5
    assert correct.error([wrong, want[1]], want) > 0.1
    for position in (0, 1):
        spoilt = [x.clone() for x in want]
        spoilt[position].view(-1)[3] = torch.nan
        assert not correct.error(spoilt, want) <= 1
    with pytest.raises(ValueError, match="shapes"):
        correct.error(want[:1], want)


def test_counting_kernels_of_eager_torch():
    x = torch.empty(64, 32, dtype=BF16, device="meta")
    assert predict.counted(lambda: x.T.reshape(32, 64)[:3]) == []  # views move nothing
    assert predict.counted(lambda: x.float() * 2) == [(64 * 32 * 6, 0), (64 * 32 * 8, 0)]
    assert predict.counted(lambda: x @ x.T) == [(64 * 32 * 2 * 2 + 64 * 64 * 2, 2 * 64 * 32 * 64)]


class FakeDevice:
    """What the clock calls of ``torch.cuda``: a device on which everything takes 5 ms, after waiting for the host."""

    def __init__(self, *, waits: bool = True, seconds: float = 5e-3) -> None:
        self.waits, self.seconds, self.log = waits, seconds, []

    def Event(self, enable_timing):
        event = SimpleNamespace(record=lambda: self.log.append("event"), query=lambda: not self.waits)
        event.elapsed_time = lambda other: self.seconds * 1e3
        return event

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        self.log.append("sleep")


@pytest.fixture
def device(monkeypatch):
    def install(**settings) -> FakeDevice:
        fake = FakeDevice(**settings)
        monkeypatch.setattr(timing, "CUDA", True)
        for name in ("Event", "synchronize", "_sleep"):
            monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
        return fake

    return install


def test_clock_counts_device_time_behind_a_wait(device):
    fake, clock = device(), timing.Clock()
    for _ in range(3):
        clock.device(lambda: (fake.log.append("kernel"), time.sleep(6e-3)))
    assert clock() == pytest.approx(15e-3)
    assert fake.log == ["synchronize", "sleep", "event", "kernel", "event", "synchronize"] * 3
    assert clock.behind == 0
    assert 12e-3 <= clock.lead <= timing.MAX_LEAD


def test_clock_says_when_the_host_was_late_and_refuses_the_impossible(device):
    device(waits=False)
    clock = timing.Clock()
    clock.device(time.sleep, 6e-3)
    assert clock.behind == 1
    device(seconds=60)
    with pytest.raises(RuntimeError, match="on the wall"):
        clock.device(time.sleep, 1e-3)
    assert clock() == pytest.approx(5e-3)


def test_clock_of_graphs_hosts_and_walls(device):
    clock = timing.Clock()
    clock.wall(time.sleep, 2e-3)
    assert 2e-3 <= clock() < 1
    before = clock()
    clock.host(4, time.sleep, 1e-3)
    assert 1e-3 <= clock() - before < 0.25
    device()
    before = clock()
    clock.graph(lambda: time.sleep(6e-3), 10)
    assert clock() - before == pytest.approx(5e-4)


def test_input_sets_exceed_the_cache():
    assert timing.input_sets(100 * timing.CACHE_BYTES) == 2
    assert timing.input_sets(timing.CACHE_BYTES // 2) == 6
    assert timing.input_sets(1) == timing.MAX_SETS


@pytest.mark.parametrize("op", doors.OPS)
def test_doors_prepare_launches(op):
    """Without kernels every op still makes its launches, forward and backward, and they can be run again alone."""
    for gradient in (False, True):
        with doors.without_kernels():
            for name in ("public", "op"):
                found = doors.launches_of(doors.call(doors.doors(op)[name], doors.arguments(op, gradient)))
                assert len(found) >= 1 + gradient
                doors.run_all(found)


def test_entries_of_earlier_runs_stay(tmp_path):
    def entry(name: str, median: float) -> dict:
        stats = SimpleNamespace(**dict.fromkeys(record.STATS, median))
        info = {"bytes": 4e9, "flops": 1e12, "copy_gb_per_s": 8.0}
        return record.entry(name, "group", info, stats, {"commit": "c"})

    file = tmp_path / "deep" / "gpu.json"
    record.keep([entry("b", 1.0), entry("a", 1.0)], file)
    record.keep([entry("a", 2.0)], file)
    kept = json.loads(file.read_text())["benchmarks"]
    assert [(e["fullname"], e["stats"]["median"]) for e in kept] == [("a", 2.0), ("b", 1.0)]
    assert kept[0]["extra_info"]["gb_per_s"] == 2.0
    assert kept[0]["extra_info"]["fraction_of_copy"] == 0.25
    assert kept[0]["extra_info"]["tflop_per_s"] == 0.5
    assert list(file.parent.iterdir()) == [file]


def run_benchmarks(folder: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks", "--benchmark-only"]
    command += ["-k", "test_overhead and lora_fold and forward-op", "--results", str(folder), *options]
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), str(folder)])
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}  # a worker times nothing
    environment = {**own, "PYTHONPATH": path}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_bare_run_writes_its_numbers(tmp_path):
    done = run_benchmarks(tmp_path)
    assert done.returncode == 0, done.stdout
    (file,) = tmp_path.glob("*.json")
    (entry,) = json.loads(file.read_text())["benchmarks"]
    assert entry["stats"]["median"] > 0 and "data" not in entry["stats"]
    assert {"commit", "date", "device", "threads", "torch", "triton"} <= set(entry["made"])


def test_a_test_that_fails_leaves_no_number(tmp_path):
    (tmp_path / "spoil.py").write_text("import timing\ntiming.Clock.host = None\n")
    done = run_benchmarks(tmp_path, "-p", "spoil")
    assert "'NoneType' object is not callable" in done.stdout
    assert done.returncode == 1
    assert not list(tmp_path.glob("*.json"))


def measured_on(device: str) -> dict:
    """An entry of each kind, as if this device had run them."""
    made = {"device": device, "threads": 1, "commit": "abc", "date": "2026-01-01", "torch": "2", "triton": "3"}
    ratio = {"kind": "op", "op": "null_space_ratio", "variant": "", "shape": shapes.TARGET.name, "dtype": "bfloat16"}
    ratio |= {"gb_per_s": 2850.0, "fraction_of_copy": 0.95, "copy_gb_per_s": 3000.0}
    layer = {"kind": "layer", "shape": shapes.PREFILL.name, "m": 4096, "d": 4096, "ranks": "6 x 16"}
    overhead = {"kind": "overhead", "op": "lora_up", "step": "forward"}
    infos = [
        *({**ratio, "step": step, "provider": "triton"} for step in ("forward", "backward", "forward + backward")),
        {**ratio, "step": "forward + backward", "provider": "usual"},
        *({**layer, "provider": name, "saved_bytes": 10**6 * k} for k, name in enumerate(("bare", "merged", "peft"))),
        {**overhead, "way": "public"},
        {**overhead, "way": "launch"},
        {"kind": "gram"},
        {},
    ]
    seconds = [1e-4, 2e-4, 3e-4, 18e-4, 3.5e-4, 4e-4, 1e-3, 30e-6, 20e-6, 7e-3, 1.0]
    return {
        "some-file": [
            {"fullname": str(k), "extra_info": info, "stats": {"median": median, "min": median}, "made": made}
            for k, (info, median) in enumerate(zip(infos, seconds, strict=True))
        ]
    }


def test_targets_show_what_was_measured_and_only_on_gpus():
    shown = table.targets_table(measured_on("NVIDIA H200"))
    for figure in ("0.95 (100 µs)", "6.00x (300 µs against 1.80 ms)", "1.14x (400 µs against 350 µs)", "7.00 ms"):
        assert figure in shown
    assert "10.0 µs (`lora_up`)" in shown and "0.500 (1.0 MB against 2 MB)" in shown
    of_h100 = [line.split(" | ")[3] for line in shown.splitlines() if line.startswith("| `null")]
    assert all(cell.strip() == "" for cell in of_h100)
    assert "NVIDIA H200" in shown
    assert table.targets_table(measured_on("CPU H200 lookalike")) == table.targets_table({})
    assert "H100" not in table.targets_table(measured_on("NVIDIA H200"), every=False)


def test_tables_of_every_device_name_it():
    devices = measured_on("NVIDIA H200")
    for name in ("ops", "layer", "overhead"):
        shown = table.TABLES[name](devices)
        assert shown.count("**NVIDIA H200**") == 1


def test_sections_are_filled_once_and_nothing_else_is_touched():
    text = "before\n<!-- table:layer -->\nold\n<!-- /table -->\nafter"
    filled = table.filled(text, measured_on("NVIDIA H200"))
    assert filled.startswith("before\n<!-- table:layer -->\n") and filled.endswith("\n<!-- /table -->\nafter")
    assert "old" not in filled and "merged" in filled
    assert table.filled(filled, measured_on("NVIDIA H200")) == filled
    with pytest.raises(KeyError):
        table.filled("<!-- table:none -->\n<!-- /table -->", {})


@pytest.mark.parametrize("name", table.DOCUMENTS)
def test_documents_hold_the_tables_of_the_results(name):
    """``make tables`` has been run since the numbers changed."""
    text = (ROOT / name).read_text()
    assert "<!-- table:targets" in text
    assert table.filled(text, table.load()) == text


def test_targets_fit_the_shapes():
    assert shapes.TARGET.n * shapes.TARGET.d * BF16.itemsize >= 256e6
    assert (shapes.PREFILL.n, shapes.PREFILL.d, shapes.PREFILL.m, len(shapes.PREFILL.ranks)) == (4096, 4096, 4096, 6)
    assert len(targets.targets()) == 11 and len(step_targets.step_targets()) == 8
    names = [shape.name for shape in shapes.GPU_SHAPES]
    assert len(set(names)) == len(names)
