"""On a GPU: the goldens' coefficients, a step without host syncs, whitened and Gram factors. Skipped elsewhere."""

import pytest
import torch
from test_goldens import FORMS, golden  # noqa: F401

from nsc.config import MergeConfig
from nsc.learn import learn
from nsc.objective import NullSpaceObjective
from nsc.stack import whitened
from nsc.surgery import merged_layers, set_coefficients
from nsc_kernels import GramCache

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
