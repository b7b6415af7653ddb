"""The loop that benchmarks compare with computes what nsc computes, so their times can be compared."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.baseline import PerTaskLoop, split_by_task
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import match_adapters
from nsc.adapters.stack import stack_adapters, whitened
from nsc.bases.roles import choose_targets
from nsc.bases.structure import linear_shapes
from nsc.data.packing import collate
from nsc.learning.assembly import initial_gradient
from tests.tiny import tiny_llama

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}
ADAPTERS = {"one": ["q_proj", "v_proj"], "two": ["q_proj", "v_proj"], "three": ["v_proj"]}  # task -> its modules


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_loss_and_gradient_are_those_of_the_packed_step(dtype: torch.dtype, tmp_path: Path) -> None:
    carrier = peft_model(dtype)
    carrier.save_pretrained(tmp_path)
    adapters = {task: read_adapter(tmp_path / task) for task in ADAPTERS}
    model = body(dtype)
    shapes = linear_shapes(model)
    stack = whitened(stack_adapters(adapters, match_adapters(adapters, shapes), shapes))
    targets = choose_targets(model, stack.names, ["v_proj"], [2, 3])
    samples = [[5, 6, 7, 8], [9, 10], [11, 12, 13], [14, 15, 16, 17, 18], [19], [20, 21]]
    batch = collate(samples, [0, 0, 1, 1, 2, 2], pad_id=0, causal=True)
    batch = replace(batch, weight=batch.weight.to(dtype))

    loop = PerTaskLoop(carrier, targets)
    loss = loop.backward(split_by_task(batch))
    expected_loss, expected_gradient = initial_gradient(model, stack, targets, batch, loop.lam.detach())

    assert list(loop.layers) == stack.names
    assert expected_gradient.abs().max() > 1e-3
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=TOLERANCE[dtype])
    torch.testing.assert_close(loop.lam.grad, expected_gradient, rtol=0, atol=TOLERANCE[dtype])


def body(dtype: torch.dtype) -> nn.Module:
    """A tiny LLaMA all of whose arithmetic is in ``dtype``: transformers' own RMSNorm stays in float32."""
    model = tiny_llama().to(dtype).requires_grad_(False)
    for name, norm in list(model.named_modules()):
        if isinstance(norm, LlamaRMSNorm):
            parent, _, child = name.rpartition(".")
            exact = nn.RMSNorm(norm.weight.numel(), eps=norm.variance_epsilon, dtype=dtype)
            setattr(model.get_submodule(parent), child, exact.requires_grad_(False))
    return model


def peft_model(dtype: torch.dtype) -> peft.PeftModel:
    """The same model carrying a random adapter a task."""
    torch.manual_seed(0)
    first, *others = (
        (task, peft.LoraConfig(r=4 + k, lora_alpha=8, target_modules=modules, init_lora_weights=False))
        for k, (task, modules) in enumerate(ADAPTERS.items())
    )
    model = body(dtype)
    torch.manual_seed(1)
    carrier = peft.get_peft_model(model, first[1], adapter_name=first[0])
    for task, config in others:
        carrier.add_adapter(task, config)
    return carrier
