"""TSV-M, CART, Iso-C, Iso-CTS, truncated SVD, isotropisation: the originals' values, laws, what has no answer."""

import re
from dataclasses import replace

import pytest
import torch

from nsc.errors import NSCError
from nsc.methods import METHODS, Updates
from nsc.methods.spectral import isotropize
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import cases
from tests.recipes.test_spaces import SHAPES, factors, merged, random_vera, require_translated, total

EXACT = {"rtol": 0, "atol": 1e-9}
RECIPES = {
    "tsv": {},
    "core-tsv": {},
    "cart": {},
    "core-cart": {},
    "iso-c": {},
    "iso-cts": {},
    "svd": {"rank": 5},
    "core-task-arithmetic": {"isotropize": True},
    "knots-task-arithmetic": {},
}
every = pytest.mark.parametrize("method, settings", RECIPES.items(), ids=RECIPES)


def translated(case: dict) -> tuple[str, dict]:
    """An original's choices in ours."""
    name, hyper = case["case"].removeprefix("fb_"), case["hyper"]
    if name.startswith("tsv_"):
        return "tsv", {"scale": hyper.get("alpha", 1.0)}
    if name.startswith("iso_"):
        common = {"common": hyper["common_space_fraction"]} if "common_space_fraction" in hyper else {}
        return ("iso-cts" if name.startswith("iso_cts") else "iso-c"), {"scale": hyper.get("alpha", 1.0), **common}
    if name.startswith("cart_"):
        return "cart", {"ratio": hyper["initial_rank_ratio"], "prior": hyper["prior"]}
    if name.startswith("peft_svd_"):  # at scale 1, for PEFT applies another twice
        weights = {f"task{k}": w for k, w in enumerate(hyper["weights"])}
        return "svd", {"rank": hyper["svd_rank"], "weights": weights, "split": "B"}
    share = 1 / len(case["ranks"]) if hyper["merging_type"] == "mean" else 1.0
    weights = {f"task{k}": share for k in range(len(case["ranks"]))}
    return "svd", {"rank": sum(case["ranks"]), "weights": weights, "scale": hyper["scaling_factor"]}


GOLDENS = [c for c in cases("tsv_", "iso_", "fb_iso_", "cart_", "peft_svd_", "nsc_svd_") if not c["id"].count("_alpha")]


@pytest.mark.parametrize("case", GOLDENS, ids=lambda c: c["id"])
def test_goldens(case):
    require_translated(case, *translated(case))


def with_parts(updates: Updates, A: list, B: list) -> Updates:
    return replace(updates, A=tuple(A), B=tuple(B))


def regauged(updates: Updates) -> Updates:
    """(A, B) -> (G A, B G^-1): every D_k as it was."""
    draw = torch.Generator().manual_seed(5)
    G = [torch.randn(len(a), len(a), generator=draw, dtype=a.dtype) + 4 * torch.eye(len(a)) for a in updates.A]
    return with_parts(
        updates,
        [g @ a for g, a in zip(G, updates.A, strict=True)],
        [b @ torch.linalg.inv(g) for g, b in zip(G, updates.B, strict=True)],
    )


def reordered(updates: Updates) -> Updates:
    fields = ("tasks", "A", "B", "scales", "weights")
    return replace(updates, **{name: getattr(updates, name)[::-1] for name in fields})


@every
@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 6), (4, 0, 3)], ids=str)
def test_only_the_updates_count_not_how_they_are_factored_nor_their_order(method, settings, ranks):
    updates = factors((30, 24), ranks)
    plain = merged(method, updates, **settings)
    torch.testing.assert_close(merged(method, regauged(updates), **settings), plain, **EXACT)
    torch.testing.assert_close(merged(method, reordered(updates), **settings), plain, **EXACT)


