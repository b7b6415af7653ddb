"""Sums of x x', as wide as a layer's inputs: one for all tasks, or the tokens themselves where there are fewer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from nsc.adapters.stack import ModuleStack
from nsc.learning.sums import require_finite
from nsc.methods.equations import Gram
from nsc.methods.inputs import InputMoments, Inputs
from nsc.runtime.distributed import Team
from nsc_kernels import lora_moments


class TaskMoments(NamedTuple):
    """What is known of the inputs of one task, x in the expert and x~ in the merge so far.

    Attributes:
        product: a function A (r, d) -> A E[x x~'].
        diagonal: (d,) of E[x x~'].
        norms: (2,) Frobenius norms of E[x x~'] and E[x~ x~'].
        part: E[x~ x~'] (d, d), or the weighted tokens (t, d) of which it is the product.
    """

    product: Callable[[Tensor], Tensor]
    diagonal: Tensor
    norms: Tensor
    part: Tensor


def of_squares(second: Tensor, cross: Tensor) -> TaskMoments:
    """Return what matrices tell.

    Args:
        second: E[x~ x~'] (d, d).
        cross: E[x x~'] (d, d).

    Returns:
        The same of both.
    """
    norms = torch.stack([cross.norm(), second.norm()])
    return TaskMoments(lambda A: A @ cross, cross.diagonal(), norms, second)


def of_rows(x: Tensor, merged: Tensor) -> TaskMoments:
    """Return what tokens tell, without a matrix as wide as they are.

    Args:
        x: (t, d), times the roots of their weights.
        merged: (t, d), x~ times the same.

    Returns:
        What ``of_squares`` gives for their products.
    """
    gram = merged @ merged.mT
    squares = torch.stack([((x @ x.mT) * gram).sum(), gram.square().sum()])
    return TaskMoments(lambda A: (A @ x.mT) @ merged, (x * merged).sum(0), squares.clamp_min(0).sqrt(), merged)


class InputSums:
    """Sums of x x' over the tasks, of one task at a time, and their products with each A_k; it implements ``Sums``.

    Where there are fewer tokens than inputs, the tokens themselves are kept instead.

    Args:
        modules: layers that read one tensor.
        inputs: what is collected.
        weights: layer -> the base's weight, for the unit "output", which takes one layer.
        tokens: how many tokens of all tasks count.
    """

    def __init__(
        self, modules: Mapping[str, ModuleStack], inputs: Inputs, weights: Mapping[str, Tensor], tokens: int
    ) -> None:
        self.modules, self.inputs, self.tokens = modules, inputs, tokens
        self.weights = {name: weights[name] for name in modules if name in weights}
        self.width = next(iter(modules.values())).A.shape[1]
        self.task: dict[str, Tensor] = {}  # what is known of the task that is running
        self.rows: list[tuple[Tensor, Tensor]] = []  # x and x~ of its tokens, if they are kept
        self.done: list[tuple[Tensor, Tensor]] = []  # diagonal and norms of each task
        self.products: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.own: dict[str, list[Tensor]] = {name: [] for name in modules}
        self.total: list[Tensor] = []

    @property
    def size(self) -> int:
        """The bytes that they take."""
        squares = 4 if self.inputs.run == "merge" else 3  # one of them while a batch is added
        height = squares * min(self.width, self.tokens)
        return 8 * self.width * (height + sum(sum(m.ranks) for m in self.modules.values()))

    def add(self, k: int, x: Tensor, merged: Tensor, weight: Tensor) -> None:
        """Add tokens of task k.

        Args:
            k: number of the task.
            x: (t, d) inputs in the expert.
            merged: (t, d) inputs in the merge so far, or x itself.
            weight: (t,).
        """
        kind, one = torch.promote_types(x.dtype, torch.float32), x is merged
        x, merged, root = x.to(kind), merged.to(kind), weight.to(kind).sqrt()[:, None]
        parts = {}
        for name, module in self.modules.items():
            A = module.A.split(list(module.ranks))[k].to(x)
            parts[f"own {name}"] = lora_moments(x, A, weight=weight).second[0]
        for name, W0 in self.weights.items():
            parts["output"] = (x @ self._expert(name, W0, k).to(x).mT).square().sum(1).double() @ weight.double()
        seen = root * x
        made = seen if one else root * merged
        if self.tokens < self.width:
            self.rows.append((seen, made))
        else:
            parts["second"] = (made.mT @ made).double()
            parts["cross"] = parts["second"] if one else (seen.mT @ made).double()
        for key, part in parts.items():
            self.task[key] = self.task[key] + part if key in self.task else part

    def add_up(self, k: int, team: Team) -> None:
        """Add up what the ranks know of a task, and bring its tokens together, if they are kept.

        Args:
            k: number of the task.
            team: the processes.

        Raises:
            RankError: if a rank is lost.
        """
        if team.size == 1:
            return
        team.add_up(*{id(x): x for x in self.task.values()}.values())  # two of them may be one tensor
        device = next(iter(self.task.values())).device
        shares = team.gather([(x.cpu(), y.cpu()) for x, y in self.rows])
        self.rows = [(x.to(device), y.to(device)) for share in shares for x, y in share]

    def close(self, k: int, task: str) -> None:
        """End a task: what is known of it becomes products with A_k and a part of the sum.

        Args:
            k: its number.
            task: its name.

        Raises:
            NonFiniteError: if an input was not finite.
        """
        known, self.task = self.task, {}
        if self.rows:
            x, y = (torch.cat(side).double() for side in zip(*self.rows, strict=True))
            of, self.rows = of_rows(x, y), []
        else:
            of = of_squares(known["second"], known["cross"])
        require_finite(of.norms, next(iter(self.modules)), task)
        unit = self._unit(k, of, known)
        if self.tokens < self.width:
            self.total.append(unit.sqrt() * of.part)
        else:
            self.total = [unit * of.part + sum(self.total)]
        self.done.append((unit * of.diagonal, unit * of.norms))
        for name, module in self.modules.items():
            A = module.A.split(list(module.ranks))[k].to(of.norms)
            self.products[name].append(unit * of.product(A))
            self.own[name].append(unit * known[f"own {name}"])

    def moments(self) -> dict[str, InputMoments]:
        """Return what was collected.

        Returns:
            Layer -> its moments.
        """
        second = Gram.of(rows=torch.cat(self.total)) if self.tokens < self.width else Gram.of(self.total[0])
        diagonals, norms = map(torch.stack, zip(*self.done, strict=True))
        return {
            name: InputMoments(second, torch.cat(self.products[name]), tuple(self.own[name]), diagonals, norms)
            for name in self.modules
        }

    def _unit(self, k: int, of: TaskMoments, known: Mapping[str, Tensor]) -> Tensor:
        if self.inputs.unit == "one":
            return of.norms.new_ones(())
        if self.inputs.unit == "norm":
            return 1 / of.norms[1].clamp_min(torch.finfo(torch.float64).tiny)
        ((name, W0),) = self.weights.items()
        return self._expert(name, W0, k).square().sum() / known["output"]

    def _expert(self, name: str, W0: Tensor, k: int) -> Tensor:
        """W0 + D_k, float64."""
        module, ranks = self.modules[name], list(self.modules[name].ranks)
        A, B = module.A.split(ranks)[k].to(W0.device).double(), module.B.split(ranks, 1)[k].to(W0.device).double()
        return W0.double() + module.scales[k] * B @ A
