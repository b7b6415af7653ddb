"""The runners of a race for one step: nsc's own, the per-task loop, and the floor, on the same weights and adapters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
from baseline import PerTaskLoop, split_by_task
from models import QV, RANK, Case, Tower, embedded, random_rows
from torch import Tensor, nn

from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import match_adapters
from nsc.adapters.stack import Stack, stack_adapters, whitened
from nsc.bases.roles import choose_targets
from nsc.bases.structure import linear_shapes
from nsc.batch import Batch
from nsc.performance.timing import Floor, sharing_weights


@dataclass
class Race:
    """What runs against one another on the same weights.

    Attributes:
        stack: the adapters of nsc.
        targets: names of the measured layers.
        batch: the rows of a step of nsc.
        loop_step: a step of the per-task loop.
        floor_step: a pass of the frozen base alone.
    """

    stack: Stack
    targets: list[str]
    batch: Batch
    loop_step: Callable[[], Tensor]
    floor_step: Callable[[], Tensor]

    @classmethod
    def of(cls, case: Case, model: nn.Module, folder: Path) -> Race:
        """Prepare all runners for a case; adapters are written to ``folder``, and read again as nsc does."""
        carrier = with_random_adapters(sharing_weights(model), case.tasks)
        stack = read_stack(carrier, folder, model)
        targets = choose_targets(model, stack.names, [name for name in QV if "v" in name])
        tower = Tower(case.tower, case.config.hidden_size, case.dtype) if case.tower else None
        batch, raw = random_rows(case, model, tower)
        loop, parts = PerTaskLoop(carrier, targets), split_by_task(raw)
        floor = Floor(sharing_weights(model), stack.names[0], targets[-1])

        def loop_step() -> Tensor:
            return loop.step([embedded(part, model, tower) for part in parts] if tower else parts)

        return cls(stack, targets, batch, loop_step, lambda: floor(batch))


def with_random_adapters(model: nn.Module, tasks: int) -> peft.PeftModel:
    """Put PEFT's layers into ``model``, in its dtype."""
    names = sorted({name.rsplit(".", 1)[-1] for name in linear_shapes(model)} & set(QV))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    carrier = peft.get_peft_model(model, config, adapter_name="task0", autocast_adapter_dtype=False)
    for k in range(1, tasks):
        carrier.add_adapter(f"task{k}", config)
    dtype = next(model.parameters()).dtype
    for name, parameter in carrier.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)  # PEFT keeps some in float32
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return carrier


def read_stack(carrier: peft.PeftModel, folder: Path, model: nn.Module) -> Stack:
    """Return the carrier's adapters, written by PEFT, and read, matched and whitened by nsc."""
    carrier.save_pretrained(folder)
    adapters = {task: read_adapter(folder / task) for task in carrier.peft_config}
    shapes = linear_shapes(model)
    return whitened(stack_adapters(adapters, match_adapters(adapters, shapes), shapes))


def random_stack(model: nn.Module, tasks: int, folder: Path) -> Stack:
    """Return random adapters for a model."""
    return read_stack(with_random_adapters(sharing_weights(model), tasks), folder, model)
