"""Matching the experts: in float64 the plain loop over PEFT's own models; its laws; interrupted, recorded, refused."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import nsc
import nsc.learning.loop as learning
from nsc.adapters.lora import read_adapters
from nsc.bases.base_model import Base
from nsc.config import MergeConfig, learned_settings
from nsc.data.sampling import borrow
from nsc.data.sources import read_data
from nsc.data.text import read_texts
from nsc.errors import DataError, NSCError, ResumeError, TargetError
from nsc.learning.assembly import prepared
from nsc.learning.held_back import hold_back, number_of, some_of
from nsc.learning.loop import Learned, take_step
from nsc.learning.passes import share_out
from nsc.learning.preparation import Problem, prepare, stack_on
from nsc.learning.state import State
from nsc.recipes.merged_factors import factors_to_fit, starting_factors
from nsc.recipes.updates import WeightedSum
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.memory import kept_bytes
from nsc.seal import unsealed
from tests.learning.test_loop import HostReads
from tests.plain_options import merged_parameters
from tests.runtime.test_cuda_graphs import Traced, taped  # noqa: F401
from tests.tiny import (
    WORDS,
    linears,
    peft_adapter,
    random_factors,
    rewrite,
    save_base,
    save_image_base,
    tiny_llama,
    word_tokenizer,
    write_adapter,
)

ENDS = list(range(2, 100, 6))  # so that answers are of different lengths
BODY = dict(vocab_size=100, num_hidden_layers=2, initializer_range=0.2, eos_token_id=ENDS)  # more than the likeliest
START, LIKELIEST, NEW = 0.4, 64, 4
CAUSAL, CLASSIFIER = "AutoModelForCausalLM", "AutoModelForSequenceClassification"
KINDS = {  # task -> class of transformers, its outputs, LoRA
    "classes": (CLASSIFIER, 3, dict(r=3, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")),
    "number": (CLASSIFIER, 1, dict(r=2, lora_alpha=8, target_modules=["v_proj", "o_proj"], task_type="SEQ_CLS")),
    "tokens": (CAUSAL, 0, dict(r=4, lora_alpha=20, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM")),
}
TASKS = list(KINDS)
ONCE = {"granularity": "layer", "steps": 1, "stop": "last", "borrow_rows": 0}  # all own rows in one step
SINGLE = {"rtol": 0, "atol": 1e-10}


@dataclass(frozen=True)
class Setting:
    base: Path
    adapters: dict[str, Path]
    texts: dict[str, list[str]]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Setting:
    """A LLaMA with adapters for three classes, for a number and for text, and eight rows of each task."""
    folder = tmp_path_factory.mktemp("match")
    adapters = {}
    for seed, (task, (kind, outputs, lora)) in enumerate(KINDS.items()):
        model = tiny_llama(kind, **BODY, **({"num_labels": outputs} if outputs else {}))
        adapters[task] = peft_adapter(folder / task, model, seed, **lora)
    texts = {
        task: [" ".join(WORDS[(11 * k + 5 * i + j) % 60] for j in range(3 + (3 * i) % 7)) for i in range(8)]
        for k, task in enumerate(TASKS)
    }
    return Setting(save_base(folder / "base", **BODY), adapters, texts)


def exact(model: nn.Module) -> nn.Module:
    """In float64 throughout: RMSNorm of transformers computes in float32, whatever the model's dtype."""
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                assert (child.weight == 1).all()
                setattr(parent, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64))
    return model.double().requires_grad_(False).eval()


def problem_of(setting: Setting, team: Team = ALONE, **settings: Any) -> Problem:
    """What ``nsc.merge`` learns, before it does."""
    ours = dict(dtype="float64", device="cpu", start=START, batch_size=3, steps=2, max_new_tokens=NEW, graphs=False)
    config = MergeConfig(**{**learned_settings("match", settings), **ours, **settings})
    read = read_adapters(setting.adapters)
    base, matched = stack_on(Base(str(setting.base)), read, config)
    exact(base.model)
    data = {task: rows for task, rows in setting.texts.items() if task not in config.unseen}
    samples = read_data(data, read, read_texts, config.unseen)
    return prepare(base, matched, samples, config, factors_to_fit(matched.stack, config), team)


# --- the plain loop ---------------------------------------------------------------------------------------------------


class PlainExperts:
    """Stock models, one a task, the expert by PEFT; nothing is batched."""

    def __init__(self, setting: Setting, positions: str = "full") -> None:
        self.setting, self.positions = setting, positions
        self.tokenizer = word_tokenizer()
        self.known: dict[tuple[str, str], Any] = {}
        self.wholes = {task: self.whole(task) for task in TASKS}
        for task in TASKS[:2]:
            saved = load_file(setting.adapters[task] / "adapter_model.safetensors")
            self.wholes[task].score.weight.data = saved["base_model.model.score.weight"].double()
        self.experts = {
            task: exact(peft.PeftModel.from_pretrained(self.whole(task), self.setting.adapters[task]).double())
            for task in TASKS
        }

    def whole(self, task: str) -> nn.Module:
        kind, outputs, _ = KINDS[task]
        labels = {"num_labels": outputs} if outputs else {}
        model = getattr(transformers, kind).from_pretrained(self.setting.base, **labels)
        return exact(model.double())

    @torch.no_grad()
    def row(self, task: str, text: str) -> tuple[Tensor, Tensor]:
        """Ids (1, L), with the expert's greedy answer if it writes, and what it says about them."""
        if (task, text) not in self.known:
            ids = torch.tensor([self.tokenizer(text)["input_ids"]])
            expert, prompt = self.experts[task], ids.shape[1]
            if task == "tokens":
                ids = expert.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
                )[:, :-1]
            logits = expert(input_ids=ids).logits
            self.known[task, text] = ids, prompt, self.counted(task, logits, prompt)
        return self.known[task, text]

    def counted(self, task: str, logits: Tensor, prompt: int) -> Tensor:
        """(n, C) of the places that count."""
        if task != "tokens":
            return logits
        return logits[0, prompt - 1 :] if self.positions == "full" else logits[0, -1:]

    def distance(self, task: str, text: str, weights: dict[str, Tensor]) -> Tensor:
        """() between the expert and a model with these weights of its body."""
        ids, prompt, e = self.row(task, text)
        inside = {f"model.{name}": weight for name, weight in weights.items()}
        said = torch.func.functional_call(self.wholes[task], inside, kwargs=dict(input_ids=ids)).logits
        y = self.counted(task, said, prompt)
        if task == "number":
            return (y - e).square().mean()
        p, q = e.softmax(-1), y.softmax(-1)
        if task == "tokens":
            order = p.topk(LIKELIEST, -1).indices
            p, q = (torch.cat([x.gather(1, order), 1 - x.gather(1, order).sum(1, keepdim=True)], 1) for x in (p, q))
        return (p * (p.log() - q.log())).sum(-1).mean()


