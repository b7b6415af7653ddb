"""The edges of ``null_space_ratio``, the laws that it obeys whatever the numbers, and what its boundary refuses."""

import pytest
import torch

from nsc_kernels._op import INTERPRET
from nsc_kernels._ratio_tl import MIN_RATIO
from nsc_kernels.null_space_ratio import null_space_ratio
from tests.ops import BF16, DEVICES, F16, F32, F64, Case, make

devices = pytest.mark.parametrize("device", DEVICES)


@devices
def test_leading_dimensions_and_untouched_inputs(ratio, device):
    inputs = make(Case(12, 40, (3, 5), weighted=False), device)
    flat = ratio(inputs.z, inputs.u, **inputs.kwargs)
    before = [x.clone() for x in (inputs.z, inputs.u, inputs.gram_inverse)]
    shaped = inputs.kwargs | {"adapter": inputs.adapter.reshape(2, 6)}
    z, u = inputs.z.reshape(2, 6, 40).requires_grad_(), inputs.u.reshape(2, 6, 8).requires_grad_()
    got = ratio(z, u, **shaped)
    got.sum().backward(retain_graph=True)
    first = z.grad.clone()
    got.sum().backward()
    assert got.shape == (2, 6) and torch.equal(got.flatten(), flat)
    assert torch.equal(z.grad, 2 * first)
    assert all(torch.equal(x, y) for x, y in zip(before, (inputs.z, inputs.u, inputs.gram_inverse), strict=True))
    one = ratio(inputs.z[0], inputs.u[0], inputs.gram_inverse)
    assert one.shape == ()


@devices
@pytest.mark.parametrize("dtype", [F64, F32])
def test_rows_left_out_and_neighbours_do_not_leak(ratio, device, dtype):
    """Rows of weight 0, and other adapters' columns of u, may hold anything at all."""
    case = Case(17, 40, (3, 0, 5), dtype, weighted=True)
    clean, dirty = make(case, device), make(case, device)
    dropped = dirty.weight == 0
    dirty.z[dropped], dirty.u[dropped] = torch.nan, torch.inf
    dirty.adapter[dropped] = -1
    for row, k in enumerate(dirty.rows.tolist()):
        own = slice(*dirty.spans[k])
        kept = dirty.u[row, own].clone()
        dirty.u[row], dirty.u[row, own] = torch.nan, kept
    results = []
    for inputs in (clean, dirty):
        names = ("z", "u", "gram_inverse", "weight")
        leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in names}
        value = ratio(**{**inputs.kwargs, **leaves})
        value.backward()
        results.append([value.detach(), *(x.grad for x in leaves.values())])
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y) and y.isfinite().all()
    assert not results[1][1][dropped].any() and not results[1][4][dropped].any()


@devices
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_bad_rows_are_nan_alone(ratio, device, dtype):
    """NaN and infinity in z or in the row's own columns of u, and an adapter that does not exist, are never hidden."""
    inputs = make(Case(9, 40, (3, 0, 5), dtype), device)
    inputs.adapter.copy_(torch.tensor([0, 1, 2] * 3))
    inputs.z[0, 3], inputs.z[1, 3], inputs.z[2, 3] = torch.nan, torch.nan, torch.inf
    inputs.u[3, 0], inputs.u[5, 4] = torch.nan, torch.inf
    inputs.adapter[6], inputs.adapter[7] = -1, 3
    z, u = inputs.z.clone().requires_grad_(), inputs.u.clone().requires_grad_()
    value = ratio(z, u, **inputs.kwargs)
    value.sum().backward()
    bad = torch.tensor([0, 1, 2, 3, 5, 6, 7])
    assert value.isnan().nonzero().flatten().tolist() == bad.tolist()
    assert z.grad[bad].isnan().all()
    assert z.grad[[4, 8]].isfinite().all() and u.grad[[4, 8]].isfinite().all()