@every
def test_signs_of_singular_vectors_are_arbitrary(method, settings, monkeypatch):
    updates = factors((30, 24), (2, 4, 6))
    plain = merged(method, updates, **settings)
    svd, draw, flipped = torch.linalg.svd, torch.Generator().manual_seed(0), []

    def other(matrix, full_matrices=True):
        U, S, Vh = svd(matrix, full_matrices=full_matrices)
        signs = torch.randint(2, S.shape, generator=draw) * 2.0 - 1
        flipped.append(bool((signs < 0).any()))
        return U * signs[..., None, :], S, signs[..., None] * Vh

    monkeypatch.setattr(torch.linalg, "svd", other)
    torch.testing.assert_close(merged(method, updates, **settings), plain, **EXACT)
    assert any(flipped)


@every
def test_nothing_as_wide_as_the_layer_is_decomposed(method, settings, monkeypatch):
    updates, seen, svd = factors((300, 200), (4, 2, 6)), [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda x, **kw: seen.append(max(x.shape)) or svd(x, **kw))
    merged(method, updates, **settings)
    assert seen and max(seen) <= 12


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_few_digits_are_not_taken_for_singular(method, settings, dtype):
    spread = torch.logspace(0, -3, 8, dtype=torch.float64)
    wide = factors((200, 160), (8,) * 3)
    updates = with_parts(wide, [a.to(dtype) for a in wide.A], [(b * spread).to(dtype) for b in wide.B])
    exact = with_parts(updates, [a.double() for a in updates.A], [b.double() for b in updates.B])
    torch.testing.assert_close(merged(method, updates, **settings), merged(method, exact, **settings), **EXACT)


ALONE = [
    *((method, ranks) for method in ("tsv", "core-tsv", "svd") for ranks in ((4,), (14,), (4, 0, 0))),
    *((method, ranks) for method in ("cart", "core-cart") for ranks in ((4,), (14,))),  # its mean is over all tasks
]


@pytest.mark.parametrize("method, ranks", ALONE, ids=str)
def test_one_task_of_weight_1_is_itself(method, ranks):
    updates = replace(factors((12, 30), ranks), weights=(1.0,) * len(ranks))
    torch.testing.assert_close(merged(method, updates), total(updates), **EXACT)


@pytest.mark.parametrize("ranks", [(4, 4, 4), (5, 0, 5)], ids=str)
def test_tsv_of_true_directions_is_tsv_in_core_space_at_equal_ranks(ranks):
    updates = factors((30, 24), ranks)
    torch.testing.assert_close(merged("tsv", updates), merged("core-tsv", updates), **EXACT)


def weighted(updates: Updates) -> torch.Tensor:
    """(K, m, d): w_k D_k."""
    return updates.deltas() * torch.tensor(updates.weights, dtype=torch.float64)[:, None, None]


def dense_tsv(deltas: torch.Tensor, counts: list[int]) -> torch.Tensor:
    """The equation, by dense decompositions."""
    parts = [torch.linalg.svd(D, full_matrices=False) for D in deltas]
    U = torch.cat([p.U[:, :n] for p, n in zip(parts, counts, strict=True)], 1)
    S = torch.cat([p.S[:n] for p, n in zip(parts, counts, strict=True)])
    V = torch.cat([p.Vh[:n] for p, n in zip(parts, counts, strict=True)])
    polar = [(p := torch.linalg.svd(side, full_matrices=False)).U @ p.Vh for side in (U, V)]
    return polar[0] * S @ polar[1]


@pytest.mark.parametrize(
    "method, ranks, counts",
    [
        ("tsv", (2, 4, 6), [2, 4, 6]),
        ("core-tsv", (2, 4, 6), [2, 4, 4]),
        ("tsv", (12, 12, 3), [8, 8, 3]),
        ("core-tsv", (6, 0, 2), [4, 0, 2]),
    ],
)
def test_tsv_takes_true_directions_only(method, ranks, counts):
    updates = factors((30, 24), ranks)
    deltas = weighted(updates)
    torch.testing.assert_close(merged(method, updates), dense_tsv(deltas, counts), **EXACT)


