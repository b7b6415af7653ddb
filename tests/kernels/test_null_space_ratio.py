"""Both ratio ops: every case of the table against the float64 oracle, compiled, and as kernels.

With ``TRITON_INTERPRET=1`` the same tests run the Triton kernels on the CPU; where there is a GPU, on it.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch

from nsc_kernels._launch import RowBlocks
from nsc_kernels._op import INTERPRET, Launch
from nsc_kernels.null_space_ratio import null_space_ratio
from tests.ops import (
    BF16,
    CASES,
    DEGENERATE,
    DEVICES,
    F32,
    F64,
    RATIOS,
    SMALL,
    Case,
    gram_inverses,
    make,
    max_abs,
    oracle,
    torch_own,
)

devices = pytest.mark.parametrize("device", DEVICES)
no_triton = pytest.param("cpu", marks=pytest.mark.skip("Triton runs on a GPU or interpreted"))
triton_devices = pytest.mark.parametrize("device", (DEVICES if INTERPRET else DEVICES[1:]) or [no_triton])


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched so far, by name."""
    names, run = [], Launch.run

    def spy(self):
        if 0 not in self.grid:
            names.append(self.kernel.__name__)
        run(self)

    monkeypatch.setattr(Launch, "run", spy)
    return names


def kernel(ratio, step=""):
    """The name of the kernel behind a ratio."""
    return f"{next(name for name, op in RATIOS.items() if op is ratio)}{step}_kernel"


def flat_inputs(name, inputs):
    """The arguments of a registered operator: rows, or their energies."""
    wide = inputs.z.to(torch.promote_types(inputs.z.dtype, F32))
    rows = inputs.z if name == "null_space_ratio" else wide.square().sum(-1)
    return (rows, *inputs.flat[1:])


def wanted(name):
    """Which gradients a registered backward is asked for: ``null_space_ratio`` may leave out either."""
    return (True, True) if name == "null_space_ratio" else ()


def row_sum(case, values, inputs):
    """What a call returns for these ratios: themselves, or their weighted sum."""
    return (inputs.weight.to(values.dtype) @ values) if case.weighted else values


def samples(case, inputs):
    """Rows enough to tell what error is usual in this dtype, and the adapter of each."""
    z = torch.cat([inputs.z, make(Case(64, case.d, case.ranks, case.dtype), inputs.z.device.type, seed=1).z])
    rows = torch.arange(len(z), device=z.device) % len(case.ranks)
    return z, rows


@devices
@pytest.mark.parametrize("case", CASES + DEGENERATE, ids=str)
def test_forward(ratio, case, device, launched):
    inputs = make(case, device)
    got = ratio(inputs.z, inputs.u, **inputs.kwargs)
    assert got.dtype == (F64 if case.dtype == F64 else F32)
    assert got.shape == (() if case.weighted else (case.n,))
    assert [name for name in launched if "ratio" in name] == [kernel(ratio)] * case.launches(device)
    want = oracle(inputs.z.double(), inputs.down, inputs.rows, inputs.spans)
    z, rows = samples(case, inputs)
    gram = gram_inverses(inputs.down, inputs.spans)
    own = torch_own(z, inputs.down, gram, rows, inputs.spans).double()
    exact = oracle(z.double(), inputs.down, rows, inputs.spans)
    if case in DEGENERATE:  # the square root at 0 is steep in any arithmetic, its argument is not
        got, want, own, exact = got.square(), want.square(), own.square(), exact.square()
    tolerance = 2 * max_abs(own - exact) + 1e-6
    weights = inputs.weight.sum().item() if case.weighted else 1.0
    assert max_abs(got - row_sum(case, want, inputs)) <= tolerance * weights


