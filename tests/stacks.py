"""Adapters with random weights on a tiny model, read back from folders into a stack, and random tokens for them."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import Stack, stack_adapters, whitened
from tests.tiny import linears, random_factors, write_adapter


def random_stack(model: nn.Module, names: Sequence[str], tasks: Iterable[str], folder: Path) -> Stack:
    """The whitened stack of one adapter per task, each with LoRA on all ``names``."""
    shapes, adapters = linears(model), {}
    for seed, task in enumerate(tasks):
        factors = {}
        for i, name in enumerate(names):
            m, d = shapes[name]
            factors |= random_factors([name], d=d, m=m, seed=9 * seed + i)
        adapters[task] = read_adapter(write_adapter(folder / task, factors), task)
    return whitened(stack_adapters(adapters, {task: {name: name for name in names} for task in adapters}, shapes))


def random_tokens(lengths: Mapping[str, Sequence[int]]) -> dict[str, list[list[int]]]:
    """Samples of these lengths for each task, as token ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(0)
    return {
        task: [torch.randint(3, 60, (n,), generator=generator).tolist() for n in each] for task, each in lengths.items()
    }
