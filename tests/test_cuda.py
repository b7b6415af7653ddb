"""On a GPU: the goldens' coefficients, steps without host syncs, graphs, the Gram factors. Skipped elsewhere."""

from dataclasses import replace

import pytest
import torch

from nsc.adapters.stack import whitened
from nsc.adapters.surgery import merged_layers, set_coefficients
from nsc.config import MergeConfig
from nsc.learning.loop import learn, take_step
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import Passes
from nsc.learning.state import begin
from nsc.runtime.cuda_graphs import make_graphs
from nsc.runtime.distributed import ALONE
from nsc_kernels import GramCache
from tests.learning.test_goldens import FORMS, golden  # noqa: F401
from tests.runtime.test_cuda_graphs import CONFIG, TARGETS, setting  # noqa: F401

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_goldens_on_the_gpu(golden):  # noqa: F811
    case, expected, model, stack, batch = golden
    config = MergeConfig(steps=20, lr=1e-3, weight_decay=0.01)
    learned = learn(model.cuda(), whitened(stack), case["targets"], lambda step: [batch], config, progress=False)
    assert learned.coefficients.numpy() == pytest.approx(expected["lam"][19], abs=2e-6)


@pytest.mark.parametrize("golden", FORMS[:1], indirect=True)
def test_a_step_never_waits_for_the_device(golden):  # noqa: F811
    case, _, model, stack, batch = golden
    model, lean = model.cuda(), whitened(stack)
    lam = torch.full((len(stack.names), len(stack.tasks)), 0.4, device="cuda", requires_grad=True)
    batch = batch.to(torch.device("cuda"))
    batch.inputs.pop("attention_mask")  # as the driver does for a causal model
    with merged_layers(model, lean, lam.detach()) as layers:
        objective = NullSpaceObjective(model, layers, lean, case["targets"])
        objective.loss(batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            set_coefficients(layers, lam)
            objective.loss(batch).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_factors_on_the_gpu_equal_those_on_the_cpu():
    As = [torch.randn(16, 512) for _ in range(12)]
    for here, there in zip(GramCache().factor(As), GramCache().factor([a.cuda() for a in As]), strict=True):
        torch.testing.assert_close(there.inverse.cpu(), here.inverse, rtol=1e-9, atol=0)


@pytest.mark.parametrize("tokens", [None, 20])
def test_graphs_learn_what_eager_steps_do(setting, tokens, monkeypatch, capsys):  # noqa: F811
    model, stack, batches = setting
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(None), replay(graph)))
    config = replace(CONFIG, steps=40, tokens_per_pass=tokens)
    recorded = learn(model.cuda(), stack, TARGETS, batches, config)
    assert len(replays) > 40 and "no CUDA graphs" not in capsys.readouterr().err
    eager = learn(model.cuda(), stack, TARGETS, batches, replace(config, graphs=False), progress=False)
    torch.testing.assert_close(recorded.coefficients, eager.coefficients, rtol=0, atol=1e-6)
    torch.testing.assert_close(recorded.losses, eager.losses, rtol=0, atol=1e-6)


OPTIONS = [
    dict(quantile=0.5, schedule="cosine"),
    dict(link="softmax", max_drift=0.02, optimizer="sgd", lr=1.0),
    dict(granularity="task", link="softplus", preferences={"a": 2.0}),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_are_recorded_too(setting, options, monkeypatch):  # noqa: F811
    model, stack, batches = setting
    replays, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(None), replay(graph)))
    config = replace(CONFIG, **{"steps": 20, **options})
    recorded = learn(model.cuda(), stack, TARGETS, batches, config, progress=False)
    assert len(replays) > 20
    eager = learn(model.cuda(), stack, TARGETS, batches, replace(config, graphs=False), progress=False)
    torch.testing.assert_close(recorded.coefficients, eager.coefficients, rtol=0, atol=1e-5)


@pytest.mark.parametrize("graphs", [True, False])
def test_a_whole_step_never_waits_for_the_device(setting, graphs):  # noqa: F811
    """Of one shape: eager, recorded, and then replayed."""
    model, stack, batches = setting
    model, batch = model.cuda(), batches(0)
    lam = torch.nn.Parameter(torch.full((len(stack.names), len(stack.tasks)), 0.4, device="cuda"))
    with merged_layers(model, stack, lam.detach()) as layers:
        objective = NullSpaceObjective(model, layers, stack, TARGETS)
        state = begin(
            lam, torch.zeros_like(lam, dtype=torch.bool), CONFIG, "", made := make_graphs(model, graphs, print)
        )
        passes = Passes(objective, lam, None, state.loss, made)
        for number in range(6):
            torch.cuda.set_sync_debug_mode("error" if number > 2 else "default")
            try:
                take_step(state, lambda _: passes.gradient(batch), ALONE, [])
            finally:
                torch.cuda.set_sync_debug_mode("default")
    assert (made.replayed == 8) == graphs  # four steps of a pass and an update
