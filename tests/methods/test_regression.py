"""Regressions against their dense formulas, and the laws that only they keep; all laws are in test_method_laws."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods import METHODS, Updates
from nsc.methods.equations import Equations, Gram, solve
from nsc.methods.reconstruction import reconstruction
from nsc.recipes.spec import read_recipe
from tests.regressions import (
    change_basis,
    dense_formula,
    inputs_of,
    moments_of,
    own_updates,
    second,
    weight_of,
)

FROM_ROWS = [name for name, method in METHODS.items() if method.inputs]
from_rows = pytest.mark.parametrize("method", FROM_ROWS)
F64 = torch.float64


def layer(ranks=(3, 2, 4), m: int = 9, d: int = 21, weights=None) -> Updates:
    """Random factors; a rank of 0 for an adapter without the layer."""
    generator = torch.Generator().manual_seed(1)
    tasks = tuple("abcdefgh"[: len(ranks)])
    return Updates(
        "layer",
        tasks,
        tuple(torch.randn(r, d, generator=generator, dtype=F64) for r in ranks),
        tuple(torch.randn(m, r, generator=generator, dtype=F64) for r in ranks),
        tuple(0.5 + k for k in range(len(ranks))),
        weights or (1.0,) * len(ranks),
    )


def rows(updates: Updates, side: int = 0, n: int = 90) -> list[Tensor]:
    return [inputs_of(updates.name, task, updates.shape[1], n, side) for task in updates.tasks]


def merged(method: str, updates: Updates, X: list[Tensor], other: list[Tensor] | None = None, **settings) -> Tensor:
    """(m, d) dense."""
    chosen = read_recipe(method, **settings)
    if chosen.method.inputs is None:
        B, A = chosen.method.on_factors(updates, chosen.settings)
        return B @ A
    updates = replace(updates, moments=moments_of(chosen.method.inputs, updates, X, other))
    equations = chosen.method.equations(updates, chosen.settings)
    return equations.B @ solve(equations, "layer").A


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-12) -> bool:
    return bool((found - wanted).norm() <= tolerance * wanted.norm())


@from_rows
@pytest.mark.parametrize("ranks", [(3, 2, 4), (3, 0, 4), (1,), (4, 4, 4, 4, 4)], ids=str)
def test_the_dense_formula(method, ranks):
    updates = layer(ranks, weights=(0.7, 1.3, -1.0, 2.0, 1.0)[: len(ranks)])
    X, kind = rows(updates), METHODS[method].inputs
    other = [x + 0.3 * y for x, y in zip(X, rows(updates, side=1), strict=True)] if kind.run == "merge" else None
    wanted = dense_formula(method, updates, X, read_recipe(method).settings, other)
    assert close(merged(method, updates, X, other), wanted)


def test_zero_interference_is_the_dense_formula_and_its_law():
    updates = layer(weights=(0.7, 1.3, 1.0))
    A = torch.cat(updates.A)
    rowsof = (torch.linalg.inv(A @ A.mT) @ A).split(list(updates.ranks))
    wanted = sum(
        w * D @ a.mT @ r for w, D, a, r in zip(updates.weights, own_updates(updates), updates.A, rowsof, strict=True)
    )
    found = merged("zero-interference", updates, [])
    assert close(found, wanted)
    for w, D, a in zip(updates.weights, own_updates(updates), updates.A, strict=True):
        assert close(found @ a.mT, w * D @ a.mT)


def test_ssr_is_least_squares_of_the_experts_outputs_on_u():
    updates = layer()
    X, A = rows(updates), torch.cat(updates.A)
    u, y = torch.cat([x @ A.mT for x in X]), torch.cat([x @ D.mT for x, D in zip(X, own_updates(updates), strict=True)])
    by_lstsq = torch.linalg.lstsq(u, y).solution.mT @ A
    assert close(merged("ssr", updates, X, ridge=0.0), by_lstsq)


@pytest.mark.parametrize(("method", "neutral"), [("ssr", {"ridge": 0.0}), ("regmean", {}), ("regmean++", {})])
def test_equal_inputs_give_the_plain_mean(method, neutral):
    updates = layer()
    X = rows(updates)[:1] * 3
    assert close(merged(method, updates, X, **neutral), sum(own_updates(updates)) / 3)


@pytest.mark.parametrize(
    ("method", "neutral"), [("ssr", {"ridge": 0.0}), ("regmean", {}), ("iteris", {}), ("featcal", {"p": 1.0, "t": 1.0})]
)
@pytest.mark.parametrize("n", [1, 2, 90])
def test_one_task_is_itself_whatever_its_rows(method, neutral, n):
    """From one row on where a ridge is left; ssr without one needs as many rows as ranks."""
    updates = layer((3,))
    if method == "ssr" and n < 3:
        with pytest.raises(NSCError, match=r"layer: the equations of this merge are singular.*larger ridge"):
            merged(method, updates, rows(updates, n=n), **neutral)
        return
    assert close(merged(method, updates, rows(updates, n=n), **neutral), own_updates(updates)[0], 1e-9)


def test_orthogonal_adapters_are_added_without_interference():
    updates = layer()
    Q = torch.linalg.qr(torch.cat(updates.A).mT)[0].mT
    orthogonal = replace(updates, A=tuple(Q.split(list(updates.ranks))))
    assert close(merged("zero-interference", orthogonal, []), sum(own_updates(orthogonal)))


@pytest.mark.parametrize("method", ["zero-interference", *FROM_ROWS])
def test_another_factoring_of_the_same_updates(method):
    updates = layer()
    X = rows(updates)
    assert close(merged(method, change_basis(updates), X), merged(method, updates, X), 1e-11)


@pytest.mark.parametrize("method", ["zero-interference", *FROM_ROWS])
def test_a_rank_deficient_adapter_is_its_true_row_space(method):
    """A row twice, with its column of B in two parts, and a row of zeros."""
    updates = layer()
    A, B = updates.A[0], updates.B[0]
    doubled = replace(
        updates,
        A=(torch.cat([A, A[:1], 0 * A[:1]]), *updates.A[1:]),
        B=(torch.cat([0.4 * B[:, :1], B[:, 1:], 0.6 * B[:, :1], B[:, :1]], 1), *updates.B[1:]),
    )
    X = rows(updates)
    assert close(merged(method, doubled, X), merged(method, updates, X), 1e-11)


def test_adapters_that_share_directions():
    """As VeRA's do: zero interference has no answer without a ridge; what is made from rows has."""
    updates = layer((3, 3))
    shared = replace(updates, A=(updates.A[0],) * 2)
    with pytest.raises(NSCError, match=r"layer: the equations of this merge are singular.*larger ridge"):
        merged("zero-interference", shared, [])
    for method in ("zero-interference", "ssr"):
        assert merged(method, shared, rows(shared), ridge=1e-3).isfinite().all()
    for method in FROM_ROWS:
        assert merged(method, shared, rows(shared)).isfinite().all()


