"""Traces written by hand, and where their time must go."""

import pytest

from nsc.performance.trace import PARTS, split


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, correlation: int | None = None) -> dict:
    return dict(ph="X", pid=1, tid=tid, cat=cat, name=name, ts=ts, dur=dur, args={"correlation": correlation})


HOST = [
    event("cpu_op", "aten::linear", 0, 10),
    event("cpu_op", "aten::addmm", 1, 8),  # inside it: counted once
    event("user_annotation", "nsc::lora_down", 20, 20),
    event("cpu_op", "aten::mm", 21, 5),
    event("user_annotation", "something else", 27, 10),
    event("cpu_op", "aten::mul", 30, 3),
    event("cpu_op", "nsc::ratio_from_energy_backward", 50, 7),  # by the registered door
    event("cpu_op", "aten::sum", 51, 2),
    event("cpu_op", "autograd::engine::evaluate_function: MmBackward0", 60, 20, tid=2),
    event("cpu_op", "aten::mm", 62, 9, tid=2),
    event("user_annotation", "Optimizer.step#AdamW.step", 90, 10),
    event("cpu_op", "aten::addcmul_", 91, 1),
    {"ph": "i", "name": "a mark", "ts": 3},
]


def test_a_trace_of_the_host_is_split_by_its_ranges():
    expected = {"base": 19e-6, "lora": 8e-6, "ratio": 7e-6, "optimizer": 1e-6}
    assert split(HOST) == pytest.approx(expected)
    assert split(reversed(HOST)) == pytest.approx(expected)


def test_a_trace_of_a_gpu_counts_kernels_where_they_were_launched():
    launches = [  # a kernel runs long after its launch, on a line of its own
        (2, 1, "base", 100.0),
        (22, 1, "lora", 40.0),
        (31, 1, "lora", 2.0),
        (52, 1, "ratio", 5.0),
        (63, 2, "base", 70.0),
        (92, 1, "optimizer", 3.0),
    ]
    events = list(HOST)
    for number, (ts, tid, _, dur) in enumerate(launches):
        cat = "cuda_driver" if number % 2 else "cuda_runtime"
        events.append(event(cat, "cuLaunchKernel", ts, 0.5, tid, correlation=number))
        events.append(event("kernel", "gemm", 1000 + 200 * number, dur, tid=7, correlation=number))
    events.append(event("cuda_runtime", "cudaDeviceSynchronize", 95, 4000, correlation=99))
    expected = {part: sum(d for *_, p, d in launches if p == part) / 1e6 for part in PARTS}
    assert split(events) == pytest.approx(expected)