def rows_of(setting: Setting, problem: Problem) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts of the first step, and a task's own of all steps."""
    config = problem.config
    texts = {task: [] if task in config.unseen else rows for task, rows in setting.texts.items()}
    learned = hold_back(texts, config.seed)[0]
    most = config.steps * config.batch_size // 2 if config.borrow_rows else 0
    together, borrowed = borrow(learned, most, config.seed, {"tokens"})
    drawn = [problem.batches.drawn(step) for step in range(config.steps)]
    first = {task: [together[task][i] for i in drawn[0][task]] for task in TASKS}
    own = {task: sorted({i for d in drawn for i in d[task] if i < len(learned[task])}) for task in TASKS}
    assert all(own[t] and drawn[0][t][1] >= len(learned[t]) for t in TASKS if borrowed[t])
    return first, {task: [learned[task][i] for i in rows] for task, rows in own.items()}


def plain(
    experts: PlainExperts, problem: Problem, shares=(1 / 3,) * 3, start: Tensor | float = START
) -> tuple[Tensor, Tensor]:
    """Loss and gradient of the first step."""
    setting = experts.setting
    first, every = rows_of(setting, problem)
    stack, config = problem.stack, problem.config
    with torch.no_grad():
        bare = {
            task: sum(experts.distance(task, x, {}) for x in rows) / len(rows) for task, rows in every.items() if rows
        }
    body = experts.wholes["tokens"].model
    if problem.factors is None:
        shape = (1 if config.granularity == "task" else len(stack.names), stack.owned.shape[1])
        parts = [(torch.zeros(shape, dtype=torch.float64) + start).requires_grad_()]
        weights: dict[str, Tensor] = {}
        for name, row in zip(stack.names, parts[0].expand(len(stack.names), -1), strict=True):
            weights |= merged_parameters(body, name, stack.layer(name), row)
    else:
        parts = [x.double().requires_grad_() for pair in problem.factors.values() for x in pair]
        pairs = zip(problem.factors, parts[::2], parts[1::2], strict=True)
        weights = {f"{name}.weight": body.get_parameter(f"{name}.weight") + B @ A for name, A, B in pairs}
    loss = torch.zeros((), dtype=torch.float64)
    for share, (task, texts) in zip(shares, first.items(), strict=True):
        if share:
            loss = loss + share * sum(experts.distance(task, x, weights) for x in texts) / len(texts) / bare[task]
    gradients = torch.autograd.grad(loss, parts)
    return loss.detach(), gradients[0] if problem.factors is None else torch.cat([g.flatten() for g in gradients])


def around(problem: Problem, batches: list | None = None):
    """A problem as ``learn`` prepares it."""
    return prepared(
        problem.base.model,
        problem.lean,
        problem.targets,
        batches or problem.batches(0),
        problem.config,
        output=problem.output,
        factors=problem.factors,
    )


def found(problem: Problem, batches=None, tokens: int | None = None, ranks: int = 1) -> tuple[Tensor, Tensor]:
    """What the passes of the first step add up to."""
    batches = (batches or problem.batches)(0)
    with around(problem, batches) as (state, passes):
        passes.tokens = tokens
        for share in share_out(batches, ranks):
            passes.gradient(share)
        return state.loss.clone(), state.theta.grad.clone()


GRANULARITIES: dict[str, dict[str, Any]] = {
    "task": {"granularity": "task"},
    "layer": {"granularity": "layer"},
    "rank": {"granularity": "rank"},
    "factors": {"granularity": "factors"},
    "factors of rank 3": {"granularity": "factors", "factor_rank": 3},
}
WAYS: dict[str, Callable[[Problem], tuple[Tensor, Tensor]]] = {
    "rows shared": found,
    "one sample a row": lambda p: found(p, replace(p.batches, shares_rows=False)),
    "few shapes": lambda p: found(p, replace(p.batches, few_shapes=True)),
    "passes of a row": partial(found, tokens=1),
    "passes of 25 tokens": lambda p: found(p, replace(p.batches, shares_rows=False), tokens=25),
    "shares of 2 ranks": partial(found, ranks=2),
    "shares of 4 ranks": lambda p: found(p, replace(p.batches, shares_rows=False), ranks=4),
}


@pytest.fixture(scope="module")
def experts(setting) -> PlainExperts:
    return PlainExperts(setting)


