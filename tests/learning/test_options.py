"""Every option of what is learned, in float64 against a plain computation: loss, gradient, and five steps."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from nsc.adapters.stack import by_rank, whitened
from nsc.bases.heads import Head
from nsc.config import MergeConfig
from nsc.learning.assembly import prepared
from nsc.learning.entropy import Entropy
from nsc.learning.loop import learn
from nsc.learning.objective import sample_quantiles
from nsc.learning.passes import share_out
from tests.learning.test_exactness import AFTER, SINGLE, START, adapted, linears_by_block, llama, token_batches
from tests.plain_options import Plain, plain_learning, plain_loss
from tests.tape import TapeRecorder

LR, STEPS = 1e-2, 5
TASKS = ("a", "b", "c")


@dataclass(frozen=True)
class Option:
    """settings: of MergeConfig.  how: the plain loss.  entropy: "own" heads, one for all, or none."""

    settings: dict[str, Any]
    how: Plain = field(default_factory=Plain)
    heads: str = ""
    theta: dict[str, Any] = field(default_factory=dict)  # settings that plain_learning takes too


def moved(**settings: Any) -> Option:
    """An option of how coefficients are made of the parameter, or of how that moves; the loss is the usual one."""
    return Option(settings, theta=settings)


THIRDS, ONES = (1 / 3,) * 3, (1.0,) * 3
OPTIONS = {
    **{f"link {link}": moved(link=link) for link in ("softplus", "sigmoid", "exp", "softmax")},
    **{
        f"a coefficient a task, {link}": moved(granularity="task", link=link) for link in ("identity", "exp", "softmax")
    },
    **{
        f"link {link}, bounded": moved(link=link, max_drift=0.02) for link in ("identity", "softplus", "sigmoid", "exp")
    },
    "a coefficient a rank row": moved(granularity="rank"),
    "a coefficient a rank row, sigmoid": moved(granularity="rank", link="sigmoid"),
    "gradient descent": moved(optimizer="sgd"),
    **{f"weight decay of {name}": moved(optimizer=name, weight_decay=0.5) for name in ("adamw", "adam", "sgd")},
    **{f"schedule {name}": moved(schedule=name) for name in ("linear", "cosine")},
    "cosine of gradient descent, exp": moved(schedule="cosine", optimizer="sgd", link="exp"),
    "preferences": Option({"preferences": {"a": 3, "c": 0.5}}, Plain((3 / 4.5, 1 / 4.5, 0.5 / 4.5))),
    "a task without data": Option({"unseen": ("b",)}, Plain((0.5, 0, 0.5))),
    "median over tokens": Option({"quantile": 0.5}, Plain(quantile=0.5)),
    "90 % of tokens": Option({"quantile": 0.9}, Plain(quantile=0.9)),
    "entropy": Option({"objective": "entropy"}, Plain((0, 0, 0), entropies=ONES), "own"),
    "entropy over one vocabulary": Option({"objective": "entropy"}, Plain((0, 0, 0), entropies=ONES), "one"),
    "both": Option({"objective": "both"}, Plain(entropies=ONES), "own"),
    "both, all that counts": Option({"objective": "both"}, Plain(entropies=ONES, all_rows=True), "one"),
    "entropy, summed over all that counts": Option(
        {"objective": "entropy", "reduction": "sum"},
        Plain((0, 0, 0), entropies=ONES, all_rows=True, summed=True),
        "own",
    ),
    "both, preferences, quantile, by rank, softplus": Option(
        {"objective": "both", "preferences": {"b": 0}, "quantile": 0.3, "granularity": "rank", "link": "softplus"},
        Plain((0.5, 0, 0.5), quantile=0.3, entropies=(1.5, 0, 1.5)),
        "own",
        {"granularity": "rank", "link": "softplus"},
    ),
}
SCHEDULED = [name for name, option in OPTIONS.items() if "schedule" in option.settings]
LOSSES = [name for name, option in OPTIONS.items() if not option.theta or "rank" in name]


def heads(kind: str, width: int = 32) -> list[tuple[Tensor, Tensor | None]]:
    """Of each task other classes, or one for all."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(n, width, dtype=torch.float64, generator=generator) for n in (3, 2, 5)]
    return [(made[0], None)] * 3 if kind == "one" else [(weight, weight[:, 0]) for weight in made]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    model = llama()
    targets = [linears_by_block(model)[block][2] for block in (2, 3)]
    return model, adapted(model, tmp_path_factory.mktemp("adapters")), targets


@pytest.fixture(scope="module")
def expected(parts):
    """What the plain computation finds for an option, once."""
    model, stack, targets = parts
    (batch,) = token_batches("alone")
    known: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def of(name: str) -> tuple[Tensor, Tensor, Tensor]:
        if name not in known:
            option = OPTIONS[name]
            how = replace(option.how, heads=heads(option.heads)) if option.heads else option.how
            mine = by_rank(stack) if option.settings.get("granularity") == "rank" else stack
            loss = partial(plain_loss, model, mine, batch=batch, targets=targets, how=how)
            columns = 10 if mine.by_rank else 3
            known[name] = plain_learning(loss, mine, START, LR, STEPS, columns, **option.theta)
        return known[name]

    return of


