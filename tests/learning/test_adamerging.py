"""AdaMerging: the original's numbers on a tiny network, its clipping, and the entropy of generated tokens.

From https://github.com/EnnengYang/AdaMerging, commit cea1165: 30 steps of Adam (lr 1e-3) on the entropy summed over
tasks; its coefficients are float32.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import nsc
from nsc.adapters.stack import ModuleStack, Stack, whitened
from nsc.adapters.surgery import merged_layers
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.heads import Head
from nsc.batch import Batch
from nsc.config import LEARNED, MergeConfig
from nsc.data.packing import collate, pack
from nsc.data.text import with_answer
from nsc.errors import NSCError
from nsc.learning.entropy import Entropy, entropy_of
from nsc.learning.generation import continue_prompts
from nsc.learning.loop import Learned, learn
from nsc.seal import unsealed
from nsc_kernels import GramCache
from tests.learning.test_exactness import SINGLE, adapted, llama
from tests.merging.test_option_merges import vision  # noqa: F401
from tests.merging_goldens import array, cases
from tests.plain_options import decoded_entropy

K, LAYERS = 3, ("W1", "W2")


def given(name: str) -> Tensor:
    return array(name, "inputs_ada")


class Net(nn.Module):
    """fc2(relu(fc1(x))), as a body: its states of one token a row."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(40, 24, bias=False), nn.Linear(24, 16, bias=False)
        self.double().requires_grad_(False)
        self.fc1.weight.copy_(given("W1"))
        self.fc2.weight.copy_(given("W2"))

    def forward(self, x):
        return (self.fc2(self.fc1(x).relu()),)


def module(place: str) -> ModuleStack:
    A, B = ([given(f"{place}/task{k}/{side}") for k in range(K)] for side in "AB")
    grams = tuple(GramCache().factor(A))
    inverse = torch.block_diag(*[gram.inverse for gram in grams])
    return ModuleStack(tuple(A), tuple(B), (4, 4, 4), (1.0, 1.0, 1.0), grams, inverse)


def settings_of(case: dict) -> dict:
    """What the manifest says beside the name of the method."""
    hyper = case["hyper"]
    assert hyper["clamp"] == [0, 1]
    method = "adamerging-task" if case["case"].endswith("task") else "adamerging"
    return {**LEARNED[method].settings, "steps": hyper["steps"], "lr": hyper["lr"], "start": hyper["prior"]}


def learned_on_net(**settings) -> Learned:
    stack = Stack(("a", "b", "c"), {"fc1": module("W1"), "fc2": module("W2")})
    inputs = torch.cat([given(f"x/task{k}") for k in range(K)])[:, None]
    task = torch.arange(K).repeat_interleave(16)[:, None]
    batch = Batch({"x": inputs}, task, torch.full((16 * K, 1), 1 / 16, dtype=torch.float64))
    entropy = Entropy([Head(given(f"head/task{k}")) for k in range(K)], "last")
    config = MergeConfig(**settings)
    return learn(Net(), whitened(stack), ["fc2"], lambda step: [batch], config, progress=False, output=entropy)


@pytest.mark.parametrize("case", cases("adamerging"), ids=lambda case: case["id"])
def test_the_path_of_the_coefficients_is_the_original_one(case):
    learned = learned_on_net(**settings_of(case))
    lam = array(f"{case['id']}/lambdas")[-1, :, 1:].double().expand(2, 3)
    torch.testing.assert_close(learned.coefficients, lam, rtol=0, atol=2e-6)
    losses = array(f"{case['id']}/losses").tolist()
    assert learned.losses == pytest.approx(losses, rel=0, abs=2e-6)