@from_rows
def test_one_row_of_each_task(method):
    updates = layer()
    X = rows(updates, n=1)
    assert merged(method, updates, X).isfinite().all()


def test_the_ridge_of_regmean_pulls_to_the_mean():
    updates = layer()
    assert close(merged("regmean", updates, rows(updates), ridge=1e9), sum(own_updates(updates)) / 3, 1e-6)


@from_rows
def test_reconstruction_is_the_error_on_the_rows(method):
    updates = layer(weights=(0.7, 1.3, 1.0))
    X, chosen = rows(updates), read_recipe(method)
    kind = chosen.method.inputs
    other = [x + 0.3 * y for x, y in zip(X, rows(updates, side=1), strict=True)] if kind.run == "merge" else X
    known = replace(updates, moments=moments_of(kind, updates, X, other))
    equations = chosen.method.equations(known, chosen.settings)
    solution = solve(equations, "layer")
    D, targets = equations.B @ solution.A, [w * T for w, T in zip(updates.weights, own_updates(updates), strict=True)]
    found = reconstruction(known, solution)
    c = torch.ones(3) if kind.unit == "one" else _units(kind, updates, X, other)
    for scale in (1.0, 1.7):
        errors = [
            unit * (scale * y @ D.mT - x @ T.mT).square().sum(1).mean()
            for unit, x, y, T in zip(c, X, other, targets, strict=True)
        ]
        told = scale**2 * found[:, 0] - 2 * scale * found[:, 1] + found[:, 2]
        wanted = torch.stack(errors) if kind.of == "u" else torch.stack(errors).sum()[None]
        torch.testing.assert_close(told, wanted.to(told), rtol=1e-10, atol=0)
    assert len(found) == (3 if kind.of == "u" else 1)


def _units(kind, updates: Updates, X: list[Tensor], other: list[Tensor]) -> list[Tensor]:
    if kind.unit == "norm":
        return [1 / second(y).norm() for y in other]
    experts = [weight_of(updates.name, updates.shape) + D for D in own_updates(updates)]
    return [W.square().sum() / (x @ W.mT).square().sum(1).mean() for W, x in zip(experts, X, strict=True)]


@pytest.mark.parametrize("T", [1, 5, 20])
def test_few_rows_are_solved_by_woodbury(T):
    """Fewer rows than columns: the same matrix, product, diagonal and solution as of their square."""
    generator = torch.Generator().manual_seed(0)
    few, X = (torch.randn(n, 20, generator=generator, dtype=F64) for n in (T, 3))
    made = [Gram.of(rows=few), Gram.of(few.mT @ few)]
    made = [gram.times(0.9).plus(0.1 * gram.diagonal).ridged(1e-3) for gram in made]
    assert close(made[0].diagonal, made[1].diagonal) and close(made[0].product(X), made[1].product(X))
    by_rows, by_square = (solve(Equations(X.mT, X, gram), "layer") for gram in made)
    assert close(by_rows.A, by_square.A, 1e-11) and by_rows.condition == pytest.approx(by_square.condition)
    with pytest.raises(NSCError, match="singular"):
        solve(Equations(X.mT, X, Gram.of(rows=few)), "layer")


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e9])
def test_the_condition_number_that_is_told(condition):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=F64))[0]
    spectrum = torch.logspace(0, torch.tensor(condition).log10().item(), 40, dtype=F64)
    matrix = (Q * spectrum) @ Q.mT
    told = solve(Equations(torch.eye(3, dtype=F64), torch.ones(3, 40, dtype=F64), Gram.of(matrix)), "layer").condition
    assert 0.5 * condition <= told <= condition * (1 + 1e-6)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("ssr", {"ridge": -1.0}, "ridge must be 0 or more"),
        ("regmean", {"off_diagonal": 1.5}, "off_diagonal"),
        ("iteris", {"rounds": 0}, "rounds must be at least 1"),
        ("featcal", {"p": float("nan")}, "p must be 0 or more"),
    ],
)
def test_settings_that_cannot_be(method, settings, message):
    with pytest.raises(NSCError, match=message):
        read_recipe(method, **settings)