@devices
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_rows_whose_squares_leave_float32(device, dtype, exponent):
    """Scaling a row by a power of two changes no bit of the ratio, and divides the gradient."""
    inputs = make(Case(5, 40, (3, 5), dtype), device)
    factor = torch.tensor([1.0, 2.0**exponent, 1.0, 2.0**exponent, 2.0 ** (exponent // 2)], device=device)[:, None]
    results = []
    for scale in (torch.ones_like(factor), factor):
        z, u = ((x * scale.to(dtype)).requires_grad_() for x in (inputs.z, inputs.u))
        value = null_space_ratio(z, u, **inputs.kwargs)
        value.sum().backward()
        results.append((value, z.grad.double() * scale, u.grad.double() * scale))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5 if dtype == F32 else None, atol=1e-6 if dtype == F32 else None)


@devices
def test_zero_rows(ratio, device):
    for dtype in (F64, F32, F16):
        inputs = make(Case(3, 40, (3,), dtype), device)
        z, u = (x.clone().requires_grad_() for x in (inputs.z, inputs.u))
        with torch.no_grad():
            z[1], u[1] = 0, 0
        value = ratio(z, u, inputs.gram_inverse)
        value.sum().backward()
        assert value[1] == 1 and not z.grad[1].any() and not u.grad[1].any()
        assert z.grad[0].any() and u.grad[2].any()


@devices
@pytest.mark.parametrize("dtype", [F64, F32])
def test_gradient_is_held_where_the_ratio_vanishes(ratio, device, dtype):
    """A row inside the row space: om = 0, and the slope is that of om = MIN_RATIO, not infinite."""
    z = torch.zeros(1, 8, dtype=dtype, device=device)
    z[0, 0] = 2
    z.requires_grad_()
    u = z.detach()[:, :2].clone().requires_grad_()
    value = ratio(z, u)
    value.sum().backward()
    assert value.item() == 0
    assert z.grad[0, 0].item() == pytest.approx(1 / (MIN_RATIO * 2), rel=1e-6)
    assert u.grad[0, 0].item() == pytest.approx(-1 / (MIN_RATIO * 2), rel=1e-6)


def ratio_to(z, down, gram=True):
    gram_inverse = torch.linalg.inv(down @ down.T) if gram else None
    return null_space_ratio(z, z @ down.T, gram_inverse)


def test_law_within_zero_and_one(ratio):
    for seed in range(4 if INTERPRET else 20):
        inputs = make(Case(130, 6, (5,), BF16), seed=seed)
        value = ratio(inputs.z, inputs.u, inputs.gram_inverse)
        assert ((value >= 0) & (value <= 1)).all()


def test_law_invariance():
    """Not the length of z, nor the scale, sign, order or any invertible mixing of A's rows, moves the ratio."""
    inputs = make(Case(17, 40, (6,), F64))
    want = ratio_to(inputs.z, inputs.down)
    assert torch.allclose(ratio_to(-37.5 * inputs.z, inputs.down), want, rtol=0, atol=1e-12)
    mixing = torch.randn(6, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    scale = torch.diag(torch.logspace(-2, 3, 6, dtype=F64))
    sign = torch.diag(torch.tensor([1, -1, 1, -1, -1, 1]).to(F64))
    for change in (scale, sign, torch.eye(6, dtype=F64).flip(0), mixing):
        assert torch.allclose(ratio_to(inputs.z, change @ inputs.down), want, rtol=0, atol=1e-9)


def test_law_row_space_and_complement():
    inputs = make(Case(17, 40, (6,), F64))
    within = torch.randn(17, 6, dtype=F64, generator=torch.Generator().manual_seed(4)) @ inputs.down
    beyond = inputs.z - inputs.z @ torch.linalg.pinv(inputs.down) @ inputs.down
    assert ratio_to(within, inputs.down).max() < 1e-7
    assert ratio_to(beyond, inputs.down).min() > 1 - 1e-12


def test_law_whitened_is_gram():
    """L^-1 A instead of A, and no Gram inverse: the same ratio and the same total gradient."""
    inputs = make(Case(17, 40, (6,), F64))
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(inputs.down @ inputs.down.T), inputs.down, upper=False)
    results = []
    for down, gram in ((inputs.down, True), (white, False)):
        z = inputs.z.clone().requires_grad_()
        value = ratio_to(z, down, gram)
        results.append((value, torch.autograd.grad(value.sum(), z)[0]))
    for x, y in zip(*results, strict=True):
        assert (x - y).abs().max() < 1e-10


def test_law_weighted_sum(ratio):
    inputs = make(Case(130, 40, (3, 5), weighted=True))
    rows = ratio(inputs.z, inputs.u, **{**inputs.kwargs, "weight": None})
    total = ratio(inputs.z, inputs.u, **inputs.kwargs)
    torch.testing.assert_close(total, inputs.weight @ rows)


def test_law_one_adapter_at_a_time(ratio):
    """A routed call is the calls of the adapters, each on its own rows and columns."""
    inputs = make(Case(17, 40, (3, 0, 5), F64))
    got = ratio(inputs.z, inputs.u, **inputs.kwargs)
    for k, (i, j) in enumerate(inputs.spans):
        mine = inputs.rows == k
        alone = ratio(inputs.z[mine], inputs.u[mine, i:j], inputs.gram_inverse[i:j, i:j])
        assert torch.allclose(got[mine], alone, rtol=0, atol=1e-14)


REFUSALS = {
    "u must have shape .*one row of z @ A.T": {"u": torch.zeros(4, 8)},
    "u must be floating point, got torch.int64": {"u": torch.zeros(5, 8, dtype=torch.long)},
    "z must be .* d >= 1": {"z": torch.zeros(5, 0)},
    "z must be floating point": {"z": torch.zeros(5, 9, dtype=torch.int32)},
    r"gram_inverse must have shape \(8, 8\), square": {"gram_inverse": torch.zeros(8, 7)},
    "adapter and offsets go together": {"offsets": None},
    "offsets go together": {"adapter": None},
    "adapter must hold integers, got torch.float32": {"adapter": torch.zeros(5)},
    "adapter must hold integers, got torch.bool": {"adapter": torch.zeros(5, dtype=torch.bool)},
    r"adapter must have shape \(5,\), one index": {"adapter": torch.zeros(4, dtype=torch.long)},
    r"offsets must be \(K \+ 1,\)": {"offsets": torch.zeros(1, dtype=torch.long)},
    "offsets must hold integers": {"offsets": torch.zeros(3)},
    r"weight must have shape \(5,\)": {"weight": torch.zeros(5, 1)},
    "weight must be floating point": {"weight": torch.zeros(5, dtype=torch.bool)},
    "weight is on meta but z is on cpu": {"weight": torch.zeros(5, device="meta")},
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals(message):
    inputs = make(Case(5, 9, (3, 5), weighted=True))
    arguments = {"z": inputs.z, "u": inputs.u, **inputs.kwargs, **REFUSALS[message]}
    with pytest.raises(ValueError, match=message):
        null_space_ratio(**arguments)
