"""Every way to run a step, in float64 against the plain per-task loop: loss and gradient, then five AdamW steps."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import Stack, stack_adapters, whitened
from nsc.bases.structure import block_of
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.images import collate_images, tokens_seen
from nsc.data.packing import buckets, collate, pack, shared_rows
from nsc.learning.assembly import prepared
from nsc.learning.loop import learn
from nsc.learning.passes import share_out
from nsc.runtime.distributed import ALONE, Team, join
from tests.plain import plain_objective, plain_steps
from tests.runtime.ranks import together
from tests.tape import TapeRecorder
from tests.tiny import linears, random_factors, tiny_llama, tiny_vit, write_adapter

START, LR, STEPS = 0.4, 1e-2, 5
RANKS, SCALES = (2, 3, 5), (1, 2, 0.5)  # of tasks a, b, c; c has no query projection
LENGTHS = [5, 17, 2, 9, 2, 6, 3, 11, 4]  # of each sample, and whose it is
TASKS = [0, 0, 0, 1, 1, 1, 1, 2, 2]
SINGLE = {"rtol": 0, "atol": 1e-10}
AFTER = {"rtol": 0, "atol": 1e-8}


@dataclass(frozen=True)
class Setting:
    """A model with adapters and one step's samples, and what the plain loop finds there."""

    model: nn.Module
    stack: Stack
    targets: list[str]
    batches: Callable[[str], list[Batch]]  # by how samples are put into rows
    loss: Tensor
    gradient: Tensor
    coefficients: Tensor


Found = tuple[Tensor, Tensor, Tensor]  # loss (), gradient (M, K) at the start, coefficients (M, K) after the steps


def step(
    setting: Setting, rows: str = "alone", form: Callable[[Stack], Stack] = whitened, team: Team = ALONE, **config: Any
) -> Found:
    """One way to take a step, as ``learn`` prepares it, and then ``learn`` itself."""
    model, stack, batches = setting.model, form(setting.stack), setting.batches(rows)
    settings = {"layers": "factors", "tokens_per_pass": None, **config}
    run = MergeConfig(steps=STEPS, lr=LR, start=START, max_drift=None, **settings)
    with prepared(model, stack, setting.targets, batches, run) as (state, passes):
        passes.tokens = run.tokens_per_pass
        loss = passes.gradient(share_out(batches, team.size)[team.rank]).clone()
        gradient = state.theta.grad.clone()
    team.add_up(loss, gradient)
    learned = learn(model, stack, setting.targets, lambda step: batches, run, progress=False, team=team)
    return loss, gradient, learned.coefficients


def recorded(setting: Setting) -> Found:
    """Steps recorded at their second turn and replayed from the third, on a tape in place of a CUDA graph."""
    made: list[TapeRecorder] = []

    def recorder(device: torch.device) -> TapeRecorder:
        made.append(TapeRecorder(device))
        return made[-1]

    with (
        patch("nsc.runtime.cuda_graphs.CudaRecorder", recorder),
        patch("nsc.runtime.cuda_graphs.obstacle", lambda model: None),
    ):
        found = step(setting, rows="shared")
    assert any(recorder.tapes for recorder in made)
    return found


def each_by_itself(setting: Setting) -> Found:
    """Layers that read one tensor, each with a pass over it of its own."""
    with patch("nsc.learning.assembly.share_inputs", lambda *of: None):
        return step(setting)


# Every way to run a step: a name, and what takes a Setting to what was Found.
WAYS: list[tuple[str, Callable[[Setting], Found]]] = [
    ("one sample a row", step),
    ("rows shared by samples", partial(step, rows="shared")),
    ("samples of like length together", partial(step, rows="bucketed")),
    ("Gram instead of whitening", partial(step, form=lambda stack: stack)),
    ("layers by weights", partial(step, layers="weights")),
    ("layers by whichever is cheaper", partial(step, layers="auto", rows="shared")),
    ("layers by weights, Gram, rows shared", partial(step, layers="weights", form=lambda stack: stack, rows="shared")),
    *((f"passes of {tokens} tokens", partial(step, tokens_per_pass=tokens)) for tokens in (1, 25, 60)),
    ("shared rows, one a pass", partial(step, rows="shared", tokens_per_pass=1)),
    ("checkpointed activations", partial(step, gradient_checkpointing=True)),
    (
        "checkpointed, by weights, shared rows",
        partial(step, gradient_checkpointing=True, layers="weights", rows="shared"),
    ),
    ("recorded and replayed", recorded),
    ("no layer shares its input", each_by_itself),
]


def linears_by_block(model: nn.Module) -> list[list[str]]:
    """Of each block: query, key, value, output, the MLP's linears; by their order, whatever they are called."""
    blocks: dict[int, list[str]] = {}
    for name in linears(model):
        if place := block_of(model, name):
            blocks.setdefault(place[0], []).append(name)
    return list(blocks.values())


def adapted(model: nn.Module, folder) -> Stack:
    """Three adapters of other ranks and scales on query, value, output and the block's last linear."""
    shapes, adapters = linears(model), {}
    for seed, (task, rank, scale) in enumerate(zip("abc", RANKS, SCALES, strict=True)):
        kinds = (2, 3, -1) if task == "c" else (0, 2, 3, -1)
        factors = {}
        for name in (block[kind] for block in linears_by_block(model) for kind in kinds):
            m, d = shapes[name]
            A, B = random_factors([name], r=rank, d=d, m=m, seed=100 * seed + len(factors))[name]
            factors[name] = (A.double() / d**0.5, B.double() / rank)
        adapters[task] = read_adapter(write_adapter(folder / task, factors, r=rank, alpha=rank * scale), task)
    return stack_adapters(adapters, {t: {n: n for n in a.factors} for t, a in adapters.items()}, shapes)


