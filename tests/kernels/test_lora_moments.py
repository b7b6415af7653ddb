"""``lora_moments``: one table of cases against float64, its laws, and the kernels in the interpreter or on a GPU."""

import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nsc_kernels import Moments, lora_down, lora_moments
from nsc_kernels._launch import MomentBlocks
from nsc_kernels._op import INTERPRET, Launch
from tests.ops import BF16, DEVICES, F16, F32, F64, max_abs, strided

module = sys.modules["nsc_kernels.lora_moments"]
devices = pytest.mark.parametrize("device", DEVICES)


@dataclass(frozen=True)
class Case:
    """``n`` rows of width ``d``, ``r`` columns of u; ``tasks`` of 0 means that the call is not told of tasks."""

    n: int
    d: int
    r: int
    dtype: torch.dtype = F32
    tasks: int = 0
    weighted: bool = False
    crossed: bool = False
    strided: bool = False

    def __str__(self) -> str:
        flags = [flag for flag in ("weighted", "crossed", "strided") if getattr(self, flag)]
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([f"n{self.n}", f"d{self.d}", f"r{self.r}", f"k{self.tasks}", dtype, *flags])


CASES = [
    Case(1, 64, 3),
    Case(3, 7, 1, F64),
    Case(17, 30, 20, F64, tasks=3, weighted=True, crossed=True),
    Case(17, 129, 16, tasks=3, weighted=True, crossed=True, strided=True),
    Case(17, 129, 16, BF16, tasks=3),
    Case(17, 129, 20, F16, tasks=2, weighted=True, strided=True),
    Case(300, 40, 33, BF16, tasks=4, weighted=True, crossed=True, strided=True),  # rows in parts, R in tiles
    Case(300, 40, 70, tasks=2, crossed=True),
    Case(300, 24, 16, F16, crossed=True),
    Case(130, 64, 96, BF16, weighted=True),
    Case(3, 40, 260),
    Case(3, 40, 320, BF16),
    Case(4, 64, 0, tasks=2),
    Case(0, 64, 3, BF16, tasks=2, crossed=True),
]
every_case = pytest.mark.parametrize("case", CASES, ids=str)
ROUTED = Case(300, 40, 24, tasks=3, weighted=True, crossed=True)
ROUTED_BF16 = Case(300, 40, 24, BF16, tasks=3, weighted=True, crossed=True)
TAILS = [
    Case(70, 30, 20, tasks=2, weighted=True, crossed=True),
    Case(70, 30, 17, BF16, 2, True, True, True),
    Case(40, 30, 33, F16, strided=True),
]
laws = pytest.mark.parametrize("case", [ROUTED, ROUTED_BF16, Case(300, 20, 5, F64, 3, True, True)], ids=str)


def make(case: Case, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The arguments of one call; every third row has weight 0, and rows of the tasks alternate at random."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(case.n, case.d, generator=generator, dtype=F64).to(case.dtype)
    lora_A = (torch.randn(case.r, case.d, generator=generator, dtype=F64) / case.d**0.5).to(case.dtype)
    other = torch.randn(case.n, case.r, generator=generator, dtype=F64).to(case.dtype)
    task = torch.randint(max(case.tasks, 1), (case.n,), generator=generator)
    weight = torch.rand(case.n, generator=generator) * (torch.arange(case.n) % 3 != 0)
    if case.strided:
        z, lora_A, other = strided(z), strided(lora_A), strided(other)
    made: dict[str, Any] = {"z": z, "lora_A": lora_A}
    made |= {"task": task} if case.tasks else {}
    made |= {"weight": weight.to(torch.promote_types(case.dtype, F32))} if case.weighted else {}
    made |= {"other": other} if case.crossed else {}
    return {name: x.to(device) for name, x in made.items()} | {"tasks": max(case.tasks, 1)}


def plain(
    z: Tensor,
    lora_A: Tensor,
    task: Tensor | None = None,
    weight: Tensor | None = None,
    other: Tensor | None = None,
    tasks: int = 1,
    u: Tensor | None = None,
) -> Moments:
    """The same as one would write it in torch, in the dtype of z or float32; of a given u, if there is one."""
    wide = torch.promote_types(z.dtype, F32)
    u = z @ lora_A.T if u is None else u
    task = torch.zeros(len(z), dtype=torch.int64, device=z.device) if task is None else task
    weight = torch.ones(len(z), dtype=wide, device=z.device) if weight is None else weight
    weighted = u.to(wide) * weight[:, None]
    second, cross = (
        None if left is None else torch.stack([left[task == k].to(wide).T @ weighted[task == k] for k in range(tasks)])
        for left in (u, other)
    )
    return Moments(u, z.to(wide).square().sum(-1), second, cross)


def doubled(args: dict[str, Any]) -> dict[str, Any]:
    return {k: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in args.items()}


def tensors(moments: Moments) -> list[Tensor]:
    return [x for x in moments if x is not None]


@pytest.fixture
def launched(monkeypatch):
    """The kernels that were launched so far, by name."""
    names, launch = [], Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: (names.append(self.kernel.__name__), launch(self)))
    return names