def entropy_of_option(option: Option) -> Entropy | None:
    rows = "counted" if option.how.all_rows else "last"
    reduction = "sum" if option.how.summed else "mean"
    return Entropy([Head(*head) for head in heads(option.heads)], rows, reduction) if option.heads else None


def found(parts, name: str, rows: str = "alone", ranks: int = 1, **config: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradient of one step, as ``learn`` prepares it, and then ``learn`` itself."""
    model, stack, targets = parts
    option, batches = OPTIONS[name], token_batches(rows)
    stack = whitened(by_rank(stack) if option.settings.get("granularity") == "rank" else stack)
    settings = {"layers": "factors", "max_drift": None, **option.settings, **config}
    run = MergeConfig(steps=STEPS, lr=LR, start=START, **settings)
    entropy = entropy_of_option(option)
    with prepared(model, stack, targets, batches, run, output=entropy) as (state, passes):
        passes.tokens = run.tokens_per_pass
        for share in share_out(batches, ranks):
            passes.gradient(share)
        loss, gradient = state.loss.clone(), state.theta.grad.clone()
        torch.testing.assert_close(state.lam, torch.full_like(state.lam, START), **SINGLE)
    learned = learn(model, stack, targets, lambda step: batches, run, progress=False, output=entropy)
    return loss, gradient, learned.coefficients


def recorded(parts, name: str) -> tuple[Tensor, Tensor, Tensor]:
    made: list[TapeRecorder] = []

    def recorder(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    with (
        patch("nsc.runtime.cuda_graphs.CudaRecorder", recorder),
        patch("nsc.runtime.cuda_graphs.obstacle", lambda model: None),
    ):
        result = found(parts, name, rows="shared")
    entropic = OPTIONS[name].heads
    assert all(not r.tapes for r in made) if entropic else any(r.tapes for r in made)  # an entropy is not recorded
    return result


def assert_same(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for mine, theirs, tolerance in zip(one, other, (SINGLE, SINGLE, AFTER), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_is_the_plain_computation(parts, expected, name):
    assert_same(found(parts, name), expected(name))


@pytest.mark.parametrize(
    "name", [*LOSSES, "link softmax", "a coefficient a task, exp", "link sigmoid, bounded", *SCHEDULED]
)
def test_recorded_and_replayed_with_rows_shared(parts, expected, name):
    assert_same(recorded(parts, name), expected(name))


WAYS = {
    "passes of 25 tokens, checkpointed": {"tokens_per_pass": 25, "gradient_checkpointing": True},
    "by weights, samples of like length together, on two ranks": {"rows": "bucketed", "ranks": 2, "layers": "weights"},
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_loss_is_the_same_however_a_step_runs(parts, expected, name, way):
    assert_same(found(parts, name, **way), expected(name))


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_changes_what_is_learned(parts, expected, name):
    model, stack, targets = parts
    loss = partial(plain_loss, model, stack, batch=token_batches("alone")[0], targets=targets, how=Plain())
    if "default" not in USUAL:
        USUAL["default"] = plain_learning(loss, stack, START, LR, STEPS, 3)[2]
    one, usual = expected(name)[2], USUAL["default"]
    assert (one - START).abs().max() > 1e-5
    assert one.shape != usual.shape or (one - usual).abs().max() > 1e-4


USUAL: dict[str, Tensor] = {}


@pytest.mark.parametrize("granularity", ["layer", "task"])
def test_a_bound_under_softmax_keeps_the_sum(parts, granularity):
    model, stack, targets = parts
    batches = token_batches("shared")
    config = MergeConfig(
        steps=20, lr=0.1, start=START, max_drift=0.05, link="softmax", granularity=granularity, graphs=False
    )
    learned = learn(model, whitened(stack), targets, lambda step: batches, config, progress=False)
    drift = (learned.coefficients - START).abs()
    assert drift.max() == pytest.approx(0.05, abs=1e-9) and learned.bounded.any()
    there = stack.present if granularity == "layer" else torch.ones_like(stack.present)
    sums = torch.where(there, learned.coefficients, 0).sum(1)
    torch.testing.assert_close(sums, START * there.sum(1).double(), **SINGLE)
    assert (learned.coefficients[learned.frozen] - START).abs().max() < 1e-12 or granularity == "task"


@pytest.mark.parametrize("q", [0.0, 0.3, 0.5, 1.0])
def test_quantiles_of_samples_are_those_of_torch(q):
    generator = torch.Generator().manual_seed(0)
    sample = torch.tensor([0] * 5 + [1] * 1 + [2] * 7 + [3] * 2)
    values = torch.rand(15, dtype=torch.float64, generator=generator, requires_grad=True)
    counted = torch.rand(15, generator=generator) > 0.3
    counted[sample == 3] = False
    one = sample_quantiles(values, sample, counted, q)
    for i in range(3):
        mine = values[(sample == i) & counted]
        torch.testing.assert_close(one[i], mine.quantile(q) if len(mine) else torch.zeros((), dtype=torch.float64))
    assert (one[3:] == 0).all()
    wanted = sum(values[(sample == i) & counted].quantile(q) for i in range(3) if ((sample == i) & counted).any())
    torch.testing.assert_close(*(torch.autograd.grad(x, values)[0] for x in (one.sum(), wanted)))
