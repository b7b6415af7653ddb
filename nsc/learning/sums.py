"""Sums over tokens that become the moments of layers that read one tensor, added up in float64, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from nsc.adapters.stack import ModuleStack
from nsc.errors import NonFiniteError
from nsc.methods.inputs import InputMoments, SpanMoments
from nsc.runtime.distributed import Team
from nsc_kernels import lora_moments


class Sums(Protocol):
    """The sums of layers that read one tensor."""

    @property
    def size(self) -> int:
        """The bytes that they take."""

    def add(self, k: int, x: Tensor, merged: Tensor, weight: Tensor) -> None:
        """Add tokens of task k.

        Args:
            k: number of the task.
            x: (t, d) inputs in the expert.
            merged: (t, d) inputs in the merge so far, or x itself.
            weight: (t,).
        """

    def add_up(self, k: int, team: Team) -> None:
        """Add up what the ranks know of a task; each has added tokens of it, perhaps none.

        Args:
            k: number of the task.
            team: the processes.

        Raises:
            RankError: if a rank is lost.
        """

    def close(self, k: int, task: str) -> None:
        """End a task.

        Args:
            k: its number.
            task: its name.

        Raises:
            NonFiniteError: if an input was not finite.
        """

    def moments(self) -> Mapping[str, SpanMoments | InputMoments]:
        """Return what was collected.

        Returns:
            Layer -> its moments.
        """


class SpanSums:
    """E_k[u u'] of each layer; it implements ``Sums``.

    Args:
        modules: layers that read one tensor.
    """

    def __init__(self, modules: Mapping[str, ModuleStack]) -> None:
        self.modules = modules
        self.second: dict[str, Tensor] = {}

    @property
    def size(self) -> int:
        """The bytes that they take."""
        return sum(8 * len(m.ranks) * sum(m.ranks) ** 2 for m in self.modules.values())

    def add(self, k: int, x: Tensor, merged: Tensor, weight: Tensor) -> None:
        """Add tokens of task k.

        Args:
            k: number of the task.
            x: (t, d).
            merged: the same.
            weight: (t,).
        """
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for name, module in self.modules.items():
            second = lora_moments(x, module.A.to(x), weight=weight).second
            if name not in self.second:
                self.second[name] = second.new_zeros(len(module.ranks), *second.shape[1:])
            self.second[name][k] += second[0]

    def add_up(self, k: int, team: Team) -> None:
        """Add up what the ranks know of a task.

        Args:
            k: number of the task.
            team: the processes.

        Raises:
            RankError: if a rank is lost.
        """
        team.add_up(*(second[k] for second in self.second.values()))

    def close(self, k: int, task: str) -> None:
        """End a task.

        Args:
            k: its number.
            task: its name.

        Raises:
            NonFiniteError: if an input was not finite.
        """
        for name, second in self.second.items():
            require_finite(second[k], name, task)

    def moments(self) -> dict[str, SpanMoments]:
        """Return what was collected.

        Returns:
            Layer -> its moments.
        """
        return {name: SpanMoments(second) for name, second in self.second.items()}


def require_finite(moments: Tensor, name: str, task: str) -> None:
    """Refuse moments that are not finite.

    Args:
        moments: of any shape.
        name: the layer's.
        task: the task's.

    Raises:
        NonFiniteError: naming both.
    """
    if not moments.isfinite().all():
        raise NonFiniteError(
            f"NaN or infinite activations enter {name} (task {task}); check the base's weights and dtype (float16"
            " overflows: use bfloat16)"
        )
