"""AIM after every method, against the formula on what the method itself gives."""

import pytest
import torch
from torch import Tensor

from nsc.errors import NSCError
from nsc.methods.aim import relaxed
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import dense
from tests.methods.test_method_laws import NAMES, layers, merge, recipe
from tests.regressions import with_rows


def magnitudes(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(updates.shape[1], generator=generator, dtype=torch.float64) * 3
        for name, updates in layers().items()
    }


def relaxed_merge(name: str, aim: float, given: dict[str, Tensor], **settings) -> list[Tensor]:
    combination = with_rows(Combination(stack_of(layers()), recipe(name, aim=aim, **settings)))
    combination = combination.with_magnitudes(given)
    return [dense(combination.update(layer)) for layer in combination.names]


@pytest.mark.parametrize("name", NAMES)
def test_each_column_of_every_method_is_relaxed(name):
    """D diag(1 - a (1 - omega)), after the scale or before it."""
    given = magnitudes()
    for D, bare, a in zip(
        relaxed_merge(name, 0.4, given, scale=0.3), merge(layers(), name), given.values(), strict=True
    ):
        expected = 0.3 * bare @ torch.diag(1 - (1 - 0.4) * a / a.max())
        torch.testing.assert_close(D, expected, rtol=0, atol=1e-12 * expected.abs().max().item())


def test_its_ends():
    """1 changes nothing; with 0 the column of the largest input is the base's; the size of all does not count."""
    given, (bare, _) = magnitudes(), merge(layers(), "ties")
    assert torch.equal(relaxed_merge("ties", 1.0, given)[0], bare)
    none = relaxed_merge("ties", 0.0, given)[0]
    largest = given["first"].argmax()
    assert bare[:, largest].any() and not none[:, largest].any() and none.any()
    larger = {name: 1e4 * x for name, x in given.items()}
    torch.testing.assert_close(relaxed_merge("ties", 0.4, larger), relaxed_merge("ties", 0.4, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_that_are_always_zero_relax_nothing(dtype):
    update = torch.randn(3, 4, dtype=dtype)
    found = relaxed(update, torch.zeros(4, dtype=torch.float64), 0.4)
    assert torch.equal(found, update) and found.dtype == dtype


def test_without_rows_it_is_refused():
    combination = Combination(stack_of(layers()), read_recipe("ties", aim=0.4))
    with pytest.raises(NSCError, match="aim is measured on rows, and there are none for first: give --data"):
        combination.update("first")
    assert read_recipe("ties", aim=0.4).needs_rows and not read_recipe("ties").needs_rows
