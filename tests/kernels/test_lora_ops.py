"""``lora_down``, ``lora_up`` and ``lora_fold``: one table of cases against float64, compiled, and as kernels.

With ``TRITON_INTERPRET=1`` the same tests run the Triton kernels on the CPU; where there is a GPU, on it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from nsc_kernels import _skinny, lora_down, lora_fold, lora_fork, lora_up
from nsc_kernels._launch import ExpandBlocks, ShrinkBlocks
from nsc_kernels._op import INTERPRET, Launch
from tests.ops import BF16, DEVICES, F16, F32, F64, max_abs, strided

devices = pytest.mark.parametrize("device", DEVICES)
no_triton = pytest.param("cpu", marks=pytest.mark.skip("Triton runs on a GPU or interpreted"))
triton_devices = pytest.mark.parametrize("device", (DEVICES if INTERPRET else DEVICES[1:]) or [no_triton])


@dataclass(frozen=True)
class Case:
    """``n`` rows of width ``d``, ``m`` outputs, ``r`` columns of u."""

    n: int
    d: int
    m: int
    r: int
    dtype: torch.dtype = F32
    strided: bool = False

    def __str__(self) -> str:
        parts = [f"n{self.n}", f"d{self.d}", f"m{self.m}", f"r{self.r}", str(self.dtype).removeprefix("torch.")]
        return "-".join(parts + ["strided"] * self.strided)


CASES = [
    Case(1, 64, 64, 3),
    Case(3, 7, 5, 1, F64),
    Case(17, 129, 70, 16, strided=True),
    Case(17, 129, 70, 16, BF16),
    Case(17, 600, 33, 33, F16, strided=True),  # d in two parts
    Case(5, 1100, 40, 96, BF16),
    Case(5, 1100, 40, 20),
    Case(130, 64, 48, 35, BF16, strided=True),
    Case(3, 40, 24, 530, BF16),
    Case(3, 40, 24, 260),
    Case(4, 64, 32, 0),
    Case(0, 64, 32, 3, BF16),
]
TAILS = [
    Case(17, 70, 33, 20, strided=True),
    Case(5, 129, 40, 35, BF16),
    Case(18, 50, 17, 16, F16, strided=True),
    Case(3, 40, 24, 0, BF16),
]
SMALL = [Case(3, 7, 5, 4, F64), Case(1, 5, 3, 1, F64), Case(3, 4, 2, 0, F64)]


def down(z, A):
    u, energy = lora_down(z, A)
    return torch.cat([u.to(energy.dtype), energy[:, None]], 1)


def plain_down(z, A):
    u = z @ A.T
    wide = torch.promote_types(z.dtype, F32)
    return torch.cat([u.to(wide), z.to(wide).square().sum(-1, keepdim=True)], 1)


def fork(z, A, W):
    """The layer's own use: the base reads what the fork hands on."""
    handed, u, energy = lora_fork(z, A)
    return torch.cat([(handed @ W).to(energy.dtype), u.to(energy.dtype), energy[:, None]], 1)


def plain_fork(z, A, W):
    return torch.cat([(z @ W).to(torch.promote_types(z.dtype, F32)), plain_down(z, A)], 1)


def plain_up(y, u, c, B):
    return y + (u * c).to(u.dtype) @ B.T


def plain_fold(W, B, c, A):
    return W + (B * c).to(B.dtype) @ A


class Op(NamedTuple):
    """What is tested, the same in plain torch, the sizes of its arguments, and the kernels of its two passes."""

    call: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: tuple[str, ...]
    forward: str
    backward: str


OPS = {
    "lora_down": Op(down, plain_down, ("nd", "rd"), "shrink_kernel", "expand_kernel"),
    "lora_fork": Op(fork, plain_fork, ("nd", "rd", "dm"), "shrink_kernel", "expand_kernel"),
    "lora_up": Op(lora_up, plain_up, ("nm", "nr", "r", "mr"), "expand_kernel", "shrink_kernel"),
    "lora_fold": Op(lora_fold, plain_fold, ("md", "mr", "r", "rd"), "expand_kernel", "shrink_kernel"),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))