@devices
@every_case
def test_values(case, device, launched):
    """Each result within twice torch's own error in the same dtype, of the shape and dtype that are promised."""
    args = make(case, device)
    got, want, own = lora_moments(**args), plain(**doubled(args)), plain(**args)
    assert [x.shape for x in tensors(got)] == [x.shape for x in tensors(want)]
    assert got.u.dtype == case.dtype and got.energy.dtype == torch.promote_types(case.dtype, F32)
    assert got.second.dtype == F64 and (got.cross is None) == (not case.crossed)
    for mine, exact, torchs in zip(tensors(got), tensors(want), tensors(own), strict=True):
        assert max_abs(mine - exact) <= 2 * max_abs(torchs - exact) + 1e-6 * max(1.0, max_abs(exact))
    if (INTERPRET or device == "cuda") and case.dtype != F64:
        assert {"shrink_kernel", "moments_kernel", "sum_moments_kernel"} <= set(launched)
        assert launched.count("shrink_kernel") == 1  # z is read once
    else:
        assert not launched


@devices
@every_case
def test_moments_are_those_of_the_returned_u(case, device):
    """To the accuracy of float32, also where u is in half precision; u and energy are those of ``lora_down``."""
    args = make(case, device)
    got = lora_moments(**args)
    exact = plain(**doubled(args), u=got.u.double())
    own = plain(**args, u=got.u)
    for mine, want, torchs in zip(tensors(got)[2:], tensors(exact)[2:], tensors(own)[2:], strict=True):
        assert max_abs(mine - want) <= 2 * max_abs(torchs - want) + 1e-7 * max(1.0, max_abs(want))
    for mine, want in zip(got[:2], lora_down(args["z"], args["lora_A"]), strict=True):
        torch.testing.assert_close(mine, want, rtol=0, atol=0)


@devices
def test_leading_dimensions_and_defaults(device):
    """Rows of any number of dimensions; one task and weights of 1 where none are given, said or not."""
    args = make(Case(12, 40, 5, crossed=True), device)
    flat = lora_moments(**args)
    z, other = args["z"].view(3, 4, 40), args["other"].view(3, 4, 5)
    said = {"task": torch.zeros(3, 4, dtype=torch.int32, device=device), "weight": torch.ones(3, 4, device=device)}
    for given in ({}, said, {"task": said["task"]}, {"weight": said["weight"].double()}):
        got = lora_moments(z, args["lora_A"], other=other, **given)
        assert got.u.shape == (3, 4, 5) and got.energy.shape == (3, 4)
        for mine, want in zip(got[2:], flat[2:], strict=True):
            torch.testing.assert_close(mine, want, rtol=1e-6, atol=1e-6)
    vector = lora_moments(z[0, 0], args["lora_A"])
    assert vector.u.shape == (5,) and vector.energy.shape == () and vector.second.shape == (1, 5, 5)
    several = lora_moments(z, args["lora_A"], tasks=3)
    torch.testing.assert_close(several.second[:1], flat.second, rtol=0, atol=0)
    assert not several.second[1:].any()


