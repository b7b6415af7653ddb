"""Ops against plain and compiled torch: ``pytest benchmarks/test_ops.py``. A provider that is wrong gets no number."""

import importlib

import pytest
import torch
from shapes import SHAPES, ratio_bytes, ratio_inputs

module = importlib.import_module("nsc_kernels.null_space_ratio")
CUDA = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
REFERENCES = {
    "forward": module.null_space_ratio_reference,
    "backward": module.null_space_ratio_backward_reference,
}
OPS = {"forward": torch.ops.nsc.null_space_ratio, "backward": torch.ops.nsc.null_space_ratio_backward}
PROVIDERS = {
    "torch": REFERENCES.get,
    "compiled": lambda step: torch.compile(REFERENCES[step], fullgraph=True),
    **({"triton": OPS.get} if CUDA else {}),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("step", REFERENCES)
@pytest.mark.parametrize("gram", [False, True], ids=["whitened", "gram"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_null_space_ratio(benchmark, shape, gram, step, provider):
    inputs = ratio_inputs(shape, DTYPE, DEVICE, gram=gram)
    if step == "backward":
        _, *saved = REFERENCES["forward"](*inputs)
        inputs = (torch.ones((), device=DEVICE), *inputs, *saved)
    function = PROVIDERS[provider](step)
    exact = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    for got, want in zip(function(*inputs), REFERENCES[step](*exact), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=1e-4 * want.abs().max().item())

    def timed():
        function(*inputs)
        if CUDA:
            torch.cuda.synchronize()

    benchmark.group = f"null_space_ratio {step} {'gram' if gram else 'whitened'} {shape.name}"
    benchmark.extra_info |= {"bytes": ratio_bytes(shape, DTYPE)[step], "provider": provider, "device": DEVICE}
    benchmark(timed)
