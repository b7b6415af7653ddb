"""Beside PEFT's own ``add_weighted_adapter``: where both agree, and where PEFT is wrong and what is right.

PEFT 0.15 (and 5d602fd, of which the goldens are) has faults that 0.21 does not have any more; what is asserted of PEFT
is either of both behaviours, and of ours always the right one.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import pytest
import torch
from peft.utils import merge_utils
from torch import Tensor, nn

from nsc.adapters.lora import read_adapter
from nsc.methods import Updates
from nsc.recipes.combination import Combination, stack_of
from nsc.recipes.spec import read_recipe
from tests.merging_goldens import dense

NAMES = ("mnli", "qnli", "snli")
PLAIN = [dict(r=4, lora_alpha=8), dict(r=4, lora_alpha=16), dict(r=4, lora_alpha=4)]  # s_k = 2, 4, 1
SCALES = (2.0, 4.0, 1.0)


class Layer(NamedTuple):
    """One linear layer in PEFT, and the same adapters as nsc reads them from what PEFT saved."""

    model: peft.PeftModel
    lora: nn.Module
    updates: Updates

    def peft(self, combination: str, weights: Sequence[float] = (1.0, 1.0, 1.0), **more) -> Tensor:
        """(m, d): of the adapter that PEFT makes."""
        name = f"merged{len(self.model.peft_config)}"
        self.model.add_weighted_adapter(list(self.updates.tasks), list(weights), name, combination, **more)
        return self.lora.get_delta_weight(name)

    def ours(self, method: str, weights: Sequence[float] = (1.0, 1.0, 1.0), **settings) -> Tensor:
        """(m, d)."""
        of = dict(zip(self.updates.tasks, map(float, weights), strict=False))
        recipe = read_recipe(method, weights=of, **settings)
        return dense(Combination(stack_of({"0": self.updates}), recipe).update("0"))

    def deltas(self) -> list[Tensor]:
        """D_k by PEFT."""
        return [self.lora.get_delta_weight(name) for name in self.updates.tasks]


@pytest.fixture
def layer(tmp_path):
    def make(configs: Sequence[dict], gauge: float = 1.0) -> Layer:
        torch.manual_seed(0)
        base, model = nn.Sequential(nn.Linear(20, 12, bias=False)).double(), None
        for name, config in zip(NAMES, configs, strict=False):
            lora = peft.LoraConfig(target_modules=["0"], **config)
            model = peft.get_peft_model(base, lora, name) if model is None else model
            if name not in model.peft_config:
                model.add_adapter(name, lora)
        assert model is not None
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64)
        base[0].lora_A["mnli"].weight.data *= gauge
        base[0].lora_B["mnli"].weight.data /= gauge
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        model.save_pretrained(str(folder))
        return Layer(model, base[0], as_read(folder, NAMES[: len(configs)]))

    return make


def as_read(folder: Path, names: Sequence[str]) -> Updates:
    factors = [read_adapter(folder / name).factors["0"] for name in names]
    A, B, scales = zip(*((f.A, f.B, f.scale) for f in factors), strict=True)
    return Updates("0", tuple(names), A, B, scales, (1.0,) * len(names))


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return bool((actual - expected).abs().max() <= tolerance * expected.abs().max())


def test_the_updates_are_the_same(layer):
    given = layer(PLAIN)
    assert given.updates.scales == SCALES
    assert all(close(ours, theirs) for ours, theirs in zip(given.updates.deltas(), given.deltas(), strict=True))


@pytest.mark.parametrize("ranks", [(4, 4, 4), (2, 4, 6)])
def test_cat_is_task_arithmetic(layer, ranks):
    given = layer([dict(r=r, lora_alpha=7) for r in ranks])
    weights = (1.0, -0.5, 0.25)
    ours = given.ours("task-arithmetic", weights)
    assert close(ours, given.peft("cat", weights))
    assert close(ours, merge_utils.task_arithmetic(given.deltas(), torch.tensor(weights, dtype=torch.float64)))


def test_linear_is_linear(layer):
    given = layer(PLAIN)
    for weights in ((1.0, 1.0, 1.0), (0.5, 0.3, 0.2)):
        assert close(given.ours("linear", weights), given.peft("linear", weights), 1e-6)  # its roots are float32


def test_linear_with_a_negative_weight(layer):
    """PEFT 0.15 takes the root of a negative number."""
    given, weights = layer(PLAIN), (1.0, -0.5, 0.25)
    A, B = given.updates.A, given.updates.B
    right = (2**0.5 * B[0] + 2**0.5 * B[1] + 0.5 * B[2]) @ (2**0.5 * A[0] - 2**0.5 * A[1] + 0.5 * A[2])
    assert close(given.ours("linear", weights), right)
    try:
        assert close(given.peft("linear", weights), right, 1e-6)
    except ValueError as error:
        assert "math domain" in str(error)


def test_svd_counts_the_scale_once(layer):
    """PEFT 0.15: sum_k s_k^2 B_k A_k, for get_delta_weight has s_k in it and the weight had it again."""
    given = layer(PLAIN)
    once = sum(given.deltas())
    twice = sum(s * delta for s, delta in zip(SCALES, given.deltas(), strict=True))
    assert close(given.ours("svd", rank=12), once) and close(given.ours("task-arithmetic"), once)
    theirs = given.peft("svd", svd_rank=12)
    assert close(theirs, once, 1e-6) or close(theirs, twice, 1e-6)
    assert not close(once, twice, 0.1)


FUNCTIONS = {
    "ties_svd": (merge_utils.ties, dict(density=0.5), "ties", dict(preset="peft", density=0.5)),
    "dare_linear_svd": (merge_utils.dare_linear, dict(density=1.0), "dare", dict(drop=0.0)),
    "dare_ties_svd": (merge_utils.dare_ties, dict(density=1.0), "dare-ties", dict(preset="peft", drop=0.0)),
}


@pytest.mark.parametrize("combination", FUNCTIONS)
def test_every_svd_type_counts_the_scale_once(layer, combination):
    """PEFT's own function of dense updates, with weights 1, is ours; its adapter is that, or by weights s_k in 0.15."""
    given = layer(PLAIN)
    function, more, method, settings = FUNCTIONS[combination]
    once, twice = (function(given.deltas(), torch.tensor(w, dtype=torch.float64), **more) for w in ((1.0,) * 3, SCALES))
    assert close(given.ours(method, **settings), once)
    theirs = given.peft(combination, svd_rank=12, **more)
    assert close(theirs, once, 1e-6) or close(theirs, twice, 1e-6)
    assert not close(once, twice, 0.1)