@pytest.fixture(scope="module")
def problems(setting, experts) -> Callable[[str], tuple[Problem, tuple[Tensor, Tensor]]]:
    """A problem, and what the plain loop finds for it, once."""
    known: dict[str, Any] = {}

    def of(name: str):
        if name not in known:
            problem = problem_of(setting, **GRANULARITIES[name])
            known[name] = problem, plain(experts, problem)
        return known[name]

    return of


CASES = [("rows shared", name) for name in GRANULARITIES]
CASES += [(way, name) for way in list(WAYS)[1:] for name in ("rank", "factors of rank 3")]


@pytest.mark.parametrize(("way", "name"), CASES)
def test_a_step_is_the_plain_loop_over_peft_models(problems, way, name):
    problem, (loss, gradient) = problems(name)
    assert problem.batches.shares_rows
    got = WAYS[way](problem)
    torch.testing.assert_close(got[0], loss, **SINGLE)
    torch.testing.assert_close(got[1], gradient, **SINGLE)
    assert 0.05 < loss < 2 and gradient.abs().max() > 1e-3


OTHERS = {
    "own rows alone": (dict(borrow_rows=0), (1 / 3,) * 3, "full"),
    "preferences": (dict(preferences={"classes": 3, "number": 2, "tokens": 1}), (1 / 2, 1 / 3, 1 / 6), "full"),
    "a task that counts for nothing": (dict(preferences={"tokens": 0}), (1 / 2, 1 / 2, 0), "full"),
    "an unseen task": (dict(unseen=("number",)), (1 / 2, 0, 1 / 2), "full"),
    "an unseen task, factors": (dict(unseen=("tokens",), granularity="factors"), (1 / 2, 1 / 2, 0), "full"),
    "checkpointed": (dict(gradient_checkpointing=True), (1 / 3,) * 3, "full"),
    "checkpointed, factors": (dict(gradient_checkpointing=True, granularity="factors"), (1 / 3,) * 3, "full"),
    "by weights": (dict(layers="weights", granularity="layer"), (1 / 3,) * 3, "full"),
    "the last token": (dict(unseen=("classes", "number"), positions="last"), (0, 0, 1), "last"),
    "full answers": (dict(unseen=("classes", "number"), positions="full"), (0, 0, 1), "full"),
}


@pytest.mark.parametrize(("settings", "shares", "positions"), OTHERS.values(), ids=OTHERS)
def test_options_are_the_plain_loop(setting, experts, settings, shares, positions):
    problem = problem_of(setting, **settings)
    experts = experts if positions == "full" else PlainExperts(setting, positions)
    expected = plain(experts, problem, shares)
    tolerance = {"rtol": 0, "atol": 1e-7} if len(set(shares)) == 3 else SINGLE  # preferences are in float32
    torch.testing.assert_close(found(problem), expected, **tolerance)


@pytest.mark.parametrize("name", ["rank", "factors"])
def test_held_out_rows_are_the_plain_loop(setting, experts, problems, name):
    """At the start: of each task its mean distance, over that of the bare base on the rows that are learned from."""
    problem, _ = problems(name)
    held, (_, every) = hold_back(setting.texts, problem.config.seed)[1], rows_of(setting, problem)
    pairs = problem.factors or starting_factors(
        WeightedSum(problem.stack, torch.full(problem.stack.owned.shape, START))
    )
    body = experts.wholes["tokens"].model
    weights = {
        f"{n}.weight": body.get_parameter(f"{n}.weight") + B.double() @ A.double() for n, (A, B) in pairs.items()
    }
    with torch.no_grad():
        expected = [mean_of(experts, t, held[t], weights) / mean_of(experts, t, every[t], {}) for t in TASKS]
    with around(problem):
        found = problem.held.distances(problem.base.model)
    assert found == pytest.approx(expected, rel=0, abs=1e-10 if name == "factors" else 1e-6)  # sums in float32
    assert len({len(experts.row("tokens", text)[2]) for text in setting.texts["tokens"]}) > 1


def mean_of(experts: PlainExperts, task: str, texts: list[str], weights: dict[str, Tensor]) -> float:
    return sum(experts.distance(task, text, weights).item() for text in texts) / len(texts)


@pytest.mark.parametrize("rank", [None, 3, 100])
def test_factors_start_at_the_best_approximation_of_the_sum_split_evenly(problems, rank):
    stack = problems("layer")[0].stack
    merged = WeightedSum(stack, torch.full(stack.owned.shape, START))
    for name, (A, B) in starting_factors(merged, rank).items():
        whole = stack.layer(name).delta(torch.full((3,), START))
        most = sum(stack.layer(name).ranks)
        u, sigma, vh = torch.linalg.svd(whole, full_matrices=False)
        kept = min(rank or most, most)
        assert A.shape[0] == B.shape[1] == kept
        best = u[:, :kept] * sigma[:kept] @ vh[:kept]
        torch.testing.assert_close(B.double() @ A.double(), best, rtol=0, atol=1e-6)
        torch.testing.assert_close(A @ A.T, B.T @ B, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["layer", "factors"])
def test_checkpointed_activations_are_not_kept(setting, name):
    kept = []
    for wanted in (False, True):
        problem = problem_of(setting, granularity=name, gradient_checkpointing=wanted)
        (batch,) = problem.batches(0)
        with around(problem) as (_, passes):
            kept.append(kept_bytes(partial(passes.objective.loss, batch), problem.base.model))
    assert kept[1] < 0.8 * kept[0]


def test_added_to_the_null_space_objective(setting):
    both = problem_of(setting, objective="null-space+match", granularity="layer")
    alone = problem_of(setting, objective="null-space", stop="last", granularity="layer")
    batches, match = both.batches, replace(both, config=replace(both.config, objective="match"))
    ratios = found(alone, batches)
    for mine, one, other in zip(found(both), ratios, found(match), strict=True):
        torch.testing.assert_close(mine, one + other, rtol=0, atol=1e-7)  # weights of tokens are in float32
    assert ratios[0] > 0.05


