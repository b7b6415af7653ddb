"""Compress, then merge: the space that updates are cut to before a method sees them, against its dense formula."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import nsc
from nsc.methods import Updates
from nsc.recipes import spaces
from nsc.recipes.spaces import core, ctm
from tests.entries import plain_ties
from tests.merging.test_method_merges import weights
from tests.recipes.test_spaces import SHAPES, factors, merged, total
from tests.regressions import change_basis, own_updates

IN_CTM = ("task-arithmetic", "ties", "dare", "dare-ties", "tsv", "cart")
UPDATES = factors((30, 20), (4, 4, 4))


def leading(matrix: Tensor, count: int) -> Tensor:
    return torch.linalg.svd(matrix, full_matrices=False).U[:, :count]


def plain_directions(updates: Updates, rank: int, beta: float) -> tuple[Tensor, Tensor]:
    """U (m, r) and V (d, r) as the paper's code finds them, on dense updates."""
    D = own_updates(updates)
    norms = [float(x.norm()) for x in D]
    mean = sum(norms) / len(norms)
    D = [x / n * (beta * n + (1 - beta) * mean) for x, n in zip(D, norms, strict=True)]
    U, V = leading(torch.cat(D, 1), rank), leading(torch.cat([x.T for x in D], 1), rank)
    for _ in range(spaces.SWEEPS):
        U = leading(torch.cat([x @ V for x in D], 1), rank)
        V = leading(torch.cat([x.T @ U for x in D], 1), rank)
    return U, V


@pytest.mark.parametrize("rank, beta", [(None, 0.25), (2, 0.0), (6, 1.0)])
def test_the_dense_formula(rank, beta):
    """The sum and TIES of U' D_k V, lifted."""
    U, V = plain_directions(UPDATES, rank or 4, beta)
    cores = torch.stack([U.T @ D @ V for D in own_updates(UPDATES)])
    w = torch.tensor(UPDATES.weights, dtype=torch.float64)[:, None, None]
    settings = dict(rank=rank, beta=beta)
    exactly = dict(rtol=0, atol=1e-12 * total(UPDATES).abs().max().item())
    summed = merged("ctm-task-arithmetic", UPDATES, **settings)
    torch.testing.assert_close(summed, U @ (w * cores).sum(0) @ V.T, **exactly)
    even = replace(UPDATES, weights=(1.0,) * 3)
    expected = U @ plain_ties(cores.flatten(1), 0.5).view_as(cores[0]) @ V.T
    torch.testing.assert_close(merged("ctm-ties", even, density=0.5, **settings), expected, **exactly)


@pytest.mark.parametrize("shape, ranks", SHAPES.values(), ids=SHAPES)
def test_what_is_lost_is_what_lies_outside_the_directions(shape, ranks):
    """|D_k - U X_k V'|^2 = |D_k|^2 - |X_k|^2; no more than at the start of the iteration, and of rank R nothing."""
    updates = factors(shape, ranks)
    views = {rank: ctm(updates, rank, beta=1.0) for rank in (2, sum(ranks))}
    for view in views.values():
        for D, X in zip(own_updates(updates), view.X, strict=True):
            seen = view.lift(X)
            lost = (D - seen.B @ seen.A).square().sum()
            torch.testing.assert_close(lost, D.square().sum() - X.square().sum(), rtol=0, atol=1e-10)
    kept = [view.X.square().sum() for view in views.values()]
    torch.testing.assert_close(kept[1], core(updates).X.square().sum())
    U = leading(torch.cat(own_updates(updates), 1), 2)
    V = leading(torch.cat([D.T for D in own_updates(updates)], 1), 2)
    start = sum((U.T @ D @ V).square().sum() for D in own_updates(updates))
    assert start * (1 - 1e-12) <= kept[0] <= kept[1]


@pytest.mark.parametrize("method", ["task-arithmetic", "tsv", "cart"])
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 6), (3, 0, 5)], ids=str)
def test_of_rank_R_it_is_core_space(method, ranks):
    """For methods that do not depend on the basis; TIES and DARE see other entries there."""
    updates = factors((30, 20), ranks)
    whole = merged(f"ctm-{method}", updates, rank=sum(ranks))
    torch.testing.assert_close(whole, merged(f"core-{method}", updates), rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", IN_CTM)
@pytest.mark.parametrize("rank", [None, 3])
def test_factoring_and_order_do_not_matter(method, rank):
    expected = merged(f"ctm-{method}", UPDATES, rank=rank)
    again = merged(f"ctm-{method}", change_basis(UPDATES), rank=rank)
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-9)
    names = ("tasks", "A", "B", "scales", "weights")
    turned = replace(UPDATES, **{name: tuple(getattr(UPDATES, name)[k] for k in (2, 0, 1)) for name in names})
    torch.testing.assert_close(merged(f"ctm-{method}", turned, rank=rank), expected, rtol=0, atol=1e-9)
    assert torch.linalg.matrix_rank(expected) <= (rank or 4)


def test_beta_0_gives_every_task_the_same_say():
    """Then a large update does not move the directions; with 1 it has them all."""
    large = replace(UPDATES, B=(UPDATES.B[0] * 1e4, *UPDATES.B[1:]))
    mine = lambda updates, beta: ctm(updates, 4, beta).lift(ctm(updates, 4, beta).X[1])  # noqa: E731
    for beta, same in ((0.0, True), (1.0, False)):
        one, other = mine(UPDATES, beta), mine(large, beta)
        assert torch.allclose(one.B @ one.A, other.B @ other.A, atol=1e-9) == same


def test_an_update_of_zeros_and_a_layer_of_zeros():
    silent = replace(UPDATES, B=(UPDATES.B[0], torch.zeros_like(UPDATES.B[1]), UPDATES.B[2]))
    absent = replace(
        silent, A=(silent.A[0], silent.A[1][:0], silent.A[2]), B=(silent.B[0], silent.B[1][:, :0], silent.B[2])
    )
    torch.testing.assert_close(merged("ctm-ties", silent), merged("ctm-ties", absent), rtol=0, atol=1e-10)
    nothing = replace(UPDATES, B=tuple(torch.zeros_like(b) for b in UPDATES.B))
    assert not merged("ctm-ties", nothing).any() and ctm(nothing).X.shape == (3, 4, 4)


def test_written_at_its_rank_recorded_and_replayed(base, adapters, tmp_path):
    """Without --rank for the writing: the merge has that rank."""
    result = nsc.merge(base, adapters, method="ctm-ties", rank=3, beta=0.5, scale=0.4, progress=False)
    result.save(tmp_path / "out")
    assert {len(result.merged.update(name).A) for name in result.modules} == {3}
    again = nsc.apply(tmp_path / "out")
    assert again.report.settings == result.report.settings and again.report.settings["beta"] == 0.5
    again.save(tmp_path / "again")
    assert weights(tmp_path / "again") == weights(tmp_path / "out")
    assert again.report.space == "ctm"


def test_the_flag_of_the_rank(base, adapters, tmp_path):
    from tests.cli.test_cli import run
    from tests.merging.test_method_merges import command, described

    done = run(*command(base, adapters, tmp_path / "out", "--method", "ctm-tsv", "--rank", 8, "--set", "beta=1"))
    assert done.exit_code == 0, done.output
    assert described(tmp_path / "out")["settings"]["rank"] == 8
