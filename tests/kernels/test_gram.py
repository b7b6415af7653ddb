"""GramCache: inverse, whitening, rank and condition, freshness, gradients."""

import math

import pytest
import torch

from nsc_kernels import GramCache, null_space_ratio

torch.manual_seed(0)
SHAPES = [(1, 1), (1, 7), (3, 7), (4, 64), (16, 129), (33, 300), (7, 7)]


def random_A(r: int, d: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(r, d, generator=torch.Generator().manual_seed(r * 1000 + d), dtype=torch.float64).to(dtype)


def deficient_As() -> dict[str, torch.Tensor]:
    """(A, with a row space of dimension 3 in every case)."""
    a = random_A(5, 40, torch.float32)
    duplicated, zero_rows, dependent, tripled = a.clone(), a.clone(), a.clone(), a.clone()
    duplicated[3:] = a[1]
    zero_rows[[0, 4]] = 0
    dependent[3], dependent[4] = a[0] + a[1], a[1] - a[2]
    tripled[3], tripled[4] = 3 * a[0], 0.1 * a[1]  # rounded: dependent only to float32's precision
    return {"duplicated": duplicated, "zero_rows": zero_rows, "dependent": dependent, "tripled": tripled}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_inverse_and_whitening_of_full_rank(shape, dtype):
    A = random_A(*shape, dtype)
    (factor,) = GramCache().factor([A])
    gram = A.double() @ A.double().T
    sigma = torch.linalg.svdvals(A.double())
    eye = torch.eye(shape[0], dtype=torch.float64)
    slack = 1e-13 * (sigma[0] / sigma[-1]).item() ** 2
    assert factor.rank == shape[0]
    assert factor.condition == pytest.approx((sigma[0] / sigma[-1]).item(), rel=1e-6)
    torch.testing.assert_close(factor.inverse @ gram, eye, rtol=0, atol=slack)
    torch.testing.assert_close(factor.whiten @ gram @ factor.whiten.T, eye, rtol=0, atol=slack)
    torch.testing.assert_close(factor.unwhiten @ factor.whiten, eye, rtol=0, atol=slack)


@pytest.mark.parametrize("kind", deficient_As())
def test_rank_deficient_A_uses_its_true_row_space(kind):
    A = deficient_As()[kind]
    cache = GramCache()
    (factor,) = cache.factor([A])
    assert factor.rank == 3
    _, _, rows = torch.linalg.svd(A.double())
    projection = rows[:3].T @ rows[:3]
    assert torch.allclose(A.double().T @ factor.inverse @ A.double(), projection, atol=1e-6)
    whitened_A, _ = cache.whiten(A, torch.randn(9, 5))
    expected = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    assert torch.allclose(whitened_A @ whitened_A.T, expected, atol=1e-6)


@pytest.mark.parametrize("kind", [*deficient_As(), "full"])
def test_whitening_keeps_the_product(kind):
    A = deficient_As().get(kind, random_A(5, 40)).double()
    B = torch.randn(9, 5, dtype=torch.float64)
    whitened_A, whitened_B = GramCache().whiten(A, B)
    assert torch.allclose(whitened_B @ whitened_A, B @ A, atol=1e-12)


def test_all_zero_A_sees_nothing():
    cache, A = GramCache(), torch.zeros(4, 16)
    (factor,) = cache.factor([A])
    assert factor.rank == 0 and factor.condition == math.inf
    assert not factor.inverse.any() and not factor.whiten.any()
    z = torch.randn(3, 16)
    assert (null_space_ratio(z, z @ A.T, cache.inverse(A)) == 1).all()


def test_nearly_dependent_rows_keep_their_digits():
    A = random_A(3, 50)
    A[2] = A[1] + 1e-6 * A[2]  # condition about 1e6, which a Gram in float64 would square
    (factor,) = GramCache().factor([A])
    rows = factor.whiten @ A
    assert factor.rank == 3
    assert torch.allclose(rows @ rows.T, torch.eye(3, dtype=torch.float64), atol=1e-9)


def test_many_shapes_in_one_call_come_back_in_order():
    tensors = [random_A(*shape) for shape in SHAPES] * 2 + [deficient_As()["zero_rows"]]
    for A, factor in zip(tensors, GramCache().factor(tensors), strict=True):
        (alone,) = GramCache().factor([A])
        assert factor.rank == alone.rank
        assert torch.allclose(factor.inverse, alone.inverse, rtol=1e-9)


def change_in_place(A):
    A.mul_(2)


def change_through_data(A):
    A.data.mul_(2)


def change_by_optimizer(A):
    A.grad = torch.ones_like(A)
    torch.optim.AdamW([A], lr=0.1).step()


def change_by_swapping_data(A):
    A.data = A.data * 2


def change_by_load_state_dict(A):
    holder = torch.nn.ParameterList([A])
    holder.load_state_dict({"0": A.detach() * 2})


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_through_data, change_by_optimizer, change_by_swapping_data, change_by_load_state_dict],
)
def test_never_stale(change):
    cache, A = GramCache(), torch.nn.Parameter(random_A(4, 16))
    before = cache.inverse(A).detach().clone()
    with torch.no_grad():
        change(A)
    after = cache.inverse(A).detach()
    assert torch.allclose(after @ (A @ A.T).detach(), torch.eye(4, dtype=torch.float64), atol=1e-10)
    assert not torch.allclose(before, after)


def test_unchanged_A_is_factored_once_and_forgotten_with_it():
    cache, A = GramCache(), random_A(4, 16)
    first = cache.factor([A])[0]
    assert cache.factor([A])[0] is first
    assert len(cache._entries) == 1
    del A
    assert len(cache._entries) == 0


def test_inverse_is_block_diagonal_and_at_least_float32():
    A1, A2 = random_A(2, 16, torch.bfloat16), random_A(3, 16, torch.float32)
    inverse = GramCache().inverse(A1, A2)
    assert inverse.dtype == torch.float32 and inverse.shape == (5, 5)
    assert not inverse[:2, 2:].any() and not inverse[2:, :2].any()
    assert GramCache().inverse(random_A(2, 16)).dtype == torch.float64


def test_gradient_of_the_inverse():
    A1, A2 = random_A(3, 10).requires_grad_(), random_A(2, 10).requires_grad_()
    assert torch.autograd.gradcheck(lambda *As: GramCache().inverse(*As), (A1, A2))


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (torch.full((2, 4), float("nan")), "number 1 holds NaN"),
        (torch.ones(2, 4, dtype=torch.int64), "number 1 must be a floating"),
        (torch.ones(4), "number 1 must be a floating"),
    ],
)
def test_refusals_name_the_position(bad, says):
    with pytest.raises(ValueError, match=says):
        GramCache().factor([torch.randn(2, 4), bad])


def test_whiten_refuses_other_ranks():
    with pytest.raises(ValueError, match="ranks differ"):
        GramCache().whiten(torch.randn(2, 4), torch.randn(5, 3))
