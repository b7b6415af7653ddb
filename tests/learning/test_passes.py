"""Passes as large as the memory that is free allows: what a token keeps, measured, and the cut that follows."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

import nsc.learning.assembly as learning
from nsc.adapters.surgery import choose_plans, merged_layers, set_coefficients
from nsc.data.packing import collate
from nsc.learning import passes
from nsc.learning.loop import learn
from nsc.learning.objective import NullSpaceObjective
from nsc.learning.passes import Passes, tokens_that_fit
from nsc.runtime.memory import free_memory, kept_bytes
from nsc_kernels import lora_fold, modules
from tests.learning.test_loop import CONFIG, TARGETS, setting  # noqa: F401


def test_passes_are_cut_by_the_memory_that_is_free(setting, monkeypatch, capsys):  # noqa: F811
    """Ten times as much memory holds about ten times the tokens; what is learned is the same, and it is said."""
    model, stack, batches = setting
    batches = replace(batches, batch_size=6)
    sizes, one_pass, results = [], Passes._pass, []

    def noted(self, batch):
        sizes[-1].append(batch.tokens)
        one_pass(self, batch)

    monkeypatch.setattr(Passes, "_pass", noted)
    for free in (None, 10**9, 4 * 10**5, 1):
        monkeypatch.setattr(learning, "free_memory", lambda device, free=free: free)
        sizes.append([])
        results.append(learn(model, stack, TARGETS, batches, CONFIG))
        told = capsys.readouterr().err
        assert ("so a pass holds" in told) == (free is not None)
    whole, ample, some, none = sizes
    widest = max(batch.task.shape[1] for step in range(CONFIG.steps) for batch in batches(step))
    assert whole == ample and max(none) == widest < max(some) < max(whole)
    for other in results[1:]:
        torch.testing.assert_close(other.coefficients, results[0].coefficients, rtol=0, atol=1e-4)


@pytest.mark.parametrize("layers", ["factors", "weights"])
def test_what_a_token_keeps_is_measured_exactly(setting, layers):  # noqa: F811
    """The tokens that fit keep no more than their share of what is free, and a tenth more of them would keep more."""
    model, stack, _ = setting
    lam = torch.nn.Parameter(torch.full((len(stack.names), 2), 0.4))
    batch = collate([[3 + i] * 20 for i in range(40)], [0, 1] * 20, pad_id=0, causal=True)
    plans = choose_plans(model, stack, layers, batch.tokens)
    free = 2_500_000
    with merged_layers(model, stack, lam.detach(), plans) as layers:
        objective = NullSpaceObjective(model, layers, stack, TARGETS)
        set_coefficients(layers, lam)
        rows = tokens_that_fit(objective, batch, free) // 20
        assert 2 < rows < 36
        for taken, fits in ((rows, True), (math.ceil(1.1 * rows), False)):
            set_coefficients(layers, lam)
            part = batch.split(taken)[0]
            assert (kept_bytes(partial(objective.loss, part), model) <= passes.SHARE * free) == fits


def test_free_memory_of_this_machine():
    free = free_memory(torch.device("cpu"))
    assert 10**6 < free < 10**15
    assert free_memory(torch.device("meta")) is None


@pytest.mark.parametrize(("checkpointing", "folds"), [(False, 3 * 4), (True, 0)])
def test_a_step_folds_each_weight_once_for_all_passes(setting, checkpointing, folds, monkeypatch):  # noqa: F811
    """Of the three layers that a step runs, in four steps; not where memory is what matters."""
    model, stack, batches = setting
    kept = []

    def noted(*args, out=None):
        kept.append(out is not None)
        return lora_fold(*args, out=out)

    monkeypatch.setattr(modules, "lora_fold", noted)
    config = replace(CONFIG, steps=4, tokens_per_pass=8, layers="weights", gradient_checkpointing=checkpointing)
    assert min(len(passes.in_passes(batches(step), 8)) for step in range(4)) > 1
    found = learn(model, stack, TARGETS, batches, config).coefficients
    assert sum(kept) == folds < len(kept)
    by_factors = learn(model, stack, TARGETS, batches, replace(config, layers="factors")).coefficients
    torch.testing.assert_close(found, by_factors)
