"""MergedLoRALinear alone: values and gradients against the dense layer."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nsc_kernels import MergedLoRALinear, lora_fold, modules
from nsc_kernels.lora_down import lora_down_backward_reference, lora_down_reference
from nsc_kernels.lora_fold import lora_fold_backward_reference, lora_fold_reference
from nsc_kernels.lora_up import lora_up_backward_reference, lora_up_reference
from nsc_kernels.modules import extra_flops

RANKS, SCALES = (2, 0, 3), (1.0, 5.0, 0.5)


def make(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)
    base = nn.Linear(7, 6, bias=bias, dtype=dtype).requires_grad_(False)
    A, B = (torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in ((5, 7), (6, 5)))
    return base, A, B


def dense(base, A, B, lam):
    segments = zip(A.split(RANKS), B.split(RANKS, dim=1), SCALES, lam, strict=True)
    return base.weight + sum(value * scale * b @ a for a, b, scale, value in segments)


@pytest.mark.parametrize("plan", ["factors", "weights"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (0, 7)])
def test_forward_and_gradients_equal_the_dense_layer(shape, bias, plan):
    base, A, B = make(bias=bias)
    lam = torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64, requires_grad=True)
    z = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam, plan=plan)
    expected = nn.functional.linear(z, dense(base, A, B, lam), base.bias)
    torch.testing.assert_close(layer(z), expected, rtol=0, atol=1e-12)
    grad = torch.randn_like(expected)
    mine = torch.autograd.grad(layer(z), (z, lam), grad)
    theirs = torch.autograd.grad(expected, (z, lam), grad)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert mine[1][1] == 0  # absent adapter


@pytest.mark.parametrize("plan", ["factors", "weights"])
def test_a_coefficient_for_every_row_of_lora_A(plan):
    base, A, B = make()
    lam = torch.tensor([0.3, 0.7, -0.4, 0.2, 0.5], dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam, plan=plan, by_rank=True)
    scales = torch.tensor([1.0, 1.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    expected = nn.functional.linear(z, base.weight + B @ torch.diag(lam * scales) @ A, base.bias)
    torch.testing.assert_close(layer(z), expected, rtol=0, atol=1e-12)
    mine, theirs = (torch.autograd.grad(y.square().sum(), (z, lam)) for y in (layer(z), expected))
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)


def test_gradcheck():
    base, A, B = make()
    lam = torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64, requires_grad=True)
    z = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, lam: MergedLoRALinear(base, A, B, RANKS, SCALES, lam)(z), (z, lam))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_twice_torchs_own_error(dtype):
    base, A, B = make(dtype)
    lam, z = torch.tensor([0.3, 0.7, -0.4]), torch.randn(64, 7, dtype=dtype)
    exact = dense(base.double(), A.double(), B.double(), lam.double())
    oracle = nn.functional.linear(z.double(), exact, base.bias)
    base = base.to(dtype)  # back: its values came from this dtype
    torchs = base(z)
    for a, b, scale, value in zip(A.split(RANKS), B.split(RANKS, dim=1), SCALES, lam.tolist(), strict=True):
        torchs = torchs + value * scale * (z @ a.T @ b.T)
    mine = MergedLoRALinear(base, A, B, RANKS, SCALES, lam)(z)
    assert mine.dtype == dtype
    assert (mine.double() - oracle).abs().max() <= 2 * (torchs.double() - oracle).abs().max() + 1e-6


def test_a_trainable_lam_is_a_parameter_and_factors_are_not():
    base, A, B = make()
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, nn.Parameter(torch.ones(3, dtype=torch.float64)))
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["lam"]
    assert set(layer.state_dict()) == {"lam", "base.weight", "base.bias"}


def test_autocast_keeps_the_coefficients_in_float32():
    base, A, B = make(torch.float32)
    lam = torch.tensor([0.3, 0.7, -0.4], requires_grad=True)
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(4, 7))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and lam.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora_B": torch.zeros(6, 4)}, "must be"),
        ({"ranks": (2, 2)}, "add up to 4"),
        ({"scales": (1.0,)}, "one length K"),
        ({"lam": torch.ones(2)}, "one length K"),
        ({"by_rank": True}, "of length R"),
        ({"plan": "dense"}, "factors or weights"),
        ({"plan": "weights", "base": nn.Sequential()}, "not Sequential; use plan factors"),
    ],
)
def test_shapes_that_do_not_follow_are_refused(change, says):
    base, A, B = make()
    arguments = {
        "base": base,
        "lora_A": A,
        "lora_B": B,
        "ranks": RANKS,
        "scales": SCALES,
        "lam": torch.ones(3),
    } | change
    with pytest.raises(ValueError, match=says):
        MergedLoRALinear(**arguments)


@pytest.mark.parametrize("plan", ["factors", "weights"])
def test_watch_is_given_what_the_ratio_needs(plan):
    """u and |z|^2 in the layer's own shape, with a gradient that joins that of the layer."""
    base, A, B = make()
    lam = torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64)
    z = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    seen = []
    layer = MergedLoRALinear(
        base, A, B, RANKS, SCALES, lam, watch=lambda u, energy: seen.append((u, energy)), plan=plan
    )
    y = layer(z)
    ((u, energy),) = seen
    torch.testing.assert_close(u, z @ A.T)
    torch.testing.assert_close(energy, z.square().sum(-1))
    got = torch.autograd.grad(y.sum() + u.sin().sum() + energy.sqrt().sum(), z)
    plain = nn.functional.linear(z, dense(base, A, B, lam), base.bias).sum() + (z @ A.T).sin().sum()
    torch.testing.assert_close(got, torch.autograd.grad(plain + z.norm(dim=-1).sum(), z))


