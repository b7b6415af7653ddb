"""The method as it is usually written: a loop over tasks, PEFT layers with every adapter active, forward hooks.

    for each task: run the body on its rows, catch what enters the target layers, om = sqrt(1 - u' G u / z'z), backward

It is what ``nsc`` is timed against, so it is plain but not slow: no LM head, no cache, base and factors frozen, Gram
inverses computed once. It computes the same loss and gradient (tests/benchmarks/test_baseline.py).

Paper: https://arxiv.org/abs/2603.26317, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from nsc.batch import Batch

TINY = 1e-8


class PerTaskLoop:
    """Learn the coefficients ``lam`` (M, K) of all adapters of a PEFT model, one task at a time.

    Args:
        model: a PEFT model that holds the K adapters.
        targets: names in its base model of the layers that are measured.
        start: of every coefficient.
        lr: of AdamW.
    """

    def __init__(self, model: PeftModel, targets: Sequence[str], start: float = 0.4, lr: float = 3e-4) -> None:
        self.tasks = list(model.peft_config)
        model.base_model.set_adapter(self.tasks)
        self.body = model.get_base_model().requires_grad_(False).eval()
        self.body.config.use_cache = False
        self.layers = {name: m for name, m in self.body.named_modules() if isinstance(m, LoraLayer)}
        self.scales = [dict(layer.scaling) for layer in self.layers.values()]
        self.inverses = {name: _gram_inverses(self.layers[name]) for name in targets}
        self.inputs: dict[str, Tensor] = {}
        for name in targets:
            self.layers[name].register_forward_pre_hook(partial(self._keep_input, name))
        weight, shape = next(self.body.parameters()), (len(self.layers), len(self.tasks))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lam = nn.Parameter(torch.full(shape, start, dtype=dtype, device=weight.device))
        self.optimizer = torch.optim.AdamW([self.lam], lr=lr, weight_decay=0.0)

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Take one step of AdamW on a batch of each task, and return the loss ()."""
        self.optimizer.zero_grad()
        loss = self.backward(batches)
        self.optimizer.step()
        return loss

    def backward(self, batches: Sequence[Batch]) -> Tensor:
        """Return the loss () over a batch of each task, and add its gradient to ``lam.grad``."""
        total = torch.zeros((), dtype=self.lam.dtype, device=self.lam.device)
        for task, batch in zip(self.tasks, batches, strict=True):
            loss = self.loss(task, batch) / len(self.tasks)
            loss.backward()
            total += loss.detach()
        return total

    def loss(self, task: str, batch: Batch) -> Tensor:
        """Return the mean () over the targets of the weighted ratio of one task's rows."""
        self._apply_coefficients()
        self.body(**batch.inputs)
        means = []
        for name, inverses in self.inverses.items():
            if task in inverses:
                ratio = _null_space_ratio(self.inputs[name], self.layers[name].lora_A[task].weight, inverses[task])
                means.append((ratio * batch.weight).sum())
        self.inputs.clear()
        return torch.stack(means).mean()

    def _apply_coefficients(self) -> None:
        """Put a tensor where PEFT keeps each adapter's factor: outputs become differentiable in ``lam``."""
        for layer, scales, row in zip(self.layers.values(), self.scales, self.lam.unbind(0), strict=True):
            for task, coefficient in zip(self.tasks, row.unbind(0), strict=True):
                if task in scales:
                    layer.scaling[task] = coefficient * scales[task]

    def _keep_input(self, name: str, _layer: nn.Module, args: tuple[Any, ...]) -> None:
        self.inputs[name] = args[0]


def split_by_task(batch: Batch) -> list[Batch]:
    """Return a batch for each task, from a batch of all in which each sample is of one task."""
    parts = []
    for task in batch.task[:, 0].unique():
        rows = batch.task[:, 0] == task
        inputs = {name: value[rows] for name, value in batch.inputs.items()}
        parts.append(Batch(inputs, batch.task[rows], batch.weight[rows]))
    return parts


def _gram_inverses(layer: LoraLayer) -> dict[str, Tensor]:
    """Return task -> (A A')^-1, (r, r), computed in float64, kept in float32 at least."""
    inverses = {}
    for task, down in layer.lora_A.items():
        A = down.weight.double()
        inverses[task] = torch.linalg.inv(A @ A.T).to(torch.promote_types(down.weight.dtype, torch.float32))
    return inverses


def _null_space_ratio(z: Tensor, A: Tensor, inverse: Tensor) -> Tensor:
    """Return the ratios (...,) of z (..., d), by A (r, d) and the inverse (r, r) of its Gram matrix."""
    z, A = z.to(inverse.dtype), A.to(inverse.dtype)
    u = z @ A.T
    captured = (u @ inverse * u).sum(-1) / z.square().sum(-1).clamp_min(TINY)
    return (1 - captured).clamp_min(TINY).sqrt()
