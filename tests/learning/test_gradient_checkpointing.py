"""Blocks that run again for the backward: the same gradient, fewer bytes kept, the model as it was."""

import pytest
import torch

from nsc.adapters.stack import whitened
from nsc.adapters.surgery import merged_layers, set_coefficients, share_inputs
from nsc.bases.structure import blocks_before
from nsc.config import MergeConfig
from nsc.learning.loop import learn
from nsc.learning.objective import NullSpaceObjective
from tests.learning.test_objective import EXACT, make_batch, make_lam, mixed, model  # noqa: F401

TARGETS = {
    "in all blocks": [f"layers.{i}.self_attn.v_proj" for i in range(4)],
    "in the last quarter": ["layers.3.self_attn.v_proj"],
    "beside others that share": ["layers.1.self_attn.q_proj", "layers.1.mlp.up_proj", "layers.3.mlp.up_proj"],
}


@pytest.fixture(params=list(TARGETS))
def targets(request):
    return TARGETS[request.param]


def step(model, stack, targets, checkpointing, share=True):  # noqa: F811
    """Loss, gradient, and the bytes kept for the backward beside what is the model's own."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()  # held, so that no other takes its place
        return x

    lam = make_lam(stack).requires_grad_()
    with merged_layers(model, stack, lam.detach()) as layers:
        if share:
            share_inputs(model, layers, targets, make_batch().within(1)[0])
        objective = NullSpaceObjective(model, layers, stack, targets, checkpointing)
        set_coefficients(layers, lam)
        owned = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = objective.loss(make_batch())
        assert all(layers[name].watch is None for name in targets)
        loss.backward()
        assert all(layers[name].watch is None for name in targets)
    return loss.detach(), lam.grad, sum(x.nbytes() for pointer, x in kept.items() if pointer not in owned)


@pytest.mark.parametrize("share", [True, False])
def test_the_same_gradient_from_fewer_bytes(model, mixed, targets, share):  # noqa: F811
    lean = whitened(mixed)
    plain, again = (step(model, lean, targets, checkpointing, share) for checkpointing in (False, True))
    torch.testing.assert_close(again[:2], plain[:2], **EXACT)
    assert 0 < again[2] < 0.6 * plain[2]


def test_blocks_run_twice_and_the_last_one_once(model, mixed):  # noqa: F811
    runs, targets = [], TARGETS["in all blocks"]
    hooks = [
        block.input_layernorm.register_forward_hook(lambda *_, i=i: runs.append(i))
        for i, block in enumerate(model.layers)
    ]
    step(model, whitened(mixed), targets, True)
    for hook in hooks:
        hook.remove()
    assert runs == [0, 1, 2, 3, 0, 1, 2, 3, 2, 1, 0]  # to find who shares, forward, backward


@pytest.mark.parametrize("wrapped", [True, False])
def test_the_blocks_are_what_they_were_also_after_an_error(model, mixed, wrapped):  # noqa: F811
    lean, block = whitened(mixed), model.layers[1]
    if wrapped:  # as a hook that fetches weights does
        own = block.forward
        block.forward = lambda *args, **kwargs: own(*args, **kwargs)
    before = dict(block.__dict__)
    handle = block.mlp.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("on purpose")))
    try:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="on purpose"):
                step(model, lean, TARGETS["in the last quarter"], True)
        handle.remove()
        assert block.__dict__ == before and all("forward" not in x.__dict__ for x in (model.layers[0], model.layers[2]))
        torch.testing.assert_close(
            *(step(model, lean, TARGETS["in all blocks"], c)[:2] for c in (True, False)), **EXACT
        )
    finally:
        handle.remove()
        block.__dict__.pop("forward", None)


def test_ratios_and_coefficients_are_the_same(model, mixed, targets):  # noqa: F811
    lean, batch = whitened(mixed), make_batch()
    tables = []
    for checkpointing in (False, True):
        with merged_layers(model, lean, make_lam(mixed)) as layers:
            tables.append(NullSpaceObjective(model, layers, lean, targets, checkpointing).ratios(batch))
    torch.testing.assert_close(*tables, **EXACT, equal_nan=True)
    learned = []
    for checkpointing in (False, True):
        config = MergeConfig(steps=3, lr=1e-2, gradient_checkpointing=checkpointing)
        learned.append(learn(model, lean, targets, lambda step: [make_batch(step)], config, progress=False))
    torch.testing.assert_close(learned[1].coefficients, learned[0].coefficients, rtol=0, atol=1e-8)
    assert torch.equal(learned[1].frozen, learned[0].frozen)


def test_which_blocks_come_before(model):  # noqa: F811
    assert blocks_before(model, ["layers.2.self_attn.v_proj"]) == list(model.layers)[:2]
    assert blocks_before(model, ["layers.3.mlp.up_proj", "layers.1.mlp.up_proj"]) == list(model.layers)[:1]
    assert blocks_before(model, ["norm"]) == blocks_before(model, []) == []