def make(op: Op, case: Case, device: str = "cpu", seed: int = 0) -> list[Tensor]:
    """Random arguments; the weights of columns, of one dimension, are in float32 at least."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for shape in op.shapes:
        size = [getattr(case, axis) for axis in shape]
        x = torch.randn(size, generator=generator, dtype=F64) / max(size[-1], 1) ** 0.5
        x = x.to(case.dtype if len(size) > 1 else torch.promote_types(case.dtype, F32))
        made.append((strided(x) if case.strided and len(size) > 1 else x).to(device))
    return made


def run(function: Callable[..., Tensor], args: list[Tensor], dtype: torch.dtype = F32) -> list[Tensor]:
    """The value and the gradients of all arguments, for a fixed incoming gradient that ``dtype`` can hold."""
    leaves = [x.detach().requires_grad_() for x in args]
    value = function(*leaves)
    incoming = torch.linspace(-1, 1, value.numel(), dtype=F64, device=value.device).view(value.shape)
    gradients = torch.autograd.grad(value, leaves, incoming.to(dtype).to(value.dtype), materialize_grads=True)
    return [value.detach(), *gradients]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched so far, by name."""
    names, launch = [], Launch.run

    def spy(self):
        names.append(self.kernel.__name__)
        launch(self)

    monkeypatch.setattr(Launch, "run", spy)
    return names


@devices
@every_op
@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradients(op, case, device, launched):
    """Each within twice torch's own error in the same dtype."""
    args = make(op, case, device)
    got = run(op.call, args, case.dtype)
    want = run(op.plain, [x.double() for x in args], case.dtype)
    own = run(op.plain, args, case.dtype)
    assert [x.shape for x in got] == [x.shape for x in want]
    assert [x.dtype for x in got[1:]] == [x.dtype for x in args]
    for mine, exact, torchs in zip(got, want, own, strict=True):
        tolerance = 2 * max_abs(torchs - exact) + 1e-6 * max(1.0, max_abs(exact))
        assert max_abs(mine - exact) <= tolerance
    if INTERPRET and case.dtype != F64:
        assert {op.forward, op.backward} <= set(launched)
    elif device == "cpu":
        assert not launched


@pytest.mark.parametrize("case", SMALL, ids=str)
@every_op
def test_gradcheck(op, case):
    assert torch.autograd.gradcheck(op.call, [x.requires_grad_() for x in make(op, case)])


@pytest.mark.parametrize("case", [Case(5, 9, 6, 4), Case(5, 9, 6, 4, BF16, strided=True)], ids=str)
@pytest.mark.parametrize("name", ["lora_down", "lora_up", "lora_fold"])
def test_opcheck(name, case):
    args = [x.requires_grad_() for x in make(OPS[name], case)]
    extra = (True,) if name == "lora_down" else ()
    torch.library.opcheck(getattr(torch.ops.nsc, name).default, (*args, *extra))
    z, A, y, u, c, B, W = (
        x.detach() for x in [*args[:2], *make(OPS["lora_up"], case), make(OPS["lora_fold"], case)[0]]
    )
    given = {
        "lora_down": (z, u, torch.rand(5), z, A),
        "lora_up": (y, u, c, B, True),
        "lora_fold": (W, B, c, z[:4], True),
    }
    torch.library.opcheck(getattr(torch.ops.nsc, f"{name}_backward").default, given[name])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@every_op
def test_compile_fullgraph(op, backend):
    """One dynamic graph, backward included, equal to eager for every number of rows."""
    compiled = torch.compile(op.call, backend=backend, fullgraph=True, dynamic=True)
    for n in (17, 33):
        args = make(op, Case(n, 12, 10, 6))
        torch.testing.assert_close(run(compiled, args), run(op.call, args))


@devices
@every_op
def test_autocast_does_as_linear_does(op, device):
    args = make(op, Case(9, 32, 24, 5), device)
    with torch.autocast(device, dtype=BF16):
        got, own = op.call(*args), op.plain(*args)
    exact = op.plain(*[x.double() for x in args])
    if op.call is lora_fold:  # weights are folded in their own dtype
        torch.testing.assert_close(got, exact.float())
    else:
        assert got.dtype in (BF16, F32) and max_abs(got - exact) <= 3 * max_abs(own - exact) + 1e-6


