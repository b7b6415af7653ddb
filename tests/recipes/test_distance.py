"""Norm and distance of updates by their factors, against the dense float64 products that are never formed."""

import pytest
import torch

from nsc.methods import LowRank
from nsc.recipes.updates import distance, norm

M, D = 40, 56


def factors(rank: int, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    B, A = torch.randn(M, rank, generator=generator), torch.randn(rank, D, generator=generator)
    return LowRank(B.double(), A.double())


def product(update: LowRank | torch.Tensor) -> torch.Tensor:
    return update.B.double() @ update.A.double() if isinstance(update, LowRank) else update.double()


@pytest.mark.parametrize("rank", [0, 1, 6, 50])
def test_norms_are_those_of_the_products(rank):
    update = factors(rank)
    assert norm(update).item() == pytest.approx(product(update).norm().item(), rel=1e-12)
    assert norm(product(update)).item() == pytest.approx(product(update).norm().item(), rel=1e-12)


@pytest.mark.parametrize("ranks", [(6, 6), (4, 6), (9, 6), (0, 6), (6, 0)])
@pytest.mark.parametrize("forms", [(False, False), (True, False), (False, True), (True, True)])
def test_distances_are_those_of_the_products(ranks, forms):
    pair = [factors(rank, seed) for seed, rank in enumerate(ranks)]
    given = [product(update) if dense else update for update, dense in zip(pair, forms, strict=True)]
    expected = (product(pair[0]) - product(pair[1])).norm().item()
    assert distance(*given).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("error", [1e-3, 1e-9, 1e-14])
def test_the_smallest_error_of_one_entry_is_seen_in_full(side, error):
    """No two large norms are subtracted: an error keeps all of its digits, however small it is."""
    expected = factors(6)
    written = LowRank(expected.B.clone(), expected.A.clone())
    getattr(written, side)[2, 3] += error
    off = getattr(written, side)[2, 3] - getattr(expected, side)[2, 3]  # as it was rounded
    other = expected.B[:, 2].norm() if side == "A" else expected.A[3].norm()
    assert distance(written, expected).item() == pytest.approx((off.abs() * other).item(), rel=1e-9)


def test_the_same_factors_are_at_no_distance_and_rows_of_zeros_change_nothing():
    update = factors(6)
    zeros = LowRank(torch.cat([update.B, torch.zeros(M, 3)], 1), torch.cat([update.A, torch.zeros(3, D)]))
    assert distance(update, update) == 0 == distance(zeros, update) == distance(update, zeros)


def test_dtypes_may_differ():
    update, other = factors(6), factors(6, seed=1)
    mixed = LowRank(update.B.double(), update.A.float())
    for expected in (other, product(other).float()):
        assert distance(mixed, expected).item() == pytest.approx((product(mixed) - product(expected)).norm().item())


def test_the_same_update_in_another_basis_is_near_and_nan_is_nan():
    update = factors(6)
    Q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert distance(LowRank(update.B @ Q, Q.mT @ update.A), update) <= 1e-7 * norm(update)
    assert distance(LowRank(update.B * float("nan"), update.A), update).isnan()
