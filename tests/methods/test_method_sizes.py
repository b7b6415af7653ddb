"""No method decomposes anything as wide as a layer, and none that has factors makes a dense update of them.

Least squares on a layer's inputs are as wide as the layer by definition; ``WIDE_INPUTS`` are those methods. So is the
SVD of what TIES makes of dense updates, ``DENSE_SVD``.
"""

from functools import cache

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsc.methods import LowRank
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe
from tests.methods.test_method_laws import NAMES, layers, recipe
from tests.regressions import inputs_of, moments_of

DECOMPOSITIONS = ("svd", "eig", "linalg_qr", "geqrf", "cholesky", "solve", "inv_ex")
WIDE = {"wide": (1200, 800)}
R = 12
DENSE_SVD = "ties, isotropized"  # of a matrix that has no factors
WIDE_INPUTS = ("regmean", "regmean++", "iteris", "featcal")
everyone = pytest.mark.parametrize("name", [name for name in NAMES if name not in WIDE_INPUTS])


class Largest(TorchDispatchMode):
    """The most entries of any tensor that is made, and the shapes that go into decompositions."""

    def __init__(self) -> None:
        super().__init__()
        self.entries, self.decomposed = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.entries = max([self.entries, *(x.numel() for x in tree_leaves(made) if isinstance(x, Tensor))])
        name = func.__name__.split(".")[0]
        if any(word in name for word in DECOMPOSITIONS):
            self.decomposed.append((name, tuple(args[0].shape[-2:])))
        return made


@cache
def seen(name: str) -> tuple[Largest, LowRank | Tensor]:
    combination = Combination(stack_of(layers(shapes=WIDE)), recipe(name))
    updates, kind = combination.updates("wide"), combination.recipe.method.inputs
    moments = kind and moments_of(kind, updates, [inputs_of("wide", task, WIDE["wide"][1]) for task in updates.tasks])
    with Largest() as largest:
        update = combination.solution("wide", moments)[0] if moments else combination.update("wide")
    return largest, update


@everyone
def test_no_decomposition_of_anything_d_sized(name):
    """A QR of stacked factors is as tall as the layer; everything else is R x R at most."""
    for decomposition, (p, q) in seen(name)[0].decomposed:
        if name == DENSE_SVD:
            assert (p, q) == WIDE["wide"]
            continue
        assert (min if "linalg_qr" in decomposition else max)(p, q) <= R, (decomposition, p, q)


ENTRIES = ("ties", "dare", "dare-ties", "emr", "fr", DENSE_SVD)  # element-wise on the dense update


@everyone
def test_no_dense_update_where_factors_suffice(name):
    largest, update = seen(name)
    if name in ENTRIES:
        assert update.shape == WIDE["wide"]
    else:
        assert isinstance(update, LowRank) and len(update.A) <= R
        assert largest.entries < 1200 * 800 / 4


def test_a_threshold_of_the_whole_model_is_found_layer_by_layer():
    shapes = {"one": (500, 400), "two": (400, 500), "three": (500, 400)}
    combination = Combination(stack_of(layers(shapes=shapes)), read_recipe("ties", scope="model"))
    with Largest() as largest:
        for layer in combination.names:
            combination.update(layer)
    assert largest.entries == 3 * 500 * 400


def test_decompositions_are_seen():
    with Largest() as largest:
        torch.linalg.svd(torch.randn(30, 20))
        torch.linalg.svdvals(torch.randn(3, 2))
        torch.linalg.qr(torch.randn(7, 5))
        torch.linalg.eigh(torch.eye(6))
    assert [shape for _, shape in largest.decomposed] == [(30, 20), (3, 2), (7, 5), (6, 6)]
    assert largest.entries == 900