@devices
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients(ratio, case, device, launched):
    """The direct gradient to z plus that to u carried through u = z A^T, against autograd of the projection."""
    inputs = make(case, device)
    z, u = inputs.z.clone().requires_grad_(), inputs.u.clone().requires_grad_()
    row_grad = torch.linspace(0.5, 1.5, case.n, dtype=F64, device=device)
    value = ratio(z, u, **inputs.kwargs)
    value.backward(torch.ones_like(value) if case.weighted else row_grad.to(value.dtype))
    assert (z.grad.dtype, u.grad.dtype) == (case.dtype, case.dtype)
    backward = [name for name in launched if "ratio" in name][1:]
    assert backward == [kernel(ratio, "_backward")] * case.launches(device)
    weight = inputs.weight.double() if case.weighted else row_grad
    got = z.grad.double() + u.grad.double() @ inputs.down

    def dense(function, dtype, z, rows, weight, *args):
        leaf = z.to(dtype, copy=True).requires_grad_()
        (function(leaf, *args, rows, inputs.spans) * weight.to(dtype)).sum().backward()
        return leaf.grad.double()

    want = dense(oracle, F64, inputs.z, inputs.rows, weight, inputs.down)
    wide, rows = samples(case, inputs)
    ones = torch.full((len(wide),), max(max_abs(weight), 1.0), dtype=F64, device=device)
    own = dense(torch_own, case.dtype, wide, rows, ones, inputs.down, gram_inverses(inputs.down, inputs.spans))
    tolerance = 2 * max_abs(own - dense(oracle, F64, wide, rows, ones, inputs.down)) + 1e-6
    assert max_abs(got - want) <= tolerance
    outside = torch.ones_like(u, dtype=torch.bool)
    for row, k in enumerate(inputs.rows.tolist()):
        outside[row, slice(*inputs.spans[k])] = False
    assert not u.grad[outside].any()
    assert not z.grad[weight == 0].any() and not u.grad[weight == 0].any()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(ratio, case):
    inputs = make(case)
    leaves = [inputs.z, inputs.u]
    if case.gram:
        leaves.append(inputs.gram_inverse)
    if case.weighted:
        leaves.append(inputs.weight + 0.1)  # at 0 a row is left out, and the weight's gradient with it
    leaves = [x.clone().requires_grad_() for x in leaves]

    def function(z, u, *rest):
        rest = iter(rest)
        changed = {name: next(rest) for name in ("gram_inverse", "weight") if inputs.kwargs[name] is not None}
        if "gram_inverse" in changed:  # the op takes G as it is: symmetric, nothing outside the blocks
            inside = inputs.gram_inverse != 0
            changed["gram_inverse"] = torch.where(inside, (changed["gram_inverse"] + changed["gram_inverse"].T) / 2, 0)
        return ratio(z, u, **{**inputs.kwargs, **changed})

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("routed", [False, True])
def test_gradient_to_down_projection(routed):
    """With u = z A^T and G = (A A^T)^-1 of a trained A: dL/dA = -sum (g/(om s)) h (z - A^T h)^T, without any (d, d)."""
    inputs = make(Case(17, 40, (3, 5, 2) if routed else (10,), F64))
    g = torch.linspace(-1, 2, 17, dtype=F64)
    down = inputs.down.clone().requires_grad_()
    gram = torch.block_diag(*[torch.linalg.inv(down[i:j] @ down[i:j].T) for i, j in inputs.spans])
    kwargs = {**inputs.kwargs, "gram_inverse": gram}
    (g * null_space_ratio(inputs.z, inputs.z @ down.T, **kwargs)).sum().backward()

    dense = inputs.down.clone().requires_grad_()
    projections = [dense[i:j].T @ torch.linalg.inv(dense[i:j] @ dense[i:j].T) @ dense[i:j] for i, j in inputs.spans]
    left = inputs.z - (torch.stack(projections)[inputs.rows] @ inputs.z[..., None])[..., 0]
    (g * left.norm(dim=1) / inputs.z.norm(dim=1)).sum().backward()
    assert torch.allclose(down.grad, dense.grad, rtol=1e-10, atol=1e-12)

    closed = torch.zeros_like(inputs.down)
    for z, k, slope in zip(inputs.z, inputs.rows.tolist(), g, strict=True):
        i, j = inputs.spans[k]
        a = inputs.down[i:j]
        h = torch.linalg.solve(a @ a.T, a @ z)
        om = (z - a.T @ h).norm() / z.norm()
        closed[i:j] -= slope / (om * z @ z) * torch.outer(h, z - a.T @ h)
    assert torch.allclose(down.grad, closed, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("case", [Case(5, 9, (2, 0, 3), weighted=True), Case(5, 9, (3,), BF16, gram=False)], ids=str)
def test_opcheck(name, case):
    forward, backward = (getattr(torch.ops.nsc, name + step).default for step in ("", "_backward"))
    flat = flat_inputs(name, make(case))
    leaves = [x.clone().requires_grad_() if x is not None and x.is_floating_point() else x for x in flat]
    torch.library.opcheck(forward, tuple(leaves))
    value, *saved = forward(*flat)
    torch.library.opcheck(backward, (value, *flat, *saved, *wanted(name)))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(ratio, backend):
    """One dynamic graph, backward included, equal to eager for every number of rows."""

    def loss(z, down, **kwargs):
        return ratio(z, z @ down.T, **kwargs)

    compiled = torch.compile(loss, backend=backend, fullgraph=True, dynamic=True)
    for n in (17, 33):
        inputs = make(Case(n, 64, (3, 0, 5), weighted=True))
        grads = []
        for function in (loss, compiled):
            z, weight = inputs.z.clone().requires_grad_(), inputs.weight.clone().requires_grad_()
            value = function(z, inputs.down.float(), **{**inputs.kwargs, "weight": weight})
            grads.append([value.detach(), *torch.autograd.grad(value, (z, weight))])
        torch.testing.assert_close(grads[0], grads[1])


@devices
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_autocast_changes_nothing(device, dtype):
    inputs = make(Case(17, 64, (3, 5), F32, weighted=True), device)
    results = []
    for enabled in (False, True):
        leaves = [x.clone().requires_grad_() for x in (inputs.z, inputs.u, inputs.gram_inverse)]
        with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
            kwargs = {**inputs.kwargs, "gram_inverse": leaves[2]}
            value = null_space_ratio(leaves[0].to(dtype), leaves[1].to(dtype), **kwargs)
            results.append([value, *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@triton_devices
@pytest.mark.parametrize("name", RATIOS)
@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != F64], ids=str)
def test_kernels_equal_reference(name, case, device, monkeypatch, launched):
    """With tails in rows, width and rank, and every output in memory that held NaN: all of it is written."""
    module = importlib.import_module(f"nsc_kernels.{name}")
    flat, empty = flat_inputs(name, make(case, device)), torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "row_blocks", lambda *_: RowBlocks(8, 64, 16, 4))
    got = getattr(torch.ops.nsc, name)(*flat)
    want = getattr(module, f"{name}_reference")(*flat)
    grad = torch.linspace(0.5, 1.5, case.n, device=device).sum() if case.weighted else torch.ones_like(want[0])
    given = (grad, *flat, *want[1:], *wanted(name))
    got += tuple(getattr(torch.ops.nsc, f"{name}_backward")(*given))
    again = (*getattr(torch.ops.nsc, name)(*flat), *getattr(torch.ops.nsc, f"{name}_backward")(*given))
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    want += getattr(module, f"{name}_backward_reference")(*given)
    assert len(launched) == 4 * case.launches(device)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if case.dtype == F32 else {}
    torch.testing.assert_close(got, want, **tolerance)


def test_only_the_wanted_gradients_are_made():
    """A frozen side costs nothing: its gradient is neither computed nor returned."""
    inputs = make(Case(5, 9, (3,)))
    value, *saved = torch.ops.nsc.null_space_ratio(*inputs.flat)
    both = torch.ops.nsc.null_space_ratio_backward(value, *inputs.flat, *saved, True, True)
    for to_z, to_u in ((True, False), (False, True)):
        made = torch.ops.nsc.null_space_ratio_backward(value, *inputs.flat, *saved, to_z, to_u)
        for got, want, asked in zip(made, both, (to_z, to_u), strict=True):
            assert torch.equal(got, want) if asked else got.numel() == 0


@pytest.mark.skipif(INTERPRET, reason="this is the run that it starts")
def test_kernels_in_the_interpreter():
    """The tests that count launches, and the edges, once more on the very Triton kernels."""
    pytest.importorskip("triton")
    chosen = "((forward or gradients) and n17) or reference or squares or leak or alone or zero_rows or held"
    files = [__file__, __file__.replace("_ratio", "_laws")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