# --- laws -------------------------------------------------------------------------------------------------------------


def distances(problem: Problem, lam: Tensor) -> list[float]:
    """Of each task, over all rows that are learned from."""
    picks = [(task, i) for task, n in ((t, len(rows)) for t, rows in problem.batches.rows.items()) for i in range(n)]
    with (
        around(problem) as (_, passes),
        torch.no_grad(),
    ):
        passes.place(lam)
        total = torch.zeros(len(TASKS), dtype=torch.float64)
        for batch in problem.batches.packed(picks):
            states = problem.base.model(**batch.arguments(torch.float64))[0]
            total += problem.output.by_task(states, batch)
    return total.tolist()


def test_the_bare_base_is_1_and_an_expert_alone_is_0(setting):
    """On a task's own rows; of those of others that it borrows, the mean is another."""
    problem = problem_of(setting, granularity="layer", borrow_rows=0)
    zero = torch.zeros(len(problem.stack.names), len(TASKS), dtype=torch.float64)
    assert distances(problem, zero) == pytest.approx([1.0] * 3, rel=0, abs=1e-12)
    for k in range(len(TASKS)):
        only = zero.clone()
        only[:, k] = 1
        found = distances(problem, only)
        assert abs(found[k]) < 1e-12 and min(d for j, d in enumerate(found) if j != k) > 0.1


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("granularity", ["layer", "rank", "factors"])
def test_a_merge_of_one_adapter_from_1_is_that_adapter(setting, task, granularity):
    """In float32, where rounding gives gradients to follow."""
    one = {task: setting.adapters[task]}, {task: setting.texts[task]}
    settings = dict(method="match", granularity=granularity, start=1.0, steps=10, progress=False, max_new_tokens=NEW)
    result = nsc.merge(setting.base, *one, **settings)
    curve = {int(step): values for step, values in result.report.distances.items()}
    assert curve[0][0] < 1e-6 and result.report.losses[0] < 1e-6
    stack = result.stack
    for name in result.modules:
        update = result.merged.update(name)
        whole = stack.layer(name).delta(torch.ones(stack.owned.shape[1]))
        assert (update.B @ update.A - whole).norm() <= 1e-6 * whole.norm()


# --- held-out rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, 0), (1, 1), (2, 1), (3, 1), (7, 3), (8, 4), (16, 4), (39, 4), (40, 4), (50, 5), (256, 25), (2000, 128)],
)
def test_a_tenth_is_held_back_at_least_four_at_most_half(rows, size):
    learned, held, warnings = hold_back({"a": list(range(rows))}, 0)
    assert len(held["a"]) == size
    assert len(learned["a"]) == (rows - size if rows > 1 else rows)
    if rows > 1:
        assert sorted(learned["a"] + held["a"]) == list(range(rows))
        assert learned["a"] == sorted(learned["a"]) and held["a"] == sorted(held["a"])
    else:
        assert learned == held
    assert len(warnings) == (0 < rows < 16)
    assert all(f"task a has {rows} unlabeled rows; matching overfits to fewer than 16" in w for w in warnings)


def test_chosen_rows_know_their_numbers_among_all():
    rows = [f"row {i}" for i in range(300)]
    learned, held, _ = hold_back({"a": rows}, 0)
    for some in (learned["a"], held["a"], some_of(held["a"], 5, "key"), hold_back(learned, 1)[0]["a"]):
        assert [rows[number_of(some, i)] for i in range(len(some))] == list(some) and len(some) < 300
    assert number_of(rows, 7) == 7


@pytest.mark.parametrize("most", [1, 5, 64])
def test_every_task_is_evaluated_on_its_own_rows_however_few_another_has(setting, most):
    texts = setting.texts | {TASKS[0]: setting.texts[TASKS[0]][:4]}
    few = replace(setting, texts=texts)
    problem = problem_of(few, evaluation_samples=most)
    learned = hold_back(texts, problem.config.seed)[0]
    counts = dict.fromkeys(range(len(TASKS)), 0)
    for batch in problem.evaluation:
        places = torch.stack([batch.task.flatten(), batch.samples()])[:, batch.weight.flatten() > 0]
        for k in places.unique(dim=1)[0].tolist():
            counts[k] += 1
    assert problem.batches.borrowed and len({len(rows) for rows in learned.values()}) > 1
    assert list(counts.values()) == [min(most, len(learned[task])) for task in TASKS]


def test_what_is_held_back_depends_on_the_seed_and_the_task_alone():
    rows = {"a": list(range(100)), "b": list(range(100))}
    one, two, other = (hold_back(rows, seed)[1] for seed in (0, 0, 1))
    assert one == two and one["a"] != other["a"] and one["a"] != one["b"]
    assert hold_back({"a": rows["a"]}, 0)[1]["a"] == one["a"]