@pytest.mark.parametrize("shape, ranks", SHAPES.values(), ids=SHAPES)
def test_cart_and_svd_are_what_dense_decompositions_give(shape, ranks):
    updates = replace(factors(shape, ranks), weights=(1.0, 0.5, 2.0)[: len(ranks)])
    deltas = weighted(updates)

    def cut(D, rank):
        U, S, Vh = torch.linalg.svd(D, full_matrices=False)
        return U[:, :rank] * S[:rank] @ Vh[:rank]

    mean, size = deltas.mean(0), min(*shape, sum(ranks))
    full = mean + 2 * sum(cut(D - mean, int(0.2 * min(shape))) for D in deltas)
    torch.testing.assert_close(merged("cart", updates, ratio=0.2), full, **EXACT)
    core = mean + 0.1 * sum(cut(D - mean, -int(-0.3 * size // 1)) for D in deltas)
    torch.testing.assert_close(merged("core-cart", updates, ratio=0.3), core, **EXACT)
    for split in ("sqrt", "B"):
        truncated = merged("svd", updates, rank=3, split=split, scale=0.3)
        torch.testing.assert_close(truncated, 0.3 * cut(deltas.sum(0), 3), **EXACT)
    torch.testing.assert_close(merged("svd", updates, rank=99), total(updates), **EXACT)


def test_isotropic_merges_have_one_singular_value():
    updates = factors((30, 24), (2, 4, 6))
    S = torch.linalg.svdvals(total(updates))[:12]
    for method, settings in {"iso-c": {}, "task-arithmetic": {"isotropize": True}}.items():
        parts = torch.linalg.svd(merged(method, updates, **settings))
        torch.testing.assert_close(parts.S[:12], S.mean().expand(12), **EXACT)
        assert parts.S[12] < 1e-12
    torch.testing.assert_close(
        merged("iso-c", updates, scale=3.0),
        merged("core-task-arithmetic", updates, isotropize=True, scale=3.0),
        **EXACT,
    )
    own = torch.linalg.svdvals(merged("iso-cts", updates))
    torch.testing.assert_close(own[:12], own[:1].expand(12), **EXACT)
    torch.testing.assert_close(merged("iso-cts", updates, common=1.0), merged("iso-c", updates), **EXACT)


@pytest.mark.parametrize("method", ["ties", "dare-ties", "cart"])
def test_a_method_in_full_space_made_isotropic(method):
    """In float64: all singular values of what it makes become their mean; not the same as in Core Space."""
    updates = factors((30, 24), (8, 8, 8))
    settings = {"ties": {"density": 0.5}, "dare-ties": {"drop": 0.5}}.get(method, {})
    U, S, Vh = torch.linalg.svd(merged(method, updates, **settings), full_matrices=False)
    expected = 0.3 * S.mean() * U @ Vh
    found = merged(method, updates, isotropize=True, scale=0.3, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12 * expected.abs().max().item())
    other = merged(f"core-{method}", updates, isotropize=True, scale=0.3, **settings)
    assert (other - expected).abs().max() > 1e-3 or method == "cart"
    stored = replace(updates, A=tuple(a.float() for a in updates.A), B=tuple(b.float() for b in updates.B))
    assert merged(method, stored, isotropize=True, **settings).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ties_that_is_singular_is_not_made_isotropic(dtype):
    """A lone adapter of which nothing is trimmed, or one so trimmed that a row is zero."""
    alone = factors((30, 24), (4,), dtype=dtype)
    with pytest.raises(NSCError, match=re.escape("singular (rank 4 of 24)")):
        merged("ties", alone, density=1.0, isotropize=True)
    with pytest.raises(NSCError, match="singular"):
        merged("ties", factors((30, 24), (8, 8, 8), dtype=dtype), density=0.01, isotropize=True)


def test_a_task_of_weight_0_takes_no_slots():
    updates = factors((30, 24), (4, 4, 4))
    without = replace(updates, weights=(1.0, 0.0, 0.4))
    (A0, A1, A2), (B0, B1, B2) = updates.A, updates.B
    left = with_parts(updates, [A0, A1[:0], A2], [B0, B1[:, :0], B2])
    torch.testing.assert_close(merged("core-tsv", without), merged("core-tsv", left), **EXACT)
    nothing = replace(updates, weights=(0.0,) * 3)
    for method, settings in RECIPES.items():
        assert not merged(method, nothing, **settings).any()


def twice(updates: Updates) -> Updates:
    """The first adapter instead of the second."""
    return with_parts(updates, [updates.A[0], *updates.A[::2]], [updates.B[0], *updates.B[::2]])


DEPENDENT = {
    "VeRA": random_vera(),
    "VeRA in float32": random_vera(dtype=torch.float32),
    "an adapter twice": twice(factors((30, 24), (4, 4, 4))),
    "an adapter twice, in float32": twice(factors((30, 24), (4, 4, 4), dtype=torch.float32)),
    "an adapter twice, factored otherwise": regauged(twice(factors((30, 24), (4, 4, 4)))),
}


@pytest.mark.parametrize("updates", DEPENDENT.values(), ids=DEPENDENT)
@pytest.mark.parametrize("method", ["tsv", "core-tsv"])
def test_tsv_refuses_dependent_directions(method, updates):
    with pytest.raises(NSCError, match=r"layer: tsv .* linearly dependent.*Leave out .* take cart"):
        merged(method, updates)


@pytest.mark.parametrize("updates", DEPENDENT.values(), ids=DEPENDENT)
def test_a_singular_matrix_is_not_made_isotropic(updates):
    for method in ("iso-c", "iso-cts"):
        with pytest.raises(NSCError, match=r"layer: .* singular \(rank \d+ of \d+\).*take task-arithmetic"):
            merged(method, updates)
    for method in ("core-task-arithmetic", "task-arithmetic", "core-cart"):
        with pytest.raises(NSCError, match="singular"):
            merged(method, updates, isotropize=True)


def test_a_trimmed_core_is_not_made_isotropic():
    updates = factors((30, 24), (4, 4, 4))
    matrix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0))
    matrix[3] = 0
    with pytest.raises(NSCError, match=re.escape("singular (rank 11 of 12)")):
        isotropize(matrix, updates.layer_info(12))
    if "ties" in METHODS:
        with pytest.raises(NSCError, match="singular"):
            merged("core-ties", updates, density=0.02, isotropize=True)


def test_iso_cts_refuses_a_direction_of_a_task_among_the_common_ones():
    one = torch.zeros(4, 4, dtype=torch.float64)
    one[2, 0] = 5  # of its own on the left, but on the right the sum's first
    other = torch.diag(torch.arange(4.0, 0, -1, dtype=torch.float64)) - one
    B, A = [one[:, :1].clone(), torch.eye(4, dtype=torch.float64)], [torch.eye(1, 4, dtype=torch.float64), other]
    updates = Updates("layer", ("a", "b"), tuple(A), tuple(B), (1.0, 1.0), (1.0, 1.0))
    assert merged("iso-c", updates).any()
    with pytest.raises(NSCError, match=r"layer: iso-cts .* linearly dependent"):
        merged("iso-cts", updates, common=0.5)


@pytest.mark.parametrize(
    "method, settings, message",
    [
        ("cart", {"ratio": 12.0}, "ratio must be a fraction above 0 and at most 1, not 12.0; percent is not taken"),
        ("cart", {"ratio": 0.0}, "ratio must be"),
        ("cart", {"rounding": "even"}, "rounding must be one of down, up, not even"),
        ("iso-cts", {"common": 80}, "common must be a fraction above 0 and at most 1, not 80"),
        ("svd", {"rank": 0}, "rank must be at least 1, not 0"),
        ("svd", {"split": "A"}, "split must be one of sqrt, B, not A"),
        ("svd", {"isotropize": True}, "it needs the core space"),
    ],
)
def test_settings_that_cannot_be(method, settings, message):
    with pytest.raises(NSCError, match=re.escape(message)):
        read_recipe(method, **settings)