def test_what_dare_keeps_is_enlarged(layer):
    """PEFT 0.15 divides by the density and throws the result away."""
    given = layer(PLAIN[:1])
    (delta,) = given.deltas()
    ours = given.ours("dare", drop=0.5)
    assert ((ours == 0) | ((ours - 2 * delta).abs() < 1e-10)).all() and (ours != 0).any()
    theirs = merge_utils.dare_linear([delta], torch.ones(1, dtype=torch.float64), density=0.5)
    gain = (theirs / delta)[theirs != 0]
    assert any(torch.allclose(gain, torch.full_like(gain, right_or_wrong)) for right_or_wrong in (2.0, 1.0))


@pytest.mark.parametrize(
    ("config", "scale", "factor"),
    [
        (dict(lora_alpha=4, use_rslora=True), 2, 2),
        (dict(lora_alpha=6, use_rslora=True), 3, 2),
        (dict(lora_alpha=8, alpha_pattern={"0": 12}), 3, 3),
    ],
    ids=str,
)
def test_one_adapter_of_weight_one_is_itself(layer, config, scale, factor):
    """PEFT's merged adapter inherits use_rslora, so its scale is r / sqrt(r) where it should be 1.

    In 0.15 it inherits alpha_pattern and rank_pattern as well.
    """
    given = layer([dict(r=4, **config)])
    (right,) = given.deltas()
    assert given.updates.scales == (scale,)
    assert close(given.ours("linear"), right) and close(given.ours("task-arithmetic"), right)
    theirs = given.peft("linear", [1.0])
    assert close(theirs, right, 1e-6) or close(theirs, factor * right, 1e-6)


@pytest.mark.parametrize(("combination", "method", "rank"), [("cat", "task-arithmetic", 8), ("linear", "linear", 4)])
def test_which_adapter_comes_first_does_not_matter(layer, combination, method, rank):
    """In PEFT the scale of the whole merge depends on whether the first adapter is an rsLoRA."""
    configs = [dict(r=4, lora_alpha=4, use_rslora=True), dict(r=4, lora_alpha=4)]
    first, last = layer(configs), layer(configs[::-1])
    right = first.ours(method)
    theirs = first.peft(combination)
    assert close(theirs, right, 1e-6) or close(theirs, math.sqrt(rank) * right, 1e-6)
    assert close(last.peft(combination), last.ours(method), 1e-6)


def test_ties_is_of_updates_and_not_of_their_factors(layer):
    """PEFT's "ties" trims and elects in A and in B; rescaling one against the other changes it, and no update."""
    given, gauged = layer(PLAIN), layer(PLAIN, gauge=10.0)
    assert all(close(x, y) for x, y in zip(given.deltas(), gauged.deltas(), strict=True))
    theirs, theirs_gauged = (g.peft("ties", density=0.5) for g in (given, gauged))
    roots = torch.tensor(SCALES, dtype=torch.float64).sqrt()
    A, B = (merge_utils.ties(list(side), roots, 0.5) for side in (given.updates.A, given.updates.B))
    assert close(theirs, B @ A, 1e-6)
    ours, ours_gauged = (g.ours("ties", preset="peft", density=0.5) for g in (given, gauged))
    assert close(ours, merge_utils.ties(given.deltas(), torch.ones(3, dtype=torch.float64), 0.5))
    assert close(ours, ours_gauged) and not close(theirs, theirs_gauged, 0.1) and not close(theirs, ours, 0.1)
