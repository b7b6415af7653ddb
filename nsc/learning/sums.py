"""Sums over tokens that become the moments of layers that read one tensor, added up in float64, task by task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from nsc.adapters.stack import ModuleStack
from nsc.errors import NonFiniteError
from nsc.methods.inputs import InputMoments, Inputs, SpanMoments


def lora_moments(
    z: Tensor,
    lora_A: Tensor,
    task: Tensor | None = None,
    tasks: int = 1,
    weight: Tensor | None = None,
    other: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ``u = z A'`` and its second moments by task; ``nsc_kernels`` will have it in one pass over z.

    Args:
        z: (n, d).
        lora_A: (R, d).
        task: (n,) int64, 0 to tasks - 1; None for task 0.
        tasks: T.
        weight: (n,); None for ones.
        other: (n, R), u of another run of the same rows.

    Returns:
        u (n, R); the energy |z|^2 (n,); second moments (T, R, R), sum w u u', float64; cross moments (T, R, R), sum w
        u~ u' with u~ of ``other``, None without it.
    """
    u = z @ lora_A.to(z.dtype).mT
    weighted = u if weight is None else u * weight.to(u.dtype)[:, None]
    if task is not None:
        owned = torch.nn.functional.one_hot(task, tasks).to(u.dtype)  # (n, T)
        weighted = weighted * owned.mT[:, :, None]
    second = (u.mT @ weighted).double().reshape(tasks, *2 * u.shape[1:])
    cross = None if other is None else (other.mT @ weighted).double().reshape(second.shape)
    return u, z.square().sum(-1), second, cross


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


def sums_of(inputs: Inputs, modules: Mapping[str, ModuleStack], weights: Mapping[str, Tensor]) -> Sums:
    """Return empty sums.

    Args:
        inputs: what is collected.
        modules: layers that read one tensor.
        weights: layer -> the base's weight, for the unit "output", with which there is only one layer.

    Returns:
        The sums.
    """
    return SpanSums(modules) if inputs.of == "u" else InputSums(modules, inputs, weights)


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
            second = lora_moments(x, module.A.to(x), weight=weight)[2]
            if name not in self.second:
                self.second[name] = second.new_zeros(len(module.ranks), *second.shape[1:])
            self.second[name][k] += second[0]

    def close(self, k: int, task: str) -> None:
        """End a task.

        Args:
            k: its number.
            task: its name.

        Raises:
            NonFiniteError: if an input was not finite.
        """
        for name, second in self.second.items():
            _require_finite(second[k], name, task)

    def moments(self) -> dict[str, SpanMoments]:
        """Return what was collected.

        Returns:
            Layer -> its moments.
        """
        return {name: SpanMoments(second) for name, second in self.second.items()}


class InputSums:
    """Sums of x x' over the tasks, of one task at a time, and their products with each A_k; it implements ``Sums``.

    Args:
        modules: layers that read one tensor.
        inputs: what is collected.
        weights: layer -> the base's weight, for the unit "output", which takes one layer.
    """

    def __init__(self, modules: Mapping[str, ModuleStack], inputs: Inputs, weights: Mapping[str, Tensor]) -> None:
        self.modules, self.inputs = modules, inputs
        self.weights = {name: weights[name] for name in modules if name in weights}
        self.width = next(iter(modules.values())).A.shape[1]
        self.done: list[dict[str, Tensor]] = []
        self.total, self.task = torch.zeros(()), dict[str, Tensor]()
        self.products: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.own: dict[str, list[Tensor]] = {name: [] for name in modules}

    @property
    def size(self) -> int:
        """The bytes that they take."""
        squares = 4 if self.inputs.run == "merge" else 3  # one of them while a batch is added
        return 8 * self.width * (squares * self.width + sum(sum(m.ranks) for m in self.modules.values()))

    def add(self, k: int, x: Tensor, merged: Tensor, weight: Tensor) -> None:
        """Add tokens of task k.

        Args:
            k: number of the task.
            x: (t, d) inputs in the expert.
            merged: (t, d) inputs in the merge so far, or x itself.
            weight: (t,).
        """
        kind = torch.promote_types(x.dtype, torch.float32)
        one = x is merged
        x, merged = x.to(kind), merged.to(kind)
        weighted = merged * weight.to(kind)[:, None]
        parts = {"second": (merged.mT @ weighted).double()}
        if not one:
            parts["cross"] = (x.mT @ weighted).double()
        for name, module in self.modules.items():
            A = module.A.split(list(module.ranks))[k].to(x)
            parts[f"own {name}"] = lora_moments(x, A, weight=weight)[2][0]
        for name, W0 in self.weights.items():
            parts["output"] = (x @ self._expert(name, W0, k).to(x).mT).square().sum(1).double() @ weight.double()
        for key, part in parts.items():
            self.task[key] = self.task[key] + part if key in self.task else part

    def close(self, k: int, task: str) -> None:
        """End a task: its square matrix becomes products with A_k and a part of the sum.

        Args:
            k: its number.
            task: its name.

        Raises:
            NonFiniteError: if an input was not finite.
        """
        seen, self.task = self.task, {}
        second = seen["second"]
        cross = seen.get("cross", second)
        _require_finite(second, next(iter(self.modules)), task)
        _require_finite(cross, next(iter(self.modules)), task)
        unit = self._unit(k, second, seen)
        self.total = self.total.to(second) + unit * second
        norms = torch.stack([cross.norm(), second.norm()])
        self.done.append({"diagonal": unit * cross.diagonal(), "norms": unit * norms})
        for name, module in self.modules.items():
            A = module.A.split(list(module.ranks))[k].to(second)
            self.products[name].append(unit * A @ cross)
            self.own[name].append(unit * seen[f"own {name}"])

    def moments(self) -> dict[str, InputMoments]:
        """Return what was collected.

        Returns:
            Layer -> its moments.
        """
        diagonals, norms = (torch.stack([part[key] for part in self.done]) for key in ("diagonal", "norms"))
        return {
            name: InputMoments(self.total, torch.cat(self.products[name]), tuple(self.own[name]), diagonals, norms)
            for name in self.modules
        }

    def _unit(self, k: int, second: Tensor, seen: Mapping[str, Tensor]) -> Tensor:
        if self.inputs.unit == "one":
            return second.new_ones(())
        if self.inputs.unit == "norm":
            return 1 / second.norm().clamp_min(torch.finfo(torch.float64).tiny)
        ((name, W0),) = self.weights.items()
        return self._expert(name, W0, k).square().sum() / seen["output"]

    def _expert(self, name: str, W0: Tensor, k: int) -> Tensor:
        """W0 + D_k, float64."""
        module, ranks = self.modules[name], list(self.modules[name].ranks)
        A, B = module.A.split(ranks)[k].to(W0.device).double(), module.B.split(ranks, 1)[k].to(W0.device).double()
        return W0.double() + module.scales[k] * B @ A


def _require_finite(moments: Tensor, name: str, task: str) -> None:
    if not moments.isfinite().all():
        raise NonFiniteError(
            f"NaN or infinite activations enter {name} (task {task}); check the base's weights and dtype (float16"
            " overflows: use bfloat16)"
        )