def test_the_backward_keeps_no_copy_of_z():
    """Only u, the coefficients and what is frozen; z as well where it is watched."""
    base, A, B = make()
    base.requires_grad_(False)
    frozen = {x.data_ptr() for x in (A, B, base.weight, base.bias)}
    z = torch.randn(50, 7, dtype=torch.float64, requires_grad=True)
    for watch, widest in ((None, sum(RANKS)), (lambda u, energy: None, 7)):
        lam = torch.tensor([0.3, 0.7, -0.4], dtype=torch.float64, requires_grad=True)
        layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam, watch)
        kept: list[torch.Tensor] = []

        def pack(x, kept=kept):
            kept.append(x)
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(z)
        rows = [x for x in kept if x.data_ptr() not in frozen and x.shape[:1] == (50,)]
        assert max(x.shape[1] for x in rows) == widest
        assert len({x.data_ptr() for x in rows}) == (1 if watch is None else 2)


def test_compile_fullgraph():
    base, A, B = make(torch.float32)
    lam = torch.tensor([0.3, 0.7, -0.4], requires_grad=True)
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    z = torch.randn(4, 7, requires_grad=True)
    results = [(y := function(z), *torch.autograd.grad(y.square().sum(), (z, lam))) for function in (layer, compiled)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("plan", ["factors", "weights"])
def test_flops_of_a_plan_are_those_of_its_passes(plan):
    """Counted in the references of its ops, forward and backward, where only the coefficients train."""
    n, d, m, R = 11, 7, 6, 5
    z, y, u, c, A, B, W = (torch.randn(*shape) for shape in ((n, d), (n, m), (n, R), (R,), (R, d), (m, R), (m, d)))
    with FlopCounterMode(display=False) as counter:
        if plan == "factors":
            lora_down_reference(z, A, False)
            lora_up_reference(y, u, c, B)
            lora_up_backward_reference(y, u, c, B, True)
            lora_down_backward_reference(z, u, None, None, A)
        else:
            lora_fold_reference(W, B, c, A)
            lora_fold_backward_reference(y.T @ z, B, c, A, False)
    assert counter.get_total_flops() == extra_flops(plan, n, d, m, R)


@pytest.mark.parametrize("by_rank", [False, True])
@pytest.mark.parametrize("rows", [1, 40])  # dc from rows, and from the weight
def test_a_weight_folded_once_is_that_of_every_forward(rows, by_rank, monkeypatch):
    """The same bits, by one fold for all forwards inside, and of new coefficients the next time."""
    base, A, B = make()
    lam = torch.tensor([0.3, 0.7, -0.4, 0.2, 0.5][: 5 if by_rank else 3], dtype=torch.float64, requires_grad=True)
    layer = MergedLoRALinear(base, A, B, RANKS, SCALES, lam, plan="weights", by_rank=by_rank)
    passes = [torch.randn(rows, 7, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def run(z):
        y = layer(z)
        return y, *torch.autograd.grad(y.square().sum(), (z, lam))

    folds = []
    monkeypatch.setattr(modules, "lora_fold", lambda *args, **options: folds.append(1) or lora_fold(*args, **options))
    for _ in range(2):
        plain = [run(z) for z in passes]
        folds.clear()
        with modules.folded_once([layer]):
            shared = [run(z) for z in passes]
        assert len(folds) == 1 and layer.folded is None
        torch.testing.assert_close(shared, plain, rtol=0, atol=0)
        with torch.no_grad():
            lam += 1