@devices
@laws
def test_rows_of_weight_0_never_count(case, device):
    """Whatever they hold, bit for bit; another row that is NaN is not hidden, nor is one of a task that is not."""
    args = make(case, device)
    dead = args["weight"] == 0
    want = lora_moments(**args)
    for value in (torch.nan, torch.inf):
        z, other, task = (args[name].clone() for name in ("z", "other", "task"))
        z[dead], other[dead], task[dead] = value, value, -7
        got = lora_moments(**args | {"z": z, "other": other, "task": task})
        for mine, clean in zip(got[2:], want[2:], strict=True):
            torch.testing.assert_close(mine, clean, rtol=0, atol=0)
    z, row = args["z"].clone(), int((~dead).nonzero()[0])
    z[row] = torch.nan
    owner = int(args["task"][row])
    seen = lora_moments(**args | {"z": z}).second.isnan().flatten(1).all(1)
    assert seen.tolist() == [k == owner for k in range(case.tasks)]
    for strange in (-1, case.tasks):
        task = args["task"].clone()
        task[row] = strange
        assert all(x.isnan().all() for x in lora_moments(**args | {"task": task})[2:])


@devices
@laws
def test_laws(case, device):
    """Symmetric, positive; the sum over tasks is that of one task; names of tasks and order of rows do not matter."""
    args = make(case, device)
    got = lora_moments(**args)
    assert torch.equal(got.second, got.second.mT)
    assert torch.linalg.eigvalsh(got.second).min() >= -1e-6 * max_abs(got.second)
    near = {"rtol": 1e-5, "atol": 1e-5 * max_abs(got.second)}
    whole = lora_moments(**{k: x for k, x in args.items() if k not in ("task", "tasks")})
    order = torch.randperm(case.n, generator=torch.Generator().manual_seed(1)).to(device)
    rows = {name: args[name][order] for name in ("z", "task", "weight", "other")}
    shuffled = lora_moments(**args | rows)
    of_itself = lora_moments(**args | {"other": got.u})
    torch.testing.assert_close(of_itself.cross, got.second, **near)
    renamed = lora_moments(**args | {"task": (args["task"] + 1) % case.tasks})
    twice = lora_moments(**args | {"weight": 2 * args["weight"]})
    for i in (2, 3):
        torch.testing.assert_close(got[i].sum(0), whole[i][0], **near)
        torch.testing.assert_close(shuffled[i], got[i], **near)
        torch.testing.assert_close(renamed[i].roll(-1, 0), got[i], rtol=0, atol=0)
        torch.testing.assert_close(twice[i], 2 * got[i], rtol=1e-12, atol=0)


@devices
@laws
@pytest.mark.parametrize("first", [256, 100])
def test_batches_add_up(case, first, device):
    """To the last bits of float64 where a batch ends between two chunks of rows, else to those of float32."""
    args = make(case, device)
    of_rows = {k: x for k, x in args.items() if k not in ("lora_A", "tasks")}
    parts = [
        lora_moments(**args | {k: x[span] for k, x in of_rows.items()}) for span in (slice(first), slice(first, None))
    ]
    near = 1e-12 if first % 128 == 0 or case.dtype == F64 else 1e-6
    for i, whole in enumerate(lora_moments(**args)[2:], start=2):
        torch.testing.assert_close(parts[0][i] + parts[1][i], whole, rtol=near, atol=near * max_abs(whole))