def original(start: float, lr: float, steps: int, rows: int) -> tuple[Tensor, list[float]]:
    """(31, rows, K) parameters and the losses, as the original's script has them, in float64."""
    deltas = {place: [given(f"{place}/task{k}/B") @ given(f"{place}/task{k}/A") for k in range(K)] for place in LAYERS}
    raw = nn.Parameter(torch.full((rows, K), start, dtype=torch.float64))
    optimizer = torch.optim.Adam([raw], lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
    path, losses = [raw.detach().clone()], []
    for _ in range(steps):
        lam = torch.clip(raw, min=0.0, max=1.0).expand(2, K)
        W1, W2 = (
            given(place) + sum(row[k] * deltas[place][k] for k in range(K))
            for place, row in zip(LAYERS, lam, strict=True)
        )
        loss = torch.zeros((), dtype=torch.float64)
        for k in range(K):
            said = (given(f"x/task{k}") @ W1.T).relu() @ W2.T @ given(f"head/task{k}").T
            loss = loss - (said.softmax(1) * said.log_softmax(1)).sum(1).mean(0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        path.append(raw.detach().clone())
        losses.append(loss.item())
    return torch.stack(path), losses


@pytest.mark.parametrize(("method", "rows"), [("adamerging", 2), ("adamerging-task", 1)])
@pytest.mark.parametrize("start", [0.0, 0.05, 0.98, 1.0])
def test_clipped_coefficients_move_on_as_the_original_ones(method, rows, start):
    """The parameter runs out of [0, 1], by the momentum it has, and the coefficient stays at the edge."""
    lr, steps = 0.02, 25
    path, losses = original(start, lr, steps, rows)
    assert (path < 0).any() or (path > 1).any()
    learned = learned_on_net(**{**LEARNED[method].settings, "lr": lr, "steps": steps, "start": start})
    torch.testing.assert_close(learned.coefficients, path[-1].clamp(0, 1).expand(2, K), rtol=0, atol=1e-9)
    assert learned.losses == pytest.approx(losses, rel=0, abs=1e-9)
    free = learned_on_net(**{**LEARNED[method].settings, "lr": lr, "steps": steps, "start": start, "link": "identity"})
    assert (free.coefficients - learned.coefficients).abs().max() > 1e-3


VOCABULARY, ENDS = 64, tuple(range(0, 64, 5))
PROMPTS = {0: [[5, 6, 7], [8, 9]], 1: [[10, 11, 12, 13]], 2: [[14], [15, 3, 4], [9, 9]]}
START = 0.4


@pytest.fixture(scope="module")
def generating(tmp_path_factory):
    """A body, a head and adapters."""
    model = llama()
    head = torch.randn(VOCABULARY, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return model, head, adapted(model, tmp_path_factory.mktemp("adapters"))


def answered(generating, most: int, shares_rows: bool) -> tuple[list[Batch], list[int]]:
    """One step's batches of all prompts with their answers, and how long those are."""
    model, head, stack = generating
    prompts = [prompt for rows in PROMPTS.values() for prompt in rows]
    tasks = [k for k, rows in PROMPTS.items() for _ in rows]
    with merged_layers(model, stack, torch.full((len(stack.names), K), START, dtype=torch.float64)):
        answers = continue_prompts(model, Head(head), prompts, most, ENDS)
    rows = [with_answer(prompt, answer, "full") for prompt, answer in zip(prompts, answers, strict=True)]
    samples, counted = zip(*rows, strict=True)
    batches = pack(samples, tasks, 0, causal=True, shares_rows=shares_rows, counted=counted)
    exact = [torch.where(b.weight > 0, 1 / (1 / b.weight.double()).round(), 0) for b in batches]
    return [replace(b, weight=w) for b, w in zip(batches, exact, strict=True)], [len(answer) for answer in answers]


@pytest.mark.parametrize("shares_rows", [False, True])
@pytest.mark.parametrize("most", [1, 6])
def test_entropies_of_tokens_are_summed_as_a_backward_at_each_sums_them(generating, most, shares_rows):
    """Of a single token and of up to six, task by task; their mean is another one."""
    model, head, stack = generating
    batches, lengths = answered(generating, most, shares_rows)
    assert len(set(lengths)) > (1 if most > 1 else 0)
    lam = torch.full((len(stack.names), K), START, dtype=torch.float64)
    expected, loss = torch.zeros_like(lam), 0.0
    for rows in PROMPTS.values():
        entropies, gradient = decoded_entropy(model, head, stack, lam, rows, most, ENDS)
        expected += gradient / len(rows)
        loss += sum(map(sum, entropies)) / len(rows)
    config = MergeConfig(
        objective="entropy", positions="full", start=START, optimizer="sgd", lr=1.0, steps=1, max_drift=None
    )
    found = {}
    for reduction in ("sum", "mean"):
        entropy = Entropy([Head(head)] * K, "counted", reduction)
        found[reduction] = learn(
            model, whitened(stack), stack.names[-1:], lambda step: batches, config, progress=False, output=entropy
        )
    torch.testing.assert_close(START - found["sum"].coefficients, expected, **SINGLE)
    assert found["sum"].losses == pytest.approx([loss], rel=0, abs=1e-10)
    apart = (found["sum"].coefficients - found["mean"].coefficients).abs().max()
    assert apart > 1e-3 if most > 1 else apart < 1e-12


FAST = dict(steps=3, progress=False, evaluation_samples=2)
SINGLE_TOKEN = [
    dict(positions="full", max_new_tokens=1, reduction="sum"),
    dict(positions="last", max_new_tokens=1),
    dict(positions="prompt"),
]


def test_single_token_is_the_prompts_last_however_it_is_said(base, adapters, texts):
    """NSC's names for it: one new token; the full sequence is more of them."""
    two = {task: adapters[task] for task in ("plain", "pattern")}
    data = {task: texts[task] for task in two}
    settings = {**LEARNED["adamerging"].settings, **FAST, "lr": 0.01}
    one, *others = (nsc.merge(base, two, data, **{**settings, **way}) for way in SINGLE_TOKEN)
    for other in others:
        torch.testing.assert_close(other.coefficients, one.coefficients, rtol=0, atol=1e-6)
    full = nsc.merge(base, two, data, **{**settings, "positions": "full", "max_new_tokens": 4, "reduction": "sum"})
    assert (full.coefficients - one.coefficients).abs().max() > 1e-3
    assert full.report.losses[0] > 2 * one.report.losses[0]  # of four tokens, not of one


@pytest.mark.parametrize("method", ["adamerging", "adamerging-task"])
@pytest.mark.parametrize("carried", [False, True])
def test_a_clipped_merge_stays_within_zero_and_one(base, adapters, texts, vision, tmp_path, method, carried):  # noqa: F811
    """With the base's head, and with the heads that adapters carry; written, and resumed, it is the same."""
    given = vision if carried else (base, {t: adapters[t] for t in ("plain", "pattern")}, None)
    base, adapters, data = given[0], given[1], given[2] or {t: texts[t] for t in given[1]}
    targets = dict(target_modules=["o_proj", "attention.output.dense"], target_blocks="all") if carried else {}
    settings = {**LEARNED[method].settings, **FAST, **targets, "lr": 0.5, "batch_size": 2}
    whole = nsc.merge(base, adapters, data, **{**settings, "steps": 6})
    lam = whole.coefficients
    assert lam.min() >= 0 and lam.max() <= 1 and ((lam == 0) | (lam == 1)).any()
    if method == "adamerging-task":
        assert (whole.coefficients == whole.coefficients[0]).all()
    nsc.merge(base, adapters, data, **settings, checkpoint=tmp_path / "state.pt")
    theta = unsealed((tmp_path / "state.pt").read_bytes())[0]["theta"]
    assert theta.min() < 0 or theta.max() > 1  # the parameter itself goes on
    resumed = nsc.merge(base, adapters, data, **{**settings, "steps": 6}, checkpoint=tmp_path / "state.pt", resume=True)
    assert torch.equal(resumed.coefficients, whole.coefficients)
    whole.save(tmp_path / "out")
    assert torch.equal(nsc.apply(tmp_path / "out").coefficients, whole.coefficients)


def test_heads_without_classes_are_refused_where_no_other_is_there(adapters, base):
    """A regression's softmax is 1 whatever it says; beside a classifier it adds 0."""
    model, saved = loading.load_body(Base(str(base)), device="cpu"), {"score.weight": torch.ones(1, 32)}
    read = {"a": replace(nsc.read_adapter(adapters["plain"], "a"), saved=saved)}
    with pytest.raises(NSCError, match="the heads of a have one output each"):
        entropy_of(Base(str(base), model), read, "prompt")
    read["b"] = replace(read["a"], saved={"score.weight": torch.eye(2, 32)})
    alone, batch = entropy_of(Base(str(base), model), read, "prompt"), collate([[5], [6]], [0, 1], 0, causal=False)
    states = torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
    said = states[1, 0, :2].softmax(0)
    torch.testing.assert_close(alone(states, batch, torch.ones(2)), -(said * said.log()).sum())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(link="clip", start=1.5), "link clip cannot give a coefficient of 1.5"),
        (dict(link="clip", start=-0.1), "link clip cannot give a coefficient of -0.1"),
        (dict(reduction="sum"), "reduction sum applies to entropies of generated tokens"),
        (dict(reduction="max", objective="entropy"), "reduction must be one of mean, sum, not max"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(NSCError, match=message):
        MergeConfig(**settings)