@triton_devices
@every_op
@pytest.mark.parametrize("case", TAILS, ids=str)
def test_kernels_in_small_tiles(op, case, device, monkeypatch):
    """With tails everywhere, d in parts, and outputs in memory that held NaN: all is written, the same at every run."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    def small_shrink(n, d, r, itemsize):
        span = 16 * -(-d // 48)
        return ShrinkBlocks(16, 16, 16, 4, 2), -(-d // span), span

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(_skinny, "shrink_blocks", small_shrink)
    monkeypatch.setattr(_skinny, "expand_blocks", lambda *_: ExpandBlocks(16, 16, 16, 4, 2))
    args = make(op, case, device)
    first, again = run(op.call, args, case.dtype), run(op.call, args, case.dtype)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    want, own = run(op.plain, [x.double() for x in args], case.dtype), run(op.plain, args, case.dtype)
    for mine, exact, torchs in zip(first, want, own, strict=True):
        assert max_abs(mine - exact) <= 2 * max_abs(torchs - exact) + 1e-6 * max(1.0, max_abs(exact))


def test_fork_adds_in_one_pass_and_keeps_z_only_for_the_energy():
    """Without the energy nothing as wide as z is saved; a gradient that comes by one way alone is that of the way."""
    z, A, W = make(OPS["lora_fork"], Case(5, 12, 7, 3))
    for energy, kept in ((True, [z.shape, A.shape]), (False, [A.shape])):
        handed, _, row_energy = lora_fork(z.clone().requires_grad_(), A, energy=energy)
        saved = [x.shape for x in handed.grad_fn.saved_tensors if x is not None]
        assert sorted(saved) == sorted(kept) and (row_energy is None) != energy
    leaf = z.clone().requires_grad_()
    handed, u, row_energy = lora_fork(leaf, A)
    for out, plain in ((handed @ W, leaf @ W), (u, leaf @ A.T), (row_energy, leaf.square().sum(1))):
        got, want = (torch.autograd.grad(x.sum(), leaf, retain_graph=True)[0] for x in (out, plain))
        torch.testing.assert_close(got, want)


@devices
@pytest.mark.parametrize("dtype", [F32, BF16, F64])
def test_fold_into_a_buffer(dtype, device):
    W, B, c, A = make(OPS["lora_fold"], Case(0, 30, 20, 6, dtype), device)
    want = lora_fold(W, B, c, A)
    wide = torch.full((20, 40), torch.nan, dtype=dtype, device=device)
    out, version = wide[:, 5:35], wide._version
    assert lora_fold(W, B, c, A, out=out) is out and wide._version > version
    torch.testing.assert_close(out, want, rtol=0, atol=0)
    assert wide[:, :5].isnan().all() and wide[:, 35:].isnan().all()
    torch.testing.assert_close(lora_fold(W, B, c, A, out=W), want, rtol=0, atol=0)  # in place
    with pytest.raises(ValueError, match="no gradient"):
        lora_fold(W, B, c.requires_grad_(), A, out=out)
    with pytest.raises(ValueError, match="contiguous rows"):
        lora_fold(W, B, c.detach(), A, out=torch.empty(30, 20, dtype=dtype, device=device).T)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lora_down(torch.ones(3, 4), torch.ones(2, 5)), r"lora_A must have shape \(2, 4\)"),
        (lambda: lora_down(torch.ones(3, 4), torch.ones(2, 4, dtype=BF16)), "lora_A is torch.bfloat16"),
        (lambda: lora_down(torch.ones(3, 0), torch.ones(2, 0)), "d >= 1"),
        (lambda: lora_up(torch.ones(3, 4), torch.ones(2, 2), torch.ones(2), torch.ones(4, 2)), "u must have"),
        (lambda: lora_up(torch.ones(3, 4), torch.ones(3, 2), torch.ones(3), torch.ones(4, 2)), "c must have"),
        (lambda: lora_up(torch.ones(3, 4), torch.ones(3, 2), torch.ones(2), torch.ones(2, 4)), "lora_B must have"),
        (
            lambda: lora_up(torch.ones(3, 4), torch.ones(3, 2).half(), torch.ones(2), torch.ones(4, 2)),
            "u torch.float16",
        ),
        (lambda: lora_fold(torch.ones(3, 4), torch.ones(3, 2), torch.ones(2), torch.ones(2, 5)), "lora_A must have"),
    ],
)
def test_refusals_name_the_argument(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.skipif(INTERPRET, reason="this is the run that it starts")
def test_kernels_in_the_interpreter():
    """The tests that reach a kernel, once more on the very Triton kernels."""
    pytest.importorskip("triton")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        __file__,
        "-k",
        "gradients or tiles or buffer",
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