@pytest.mark.parametrize("granularity", ["rank", "factors"])
def test_the_step_with_the_least_mean_distance_is_kept(setting, monkeypatch, granularity):
    """By a learning rate with which it is neither the first nor the last."""
    noted: dict[int, Tensor] = {}
    note = State.note

    def noting(self, values):
        noted[self.step] = self.theta.detach().clone()
        note(self, values)

    monkeypatch.setattr(State, "note", noting)
    settings = dict(granularity=granularity, steps=20, lr={"rank": 0.05, "factors": 0.01}[granularity])
    settings |= dict(method="match", progress=False, max_new_tokens=NEW, schedule="constant", borrow_rows=0)
    result = nsc.merge(setting.base, setting.adapters, setting.texts, **settings)
    report = result.report
    curve = {int(step): sum(values) / 3 for step, values in report.distances.items()}
    assert list(curve) == list(range(0, 21, 2)) == list(noted)
    assert report.kept == min(curve, key=curve.__getitem__) and 0 < report.kept < 20
    assert f"{report.kept}" in report.summary()
    theta = noted[report.kept]
    if granularity == "rank":
        assert torch.equal(result.coefficients, theta) and torch.equal(result.record.coefficients, theta)
    else:
        parts = [x.flatten() for factors in result.record.factors.values() for x in (factors.A, factors.B)]
        assert torch.equal(torch.cat(parts).float(), theta) and result.record.coefficients is None
    few = [text for text in report.warnings if "matching overfits" in text]
    assert len(few) == 3 and "task classes has 8 unlabeled rows" in few[0]
    last = nsc.merge(setting.base, setting.adapters, setting.texts, **settings, stop="last")
    assert last.report.distances == {} and last.report.kept == 20  # and learns from the rows that were held back


def test_without_steps_the_start_is_kept_and_measured(setting):
    result = nsc.merge(setting.base, setting.adapters, setting.texts, method="match", steps=0, progress=False)
    assert (result.coefficients == START).all()
    assert list(result.report.distances) == ["0"] and result.report.kept == 0
    assert all(0 < d < 2 for d in result.report.distances["0"])


def test_ratios_before_are_those_of_the_factors_at_their_rank(setting):
    settings = dict(granularity="factors", steps=0, stop="last")
    one, other = (merge(setting, **settings, factor_rank=rank).report for rank in (1, None))
    assert one.ratio_before == pytest.approx(one.ratio_after, abs=1e-6)
    assert max(abs(a - b) for a, b in zip(one.ratio_before, other.ratio_before, strict=True)) > 1e-3


def test_a_single_row_of_each_task_is_learned_from_and_held_out(setting):
    one = {task: rows[:1] for task, rows in setting.texts.items()}
    result = nsc.merge(setting.base, setting.adapters, one, method="match", steps=20, progress=False)
    curve = result.report.distances
    assert sum(curve[str(result.report.kept)]) < 0.5 * sum(curve["0"])


def test_nsc_may_stop_where_the_experts_are_nearest(setting):
    settings = dict(method="nsc", stop="match", steps=10, lr=0.1, max_drift=None)
    result = merge(setting, **settings)
    curve = {int(step): sum(values) for step, values in result.report.distances.items()}
    assert list(curve) == list(range(11)) and result.report.kept == min(curve, key=curve.__getitem__)
    assert len(set(curve.values())) == 11


# --- interrupted ------------------------------------------------------------------------------------------------------

STEPS = 20  # held-out rows are measured every second step


@pytest.fixture(scope="module")
def long(setting) -> Callable[[str], tuple[Problem, Learned]]:
    """A problem of many steps, and what is learned without an interrupt."""
    known: dict[str, tuple[Problem, Learned]] = {}

    def of(name: str) -> tuple[Problem, Learned]:
        if name not in known:
            fast = dict(steps=STEPS, lr={"rank": 0.05, "factors": 0.005}[name], dtype="float32", batch_size=2)
            fast |= dict(borrow_rows=0)  # so that some step is better than the start
            problem = float32(setting, granularity=name, **fast)
            known[name] = problem, problem.learn(progress=False)
        return known[name]

    return of


def float32(setting: Setting, **settings: Any) -> Problem:
    """Without the norms of float64."""
    config = MergeConfig(**{**learned_settings("match", settings), "device": "cpu", "max_new_tokens": NEW, **settings})
    read = read_adapters(setting.adapters)
    base, matched = stack_on(Base(str(setting.base)), read, config)
    samples = read_data(setting.texts, read, read_texts)
    return prepare(base, matched, samples, config, factors_to_fit(matched.stack, config))


def assert_same_bits(one, other) -> None:
    assert torch.equal(one.coefficients, other.coefficients) and one.losses == other.losses
    assert one.curve == other.curve and one.kept == other.kept
    for name, pair in (other.factors or {}).items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.factors[name], pair, strict=True))
    assert (one.factors is None) == (other.factors is None)


@pytest.mark.parametrize("name", ["rank", "factors"])
@pytest.mark.parametrize("stop", [0, 8, 9, 19])
def test_interrupted_and_resumed_equals_uninterrupted(long, tmp_path, name, stop):
    """Before the first note, between two, at one, and at the last step."""
    (problem, whole), calls = long(name), count()
    assert list(whole.curve) == list(range(0, STEPS + 1, 2)) and whole.kept > 0

    def interrupting(step):
        if next(calls) == stop + 1:  # one call is made before the loop
            signal.raise_signal(signal.SIGTERM)
        return problem.batches(step)

    checkpoint = tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        replace(problem, batches=interrupting).learn(checkpoint=checkpoint, progress=False)
    assert unsealed(checkpoint.read_bytes())[1]["step"] == stop + 1
    assert_same_bits(problem.learn(checkpoint=checkpoint, resume=True, progress=False), whole)


KILLS = [
    ("note", 2, "before"),
    ("note", 1, "after"),
    ("update", 3, "before"),
    ("note", 1, "before"),
]


@pytest.mark.parametrize("name", ["rank", "factors"])
@pytest.mark.usefixtures("one_thread")
def test_killed_again_and_again_equals_uninterrupted(long, tmp_path, monkeypatch, name):
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", -1)  # a checkpoint after every step
    problem, checkpoint, reached = long(name)[0], tmp_path / "state.pt", []
    whole = problem.learn(progress=False)
    for place, turn, when in KILLS:
        child = multiprocessing.get_context("fork").Process(
            target=run_until_killed, args=(problem, checkpoint, place, turn, when)
        )
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL, (place, turn, when)
        reached.append(unsealed(checkpoint.read_bytes())[1]["step"] if checkpoint.exists() else 0)
    assert reached == sorted(reached) and 0 < reached[-1] < STEPS
    assert_same_bits(problem.learn(checkpoint=checkpoint, resume=True, progress=False), whole)


def run_until_killed(problem, checkpoint, place, turn, when) -> None:
    torch.set_num_threads(1)
    function, calls = getattr(State, place), count(1)

    def deadly(*args):
        last = next(calls) == turn
        if last and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        function(*args)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(State, place, deadly)
    problem.learn(checkpoint=checkpoint, resume=checkpoint.exists(), progress=False)


def test_a_merge_is_resumed_with_its_own_settings_alone(setting, tmp_path):
    state = tmp_path / "state.pt"

    def run(**settings):
        settings = dict(method="match", steps=4, progress=False) | settings
        return nsc.merge(setting.base, setting.adapters, setting.texts, checkpoint=state, **settings)

    whole = run()
    for other in (dict(steps=6), dict(stop="last"), dict(granularity="factors")):
        with pytest.raises(ResumeError, match="other adapters, data or settings"):
            run(**other, resume=True)
    assert torch.equal(run(resume=True).coefficients, whole.coefficients)


def test_a_merge_is_not_resumed_with_more_steps(setting, tmp_path):
    """Even of constant rate and without held-out rows: what the bare base says is measured on the rows of all steps."""
    settings = dict(
        stop="last", schedule="constant", batch_size=1, granularity="layer", checkpoint=tmp_path / "state.pt"
    )
    merge(setting, **settings | dict(steps=1))
    with pytest.raises(ResumeError, match="other adapters, data or settings"):
        merge(setting, **settings | dict(steps=4), resume=True)


# --- encoders ---------------------------------------------------------------------------------------------------------

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
ENCODERS = {
    "BERT, whose pooler carries LoRA": ("Bert", ["query", "value", "pooler.dense"]),
    "RoBERTa": ("Roberta", ["query", "value"]),
    "ModernBERT, mean": ("ModernBert", ["Wqkv"]),
}