@devices
@pytest.mark.parametrize("case", TAILS, ids=str)
def test_small_tiles_and_many_parts(case, device, monkeypatch):
    """With tails everywhere and results in memory that held NaN: all is written, the same at every run; inputs stay."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    args = make(case, device)
    before = {k: x.clone() if isinstance(x, Tensor) else x for k, x in args.items()}
    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(module, "moment_blocks", lambda n, *_: (MomentBlocks(32, 16, 16, 4, 1), -(-n // 32), 32))
    monkeypatch.setattr(module, "SUM_BLOCKS", {"BLOCK_P": 2, "BLOCK_E": 16, "num_warps": 1})
    got, again = lora_moments(**args), lora_moments(**args)
    torch.testing.assert_close(got, again, rtol=0, atol=0)
    want, own = plain(**doubled(args)), plain(**args)
    for mine, exact, torchs in zip(tensors(got), tensors(want), tensors(own), strict=True):
        assert max_abs(mine - exact) <= 2 * max_abs(torchs - exact) + 1e-6 * max(1.0, max_abs(exact))
    for name, x in before.items():
        assert torch.equal(args[name], x) if isinstance(x, Tensor) else args[name] == x


def test_a_chunk_without_the_task_is_passed_over():
    """Rows of a task that lie together give the same as rows that alternate, in whatever chunks they come."""
    args = make(Case(300, 20, 8, tasks=3, weighted=True))
    order = args["task"].argsort(stable=True)
    together = lora_moments(**args | {name: args[name][order] for name in ("z", "task", "weight")})
    torch.testing.assert_close(together.second, lora_moments(**args).second, rtol=1e-5, atol=1e-4)


def test_results_are_constants_to_autograd():
    """Nothing requires a gradient, a backward is an error in both doors, and a tangent is not passed on."""
    args = make(Case(9, 12, 4, weighted=True, crossed=True))
    leaves = {k: x.requires_grad_() if isinstance(x, Tensor) else x for k, x in args.items()}
    got = lora_moments(**leaves)
    assert not any(x.requires_grad for x in tensors(got))
    with pytest.raises(RuntimeError, match="does not require grad"):
        got.second.sum().backward()
    flat = (leaves["z"], leaves["lora_A"], None, leaves["weight"], leaves["other"], 1)
    with pytest.raises(RuntimeError, match="autograd"):
        torch.ops.nsc.lora_moments(*flat)[2].sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(args["z"].detach(), torch.ones_like(args["z"]))
        for x in tensors(lora_moments(dual, args["lora_A"])):
            assert torch.autograd.forward_ad.unpack_dual(x).tangent is None


@pytest.mark.parametrize("case", [Case(5, 9, 4), Case(5, 9, 4, BF16, 2, True, True, True), Case(0, 9, 4)], ids=str)
def test_opcheck(case):
    args = make(case)
    flat = [args.get(name) for name in ("z", "lora_A", "task", "weight", "other")]
    torch.library.opcheck(torch.ops.nsc.lora_moments.default, (*flat, args["tasks"]))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_fullgraph(backend):
    """One dynamic graph, equal to eager for every number of rows."""
    compiled = torch.compile(lora_moments, backend=backend, fullgraph=True, dynamic=True)
    for n in (17, 33):
        args = make(Case(n, 12, 6, tasks=3, weighted=True, crossed=True))
        args["z"].requires_grad_()
        torch.testing.assert_close(compiled(**args), lora_moments(**args))


@devices
def test_autocast_does_as_linear_does(device):
    args = make(Case(9, 32, 5, weighted=True), device)
    with torch.autocast(device, dtype=BF16):
        got = lora_moments(**args)
    cast = {name: args[name].to(BF16) for name in ("z", "lora_A")}
    torch.testing.assert_close(got, lora_moments(**args | cast), rtol=0, atol=0)
    assert got.u.dtype == BF16 and got.energy.dtype == F32


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"z": torch.ones(3, 0), "lora_A": torch.ones(2, 0)}, "d >= 1"),
        ({"lora_A": torch.ones(2, 5)}, r"lora_A must have shape \(2, 4\)"),
        ({"lora_A": torch.ones(2, 4, dtype=BF16)}, r"lora_A is torch.bfloat16; convert"),
        ({"tasks": 0}, "tasks must be at least 1, got 0; give the number"),
        ({"task": torch.zeros(4, dtype=torch.int64)}, r"task must have shape \(3,\), one task for each row"),
        ({"task": torch.zeros(3)}, r"task must hold integers, got torch.float32; convert it with .long\(\)"),
        ({"weight": torch.ones(3, 1)}, r"weight must have shape \(3,\), one weight for each row"),
        ({"weight": torch.ones(3, dtype=torch.bool)}, r"weight must be floating point, got torch.bool; convert"),
        ({"other": torch.ones(3, 3)}, r"other must have shape \(3, 2\), u of the same rows"),
        ({"other": torch.ones(3, 2, device="meta")}, "other is on meta but z is on cpu; move it there"),
    ],
)
def test_refusals_name_the_argument(given, says):
    with pytest.raises(ValueError, match=says):
        lora_moments(**{"z": torch.ones(3, 4), "lora_A": torch.ones(2, 4)} | given)


@pytest.mark.skipif(INTERPRET, reason="this is the run that it starts")
def test_kernels_in_the_interpreter():
    """The tests of values and laws, once more on the very Triton kernels."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", "values or returned or count or batches or tiles or passed"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout
