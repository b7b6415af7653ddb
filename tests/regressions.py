"""Random inputs of layers, their moments the plain way, and each regression by its dense formula, in float64."""

from dataclasses import replace

import torch
from torch import Tensor

from nsc.methods import METHODS, Updates
from nsc.methods.equations import Gram
from nsc.methods.inputs import InputMoments, Inputs, SpanMoments
from nsc.recipes.combination import Combination

ROWS = 90


def inputs_of(layer: str, task: str, d: int, rows: int = ROWS, side: int = 0) -> Tensor:
    """(rows, d) that depend on the names alone, correlated, of unlike magnitudes."""
    seed = sum(map(ord, layer)) + 1009 * sum(map(ord, task)) + side
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    rest = torch.linspace(0.3, 2, d).double() * torch.randn(rows, d, generator=generator, dtype=torch.float64)
    return rest + 0.2 * torch.randn(rows, d, generator=generator, dtype=torch.float64) @ mixing


def weight_of(layer: str, shape: tuple[int, int]) -> Tensor:
    """The base's weight W0."""
    generator = torch.Generator().manual_seed(sum(map(ord, layer)))
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def second(X: Tensor, Y: Tensor | None = None) -> Tensor:
    """E[x y']."""
    return X.mT @ (X if Y is None else Y) / len(X)


def own_updates(updates: Updates) -> list[Tensor]:
    """D_k, dense."""
    return [s * b.double() @ a.double() for s, b, a in zip(updates.scales, updates.B, updates.A, strict=True)]


def units(kind: Inputs, updates: Updates, X: list[Tensor], merged: list[Tensor], W0: Tensor) -> list[Tensor]:
    """c_k."""
    if kind.unit == "norm":
        return [1 / second(y).norm() for y in merged]
    if kind.unit == "one":
        return [torch.ones((), dtype=torch.float64)] * len(X)
    experts = [W0 + D for D in own_updates(updates)]
    return [W.square().sum() / (x @ W.mT).square().sum(1).mean() for W, x in zip(experts, X, strict=True)]


def moments_of(
    kind: Inputs, updates: Updates, X: list[Tensor], merged: list[Tensor] | None = None, W0: Tensor | None = None
) -> SpanMoments | InputMoments:
    """What a collection over these rows gives."""
    A = torch.cat([a.double() for a in updates.A])
    if kind.of == "u":
        return SpanMoments(torch.stack([second(x @ A.mT) for x in X]))
    merged, W0 = merged or X, weight_of(updates.name, updates.shape).to(A) if W0 is None else W0
    c = units(kind, updates, X, merged, W0)
    crosses = [unit * second(x, y) for unit, x, y in zip(c, X, merged, strict=True)]
    seconds = [unit * second(y) for unit, y in zip(c, merged, strict=True)]
    a = [part.double() for part in updates.A]
    return InputMoments(
        Gram.of(sum(seconds)),
        torch.cat([part @ C for part, C in zip(a, crosses, strict=True)]),
        tuple(unit * second(x @ part.mT) for unit, x, part in zip(c, X, a, strict=True)),
        torch.stack([C.diagonal() for C in crosses]),
        torch.tensor([[C.norm(), S.norm()] for C, S in zip(crosses, seconds, strict=True)]).to(A),
    )


def with_rows(combination: Combination) -> Combination:
    """The same, with what random inputs of each layer and task give, where the method needs rows."""
    kind = combination.recipe.method.inputs
    if kind is None:
        return combination
    found = {}
    for name in combination.names:
        updates = combination.updates(name)
        X = [inputs_of(name, task, updates.shape[1]).to(updates.A[0].device) for task in updates.tasks]
        found[name] = combination.solution(name, moments_of(kind, updates, X))[0]
    return combination.with_found(found)


def dense_formula(
    method: str, updates: Updates, X: list[Tensor], settings, merged: list[Tensor] | None = None
) -> Tensor:
    """(m, d) as docs/methods.md defines it, with inverses of matrices as wide as the layer."""
    kind, deltas, d = METHODS[method].inputs, own_updates(updates), updates.shape[1]
    deltas = [w * D for w, D in zip(updates.weights, deltas, strict=True)]
    if method == "ssr":
        rows = torch.cat([torch.linalg.svd(a.double(), full_matrices=False)[2] for a in updates.A])
        G = [second(x @ rows.mT) for x in X]
        total = sum(G)
        total = total + settings.ridge * total.diagonal().mean() * torch.eye(len(total), dtype=torch.float64)
        targets = sum(D @ second(x) @ rows.mT for D, x in zip(deltas, X, strict=True))
        return targets @ torch.linalg.inv(total) @ rows
    merged = merged or X
    c = units(kind, updates, X, merged, weight_of(updates.name, updates.shape))
    eye = torch.eye(d, dtype=torch.float64)
    N, M = [], torch.zeros(d, d, dtype=torch.float64)
    for unit, x, y in zip(c, X, merged, strict=True):
        C, S = second(x, y), second(y)
        if method == "featcal":
            N.append(unit * C + settings.ridge * settings.p * settings.t * eye)
            M += unit * S
        elif method == "iteris":
            N.append(unit * (C + settings.a * C.norm() * eye))
            M += unit * (S + settings.a * S.norm() * eye)
        else:
            N.append(settings.off_diagonal * C + (1 - settings.off_diagonal) * C.diagonal().diag())
            M += N[-1]
    if method == "featcal":
        M = M + settings.ridge * eye
    elif method != "iteris":
        pull = settings.ridge * M.diagonal().mean()
        N, M = [n + pull / len(N) * eye for n in N], M + pull * eye
    return sum(D @ n for D, n in zip(deltas, N, strict=True)) @ torch.linalg.inv(M)


def change_basis(updates: Updates, seed: int = 5) -> Updates:
    """A -> C A, B -> B C^-1 with a random C of each adapter."""
    generator = torch.Generator().manual_seed(seed)
    C = [torch.randn(r, r, generator=generator, dtype=torch.float64) + 2 * torch.eye(r) for r in updates.ranks]
    return replace(
        updates,
        A=tuple(c @ a for c, a in zip(C, updates.A, strict=True)),
        B=tuple(b @ torch.linalg.inv(c) for c, b in zip(C, updates.B, strict=True)),
    )