@pytest.mark.parametrize(("kind", "modules"), ENCODERS.values(), ids=ENCODERS)
def test_encoders_are_the_plain_classes_of_transformers(setting, tmp_path, kind, modules):
    """The first loss of a merge, over all rows that are learned from: each row by itself, in PEFT's own models."""
    settings = dict(vocab_size=64, max_position_embeddings=64, pad_token_id=0, classifier_pooling="mean")
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)

    def whole(labels: int) -> nn.Module:
        return getattr(transformers, CLASSIFIER).from_pretrained(tmp_path / "base", num_labels=labels).eval()

    torch.manual_seed(0)
    auto = (
        transformers.AutoModelForMaskedLM if kind == "ModernBert" else transformers.AutoModel
    )  # with its head's layer
    auto.from_config(config).save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    adapters, outputs, updates = {}, {"classes": 3, "number": 1}, []
    for seed, (task, labels) in enumerate(outputs.items()):
        torch.manual_seed(seed)  # of the head
        lora = dict(r=4, lora_alpha=16, target_modules=modules, task_type="SEQ_CLS")
        adapters[task] = peft_adapter(tmp_path / task, whole(labels), seed, **lora)
    experts = {task: peft.PeftModel.from_pretrained(whole(n), adapters[task]).eval() for task, n in outputs.items()}
    for expert in experts.values():
        layers = [(n, m) for n, m in expert.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        updates.append({n.removeprefix("base_model.model."): m.get_delta_weight("default") for n, m in layers})
    texts = {task: setting.texts[task] for task in outputs}
    targets = {"target_modules": modules[:1]}
    result = merge(setting, adapters, texts, tmp_path / "base", **targets, **ONCE, batch_size=8)
    tokenizer, total = word_tokenizer(), 0.0
    assert {len(rows) for rows in texts.values()} == {8}
    for expert, rows in zip(experts.values(), texts.values(), strict=True):
        ids = [torch.tensor([tokenizer(text)["input_ids"]]) for text in rows]
        with torch.no_grad():
            e = torch.cat([expert(input_ids=x).logits for x in ids]).double()
            inner = expert.unload()
            bare = torch.cat([inner(input_ids=x).logits for x in ids]).double()
            for update in updates:
                for name, delta in update.items():
                    inner.get_submodule(name).weight.data += START * delta
            y = torch.cat([inner(input_ids=x).logits for x in ids]).double()
        total += (apart(y, e) / apart(bare, e)).item() / 2
    assert result.report.losses[0] == pytest.approx(total, rel=1e-4)
    assert 0.01 < total < 2


def apart(y: Tensor, e: Tensor) -> Tensor:
    """Of several rows (n, C), on average."""
    if e.shape[1] == 1:
        return (y - e).square().mean()
    return F.kl_div(y.log_softmax(-1), e.softmax(-1), reduction="batchmean")


# --- recorded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rank", "factors"])
def test_recorded_steps_are_the_eager_ones(long, taped, name):  # noqa: F811
    """Bit for bit, held-out curve and kept step included."""
    problem, _ = long(name)
    problem = replace(problem, batches=replace(problem.batches, few_shapes=True))
    with Traced():
        recorded = replace(problem, config=replace(problem.config, graphs=True)).learn(progress=False)
        eager = replace(problem, config=replace(problem.config, graphs=False)).learn(progress=False)
    *_, recorder = taped  # the first may be of the run that others share
    assert len(recorder.tapes) >= 2  # the update and a shape at least
    assert_same_bits(recorded, eager)


@pytest.mark.parametrize("name", ["rank", "factors"])
def test_a_step_never_reads_from_the_device(long, name):
    problem, _ = long(name)
    batches = problem.batches
    with around(problem, batches(0)) as (state, passes):
        made = [batches(0), batches(1)]  # on the host

        def step():
            take_step(state, lambda number: passes.gradient(made[number]), ALONE, [])

        step()
        with HostReads() as reads:
            step()
    assert reads.seen == []


# --- images -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """A ViT with three adapters, two with heads over their classes, one with a number."""
    folder = tmp_path_factory.mktemp("vision")
    base, generator = save_image_base(folder / "base"), torch.Generator().manual_seed(0)
    body = transformers.AutoModel.from_pretrained(base)
    names = [name for name, (m, d) in linears(body).items() if m == d == 32 and "pooler" not in name]
    adapters, images = {}, {}
    for seed, (task, classes) in enumerate((("digits", 10), ("clothes", 4), ("age", 1))):
        factors = {n: (a / 6, b / 12) for n, (a, b) in random_factors(names, seed=seed).items()}
        saved = {
            "classifier.weight": torch.randn(classes, 32, generator=generator),
            "classifier.bias": torch.randn(classes, generator=generator),
        }
        adapters[task] = write_adapter(folder / task, factors, saved=saved, target_modules=names)
        images[task] = list(torch.randint(256, (8, 8, 8, 3), dtype=torch.uint8, generator=generator).numpy())
    return base, adapters, images


@pytest.mark.parametrize("granularity", ["layer", "rank", "factors"])
def test_images_from_rows_to_replay(vision, tmp_path, granularity):
    settings = dict(method="match", granularity=granularity, steps=30, progress=False)
    settings |= {"factor_rank": 5} if granularity == "factors" else {}
    result = nsc.merge(*vision, **settings)
    curve, losses = result.report.distances, result.report.losses
    assert result.report.kept == int(min(curve, key=lambda step: sum(curve[step]))) and losses[-1] < 0.8 * losses[0]
    proof = result.save(tmp_path / "out")
    assert proof.weights < 1e-5 and proof.outputs < 1e-4
    again = nsc.apply(tmp_path / "out")
    again.save(tmp_path / "again")
    for file in ("adapter_model.safetensors", *(f"heads/{task}.safetensors" for task in vision[1])):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    for kind in ("coefficients", "factors"):
        files = [tmp_path / name / f"{kind}.safetensors" for name in ("out", "again")]
        assert files[0].exists() == files[1].exists() == ((kind == "factors") == (granularity == "factors"))
        for key, tensor in load_file(files[0]).items() if files[0].exists() else ():
            assert torch.equal(load_file(files[1])[key], tensor)  # metadata lie in no order
    described = json.loads((tmp_path / "out" / "report.json").read_text())
    assert described["distances"] == curve and described["kept"] == result.report.kept
    if granularity == "factors":
        assert described["merged_rank"] == 5 and result.coefficients is None and described["coefficients"] == []
        assert {len(A) for _, A in again.record.factors.values()} == {5}


def test_images_are_the_plain_classes_of_transformers(vision):
    """The first loss of a merge, over all rows that are learned from, one batch a task."""
    base, adapters, images = vision
    result = nsc.merge(*vision, method="match", **ONCE, batch_size=8, progress=False)
    assert {len(rows) for rows in images.values()} == {8}
    processor = transformers.AutoImageProcessor.from_pretrained(base)
    total = 0.0
    for k, (task, folder) in enumerate(adapters.items()):
        pixels = processor(images=images[task], return_tensors="pt")["pixel_values"]
        saved = load_file(folder / "adapter_model.safetensors")
        labels = len(saved["base_model.model.classifier.bias"])

        def said(lam, task=task, saved=saved, labels=labels, pixels=pixels, k=k):
            whole = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=labels).eval()
            for kind in ("weight", "bias"):
                getattr(whole.classifier, kind).data = saved[f"base_model.model.classifier.{kind}"]
            for name, row in zip(result.stack.names, lam, strict=True):
                whole.base_model.get_submodule(name).weight.data += result.stack.layer(name).delta(row).float()
            with torch.no_grad():
                return whole(pixel_values=pixels).logits.double()

        zero = torch.zeros(len(result.modules), len(adapters))
        alone = zero.clone()
        alone[:, k] = 1
        e, y, bare = said(alone), said(torch.full_like(zero, START)), said(zero)

        total += (apart(y, e) / apart(bare, e)).item() / 3
    assert result.report.losses[0] == pytest.approx(total, rel=1e-4)


# --- refused ----------------------------------------------------------------------------------------------------------


def merge(setting: Setting, adapters=None, texts=None, base=None, **settings):
    adapters, texts = adapters or setting.adapters, texts or setting.texts
    settings = dict(method="match", steps=2, max_new_tokens=NEW, progress=False) | settings
    return nsc.merge(base or setting.base, adapters, texts, **settings)


def changed(folder: Path, tmp_path: Path, change, file: str) -> Path:
    copy = shutil.copytree(folder, tmp_path / "changed")
    rewrite(copy / file, change)
    return copy