def llama() -> nn.Module:
    """In float64 throughout: RMSNorm of transformers computes in float32, whatever the model's dtype."""
    model = tiny_llama(initializer_range=0.2, use_cache=False).double().requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(parent, name, nn.RMSNorm(child.weight.shape, child.variance_epsilon, dtype=torch.float64))
    return model


def token_batches(rows: str) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(3, 60, (n,), generator=generator).tolist() for n in LENGTHS]
    if rows == "alone":
        return [in_float64(collate(samples, TASKS, pad_id=0, causal=False))]
    return [in_float64(b) for b in pack(samples, TASKS, pad_id=0, causal=True, shares_rows=rows != "bucketed")]


def image_batches(model: nn.Module, rows: str) -> list[Batch]:
    """All tasks in one batch; images are of one size, so rows are never shared, and buckets are the batch in parts."""
    pixels = torch.randn(len(TASKS), 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = collate_images(list(pixels), TASKS, tokens_seen(model, [linears_by_block(model)[0][0]], pixels[0]))
    return batch.split(4) if rows == "bucketed" else [batch]


def in_float64(batch: Batch) -> Batch:
    """Weights of tokens to the last bit of float64: each sample's within its task, each token's within its sample."""
    counted = batch.weight > 0
    sample = batch.segment if batch.segment is not None else torch.arange(len(batch.task))[:, None].expand_as(counted)
    length = torch.bincount(sample[counted])[sample.clamp_min(0)]
    share = torch.tensor([1 / TASKS.count(k) for k in range(3)], dtype=torch.float64)
    weight = torch.where(counted, share[batch.task] / length, 0)
    torch.testing.assert_close(batch.weight, weight.float(), rtol=1e-6, atol=0)
    return replace(batch, weight=weight)


def setting_of(model: nn.Module, batches: Callable[[str], list[Batch]], places: Sequence[tuple[int, int]], folder):
    """places: (block, which linear of it) of the targets."""
    stack = adapted(model, folder)
    targets = [linears_by_block(model)[block][kind] for block, kind in places]
    lam = nn.Parameter(torch.full((len(stack.names), 3), START, dtype=torch.float64))
    (batch,) = batches("alone")
    loss = plain_objective(model, stack, lam, batch, targets)
    loss.backward()
    after = plain_steps(model, stack, batch, targets, START, LR, STEPS)
    return Setting(model, stack, targets, batches, loss.detach(), lam.grad, after)


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Setting]:
    language, vision = llama(), tiny_vit(initializer_range=0.2).double().requires_grad_(False)
    images = partial(image_batches, vision)
    made = {
        "LLaMA, value": (language, token_batches, [(2, 2), (3, 2)]),
        "LLaMA, an early output": (language, token_batches, [(1, 3)]),
        "ViT, output": (vision, images, [(1, 3), (2, 3)]),
    }
    return {name: setting_of(*parts, tmp_path_factory.mktemp("adapters")) for name, parts in made.items()}


SETTINGS = ["LLaMA, value", "LLaMA, an early output", "ViT, output"]


def assert_exact(found: Found, setting: Setting) -> None:
    loss, gradient, coefficients = found
    torch.testing.assert_close(loss, setting.loss, **SINGLE)
    torch.testing.assert_close(gradient, setting.gradient, **SINGLE)
    torch.testing.assert_close(coefficients, setting.coefficients, **AFTER)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("way", [way for _, way in WAYS], ids=[name for name, _ in WAYS])
def test_every_way_to_run_a_step_is_the_plain_loop(settings, name, way):
    assert_exact(way(settings[name]), settings[name])


@pytest.mark.parametrize("size", [2, 4])
def test_processes_find_what_the_plain_loop_finds(settings, tmp_path, size):
    def work(rank):
        team = join()
        return {
            (name, rows): step(settings[name], rows, team=team) for name in SETTINGS for rows in ("alone", "shared")
        }

    for found in together(tmp_path, size, work):
        for (name, _), one in found.items():
            assert_exact(one, settings[name])


@pytest.mark.parametrize("name", SETTINGS)
def test_there_is_something_to_find(settings, name):
    """No comparison above is of zeros, or of coefficients that did not move; nothing behind the last target moves."""
    setting = settings[name]
    names, last = setting.stack.names, setting.targets[-1]
    block = [block_of(setting.model, name) for name in names].index(block_of(setting.model, last))
    assert setting.loss > 0.1 and setting.gradient.abs().max() > 1e-4
    assert torch.equal(setting.gradient[:block] != 0, setting.stack.present[:block])
    assert not setting.gradient[names.index(last) :].any()
    assert (setting.coefficients - START).abs().max() > STEPS * LR / 2


def test_rows_are_packed_as_they_say():
    assert [len(b.task) for b in token_batches("bucketed")] == [len(bucket) for bucket in buckets(LENGTHS)]
    (shared,) = token_batches("shared")
    assert len(shared.task) == len(shared_rows(LENGTHS)) < len(LENGTHS) and shared.segment is not None