@pytest.mark.parametrize("task", TASKS)
def test_an_expert_that_says_nan_is_named(setting, tmp_path, task):
    def poison(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")

    base = changed(setting.base, tmp_path, poison, "model.safetensors")
    one = {task: setting.adapters[task]}, {task: setting.texts[task]}
    with pytest.raises(DataError, match=rf"the expert of task {task} says NaN or infinity about row \d of its data"):
        merge(setting, *one, base=base)


def test_a_task_without_rows_is_refused(setting):
    some = {task: setting.texts[task] for task in TASKS[:2]}
    with pytest.raises(DataError, match="no data for tokens"):
        merge(setting, texts=some)
    with pytest.raises(DataError, match="holds no text; every task needs at least one"):
        merge(setting, texts=some | {"tokens": []})


def test_a_task_whose_base_lost_its_head_is_matched_by_states(setting, tmp_path):
    base = changed(setting.base, tmp_path, lambda t: t.pop("lm_head.weight"), "model.safetensors")
    assert merge(setting, base=base).report.by_states == ["tokens"]
    some = {task: setting.texts[task] for task in TASKS[:2]}
    assert merge(setting, texts=some, base=base, unseen=("tokens",)).report.by_states == []


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_that_changes_nothing_on_its_rows_is_refused(setting, tmp_path, beside):
    """It changes what a token looks for, and its rows have one token; also beside tasks with rows of other lengths."""
    names = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    adapters = {"blind": write_adapter(tmp_path / "a", random_factors(names), target_modules=["q_proj"])}
    texts = {"blind": [f"word{i}" for i in range(8)]}
    if beside:
        names = [f"model.layers.{i}.self_attn.{kind}" for i in range(2) for kind in ("q_proj",)]
        adapters["seeing"] = write_adapter(tmp_path / "b", random_factors(names, seed=1), target_modules=["q_proj"])
        texts["seeing"] = setting.texts["tokens"]
    with pytest.raises(NSCError, match="adapter blind says about its rows just what the base says without it"):
        merge(setting, adapters, texts, target_modules=["q_proj"], max_new_tokens=1)


def test_a_head_for_each_token_is_refused(setting, tmp_path):
    """It has the name and shape of one for whole texts."""
    copy = shutil.copytree(setting.adapters["classes"], tmp_path / "changed")
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps(config | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(NSCError, match=r"adapter tags carries a head for each token of a text \(TOKEN_CLS\)"):
        merge(setting, {"tags": copy}, {"tags": setting.texts["classes"]})


def test_factors_of_a_layer_fine_tuned_whole_are_refused(setting, tmp_path):
    names = [f"model.layers.{i}.self_attn.v_proj" for i in range(2)]
    factors = {n: (a, b[:16]) for n, (a, b) in random_factors(names).items()}
    saved = {"model.layers.0.mlp.up_proj.weight": torch.randn(48, 32, generator=torch.Generator().manual_seed(0))}
    whole = write_adapter(tmp_path / "a", factors, saved=saved)
    one = {"tokens": whole}, {"tokens": setting.texts["tokens"]}
    with pytest.raises(NSCError, match=r"fine-tuned layers.0.mlp.up_proj whole.*or give granularity rank"):
        merge(setting, *one, granularity="factors")
    assert merge(setting, *one).coefficients.shape[0] == 3


FITTED = dict(granularity="factors", objective="match", max_drift=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (FITTED | dict(max_drift=0.1), "factors have no link and no bound"),
        (FITTED | dict(link="exp"), "factors have no link and no bound"),
        (FITTED | dict(factor_rank=0), "factor_rank must be 1 or more"),
        (dict(granularity="factors"), "the objective must be match, not null-space"),
        (dict(granularity="factors", objective="null-space+match"), "the objective must be match"),
        (
            dict(granularity="factors", objective="match", link="exp", max_drift=None),
            "factors have no link and no bound",
        ),
        (dict(granularity="factors", objective="match"), "factors have no link and no bound"),
        (dict(factor_rank=4), "factor_rank is the rank of fitted factors: give granularity factors"),
        (
            dict(granularity="factors", objective="match", max_drift=None, factor_rank=0),
            "factor_rank must be 1 or more",
        ),
        (dict(objective="match", max_new_tokens=0), "max_new_tokens must be 1 or more, not 0"),
        (dict(objective="match", quantile=0.5), "quantile applies to null-space ratios"),
        (dict(objective="match", reduction="sum"), "reduction sum applies to entropies"),
        (dict(objective="match", modality="text"), "measures the model's output.*leave modality at both"),
        (dict(stop="match", modality="text"), "leave modality at both"),
        (dict(stop="best"), "stop must be one of last, match, not best"),
        (dict(objective="matching"), "objective must be one of null-space, entropy, both, match, null-space"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(NSCError, match=message):
        MergeConfig(**settings)


def test_a_config_of_another_objective_is_refused(setting):
    with pytest.raises(NSCError, match="method match needs the objective match, but config has null-space"):
        merge(setting, config=MergeConfig())


def test_adapters_without_a_common_target_are_matched(base, tmp_path):
    """Null-space ratios are only reported, and one that is not there is NaN."""
    places = {"a": "v_proj", "b": "up_proj"}
    of = {}
    for seed, (task, name) in enumerate(places.items()):
        shape = {"d": 32, "m": 16 if name == "v_proj" else 48}
        kind = "self_attn" if name == "v_proj" else "mlp"
        names = [f"model.layers.{i}.{kind}.{name}" for i in range(4)]
        of[task] = write_adapter(tmp_path / task, random_factors(names, **shape, seed=seed), target_modules=[name])
    rows = {task: [" ".join(WORDS[3 * i + j] for j in range(4)) for i in range(8)] for task in of}
    result = nsc.merge(base, of, rows, method="match", steps=2, max_new_tokens=2, progress=False)
    assert math.isfinite(result.report.ratio_before[0]) and math.isnan(result.report.ratio_before[1])
    with pytest.raises(TargetError, match="b touches none of the target layers"):
        nsc.merge(base, of, rows, steps=2, progress=False)
