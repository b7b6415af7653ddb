"""Adapters -> per-module stacked factors: the form in which the merged model runs and everything is exported.

A module's ``A`` (R, d) and ``B`` (m, R) hold all K adapters, segment k of rank r_k, which is 0 where adapter k does not
touch the module. ``whitened`` gives every segment of ``A`` orthonormal rows without changing any product B_k A_k.

A layer that adapters have fine-tuned whole, such as LLaVA's projector, is a row of the coefficients like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce as fold
from itertools import islice

import torch
from torch import Tensor

from nsc.adapters.lora import Adapter
from nsc.adapters.tensor_file import read, trim_memory
from nsc_kernels import GramCache, GramFactor

GRAMS_AT_ONCE = 16


@dataclass(frozen=True)
class ModuleStack:
    """One linear layer with all adapters side by side.

    Attributes:
        A_blocks: the rows of A in one or more tensors, as the adapters hold them, so that no copy is kept.
        B_blocks: the columns of B, likewise.
        ranks: r_k, 0 for an absent adapter.
        scales: s_k.
        grams: factors of each A_k's Gram matrix, None for an absent adapter.
        gram_inverse: (R, R) block-diagonal; None once whitened.
        by_rank: whether each row of A has its own coefficient; else each adapter has one.
    """

    A_blocks: tuple[Tensor, ...]
    B_blocks: tuple[Tensor, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    grams: tuple[GramFactor | None, ...]
    gram_inverse: Tensor | None
    by_rank: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """Of A and B: that to which all blocks are promoted."""
        return fold(torch.promote_types, [block.dtype for block in (*self.A_blocks, *self.B_blocks)])

    @property
    def A(self) -> Tensor:
        """All rows, (R, d), put together anew each time; segment k holds the r_k rows of adapter k."""
        return _together(self.A_blocks, self.dtype, 0)

    @property
    def B(self) -> Tensor:
        """All columns, (m, R), put together likewise."""
        return _together(self.B_blocks, self.dtype, 1)

    @property
    def present(self) -> list[bool]:
        """Which adapters touch this module."""
        return [r > 0 for r in self.ranks]

    @property
    def owned(self) -> list[bool]:
        """Which of its coefficients exist: one per row of A by rank, else one per adapter that touches it."""
        return [True] * sum(self.ranks) if self.by_rank else self.present

    def only(self, k: int) -> ModuleStack:
        """Return one adapter alone.

        Args:
            k: its number.

        Returns:
            The layer with that adapter.
        """
        ranks = list(self.ranks)
        A, B = self.A.split(ranks)[k], self.B.split(ranks, 1)[k].contiguous()
        return ModuleStack((A,), (B,), (self.ranks[k],), (self.scales[k],), (self.grams[k],), None)

    def delta(self, coefficients: Tensor) -> Tensor:
        """Return the merged update.

        Args:
            coefficients: one row of lam.

        Returns:
            (m, d) float64: sum_k lam_k s_k B_k A_k.
        """
        return (self.B.double() * self.column_weights(coefficients)) @ self.A.double()

    def column_weights(self, coefficients: Tensor) -> Tensor:
        """Return the weight of each rank row.

        Args:
            coefficients: (K,), or by rank at least R values.

        Returns:
            (R,) float64: lam_k s_k on segment k, or by rank the coefficient of each row times s_k.
        """
        ranks = torch.tensor(self.ranks)
        scales = torch.tensor(self.scales, dtype=torch.float64).repeat_interleave(ranks)
        coefficients = coefficients.double().cpu()
        each = coefficients[: len(scales)] if self.by_rank else coefficients.repeat_interleave(ranks)
        return (each * scales).to(self.A_blocks[0].device)


@dataclass(frozen=True)
class DenseStack:
    """One linear layer that P of K adapters fine-tuned whole.

    Attributes:
        deltas: (P, m, d), W_k - W0.
        bias_deltas: (P, m), b_k - b0; None for a layer without bias.
        present: (K,) which adapters fine-tuned it.
    """

    deltas: Tensor
    bias_deltas: Tensor | None
    present: list[bool]

    @property
    def owned(self) -> list[bool]:
        """Which of its coefficients exist."""
        return self.present

    def only(self, k: int) -> DenseStack:
        """Return what one adapter made of the layer.

        Args:
            k: its number.

        Returns:
            The layer with that adapter.
        """
        p = sum(self.present[:k])
        biases = None if self.bias_deltas is None else self.bias_deltas[p : p + 1]
        return DenseStack(self.deltas[p : p + 1], biases, [True])

    def delta(self, coefficients: Tensor) -> Tensor:
        """Return the merged update.

        Args:
            coefficients: (K,).

        Returns:
            (m, d) float64: sum_k lam_k (W_k - W0).
        """
        return self._sum(self.deltas, coefficients)

    def bias_delta(self, coefficients: Tensor) -> Tensor | None:
        """Return the merged update of the bias.

        Args:
            coefficients: (K,).

        Returns:
            (m,) float64: sum_k lam_k (b_k - b0); None for a layer without bias.
        """
        return None if self.bias_deltas is None else self._sum(self.bias_deltas, coefficients)

    def _sum(self, deltas: Tensor, coefficients: Tensor) -> Tensor:
        own = coefficients.double().cpu()[: len(self.present)][self.present].to(deltas.device)
        return torch.tensordot(own, deltas.double(), dims=1)


@dataclass(frozen=True)
class Stack:
    """All layers that any adapter changes.

    Attributes:
        tasks: names, in the order of the columns of the coefficients.
        modules: layers with LoRA.
        dense: layers that adapters fine-tuned whole.
        order: names of both kinds in the base's own order; empty where all carry LoRA and ``modules`` is in that order.
    """

    tasks: tuple[str, ...]
    modules: dict[str, ModuleStack]
    dense: dict[str, DenseStack] = field(default_factory=dict)
    order: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """Module names, the rows of the coefficients."""
        return list(self.order or self.modules)

    @property
    def present(self) -> Tensor:
        """Which adapter touches which module: (M, K) bool."""
        return torch.tensor([self.layer(name).present for name in self.names], dtype=torch.bool)

    def layer(self, name: str) -> ModuleStack | DenseStack:
        """Return a layer of either kind.

        Args:
            name: name of the layer.

        Returns:
            Its adapters.
        """
        return self.dense[name] if name in self.dense else self.modules[name]

    @property
    def by_rank(self) -> bool:
        """Whether the coefficients are those of rank rows."""
        return any(module.by_rank for module in self.modules.values())

    @property
    def owned(self) -> Tensor:
        """Which coefficients exist: (M, C) bool; C is K, or by rank as many as the longest row of them takes."""
        rows = [self.layer(name).owned for name in self.names]
        width = max(map(len, rows))
        return torch.tensor([[*row, *[False] * (width - len(row))] for row in rows], dtype=torch.bool)

    def only(self, task: str) -> Stack:
        """Return one adapter alone, on the layers that it touches, with one coefficient for each of them.

        Args:
            task: its task.

        Returns:
            The stack of that adapter.
        """
        k = self.tasks.index(task)
        modules = {name: m.only(k) for name, m in self.modules.items() if m.ranks[k]}
        dense = {name: layer.only(k) for name, layer in self.dense.items() if layer.present[k]}
        return Stack((task,), modules, dense, tuple(name for name in self.names if name in modules or name in dense))

    def by_task(self, values: Tensor, reduce: Callable[[Tensor], Tensor], absent: float = 0) -> Tensor:
        """Bring values of coefficients to one per module and task.

        Args:
            values: (M, C).
            reduce: of an adapter's rank rows, where each has its own coefficient.
            absent: value of an adapter that does not touch the module.

        Returns:
            (M, K).
        """
        return torch.stack([self._row(name, row, reduce, absent) for name, row in zip(self.names, values, strict=True)])

    def _row(self, name: str, row: Tensor, reduce: Callable[[Tensor], Tensor], absent: float) -> Tensor:
        layer = self.layer(name)
        if isinstance(layer, DenseStack) or not layer.by_rank:
            return row[: len(self.tasks)]
        parts = row[: sum(layer.ranks)].split(layer.ranks)
        return torch.stack([reduce(part) if len(part) else part.new_tensor(absent) for part in parts])


def stack_adapters(
    adapters: Mapping[str, Adapter],  # by task
    matches: Mapping[str, Mapping[str, str]],  # task -> adapter's module name -> base's module name
    shapes: Mapping[str, tuple[int, int]],  # the base's linears, in the model's own order -> (out, in)
    dense: Mapping[str, DenseStack] | None = None,  # base's module name -> what adapters fine-tuned whole
) -> Stack:
    """Put the factors of all adapters side by side, module by module, in the dtype they are stored in.

    Args:
        adapters: task -> adapter.
        matches: task -> adapter's module name -> base's.
        shapes: linear layers of the base, in the model's own order -> (out, in).
        dense: base's module name -> what adapters fine-tuned whole.

    Returns:
        The stack; dtypes that differ are promoted.
    """
    dense = dict(dense or {})
    by_base = {task: {base: name for name, base in matches[task].items()} for task in adapters}
    names = [name for name in shapes if any(name in by_base[task] for task in adapters)]
    found = {
        name: [
            a.factors[by_base[t][name]].narrowed(shapes[name][1]) if name in by_base[t] else None
            for t, a in adapters.items()
        ]
        for name in names
    }
    grams = _grams(f.A for row in found.values() for f in row if f is not None)
    modules = {}
    for name, row in found.items():
        here = [f for f in row if f is not None]
        factored = tuple(next(grams) if f is not None else None for f in row)
        modules[name] = ModuleStack(
            A_blocks=tuple(f.A for f in here),
            B_blocks=tuple(f.B for f in here),
            ranks=tuple(f.rank if f is not None else 0 for f in row),
            scales=tuple(f.scale if f is not None else 0.0 for f in row),
            grams=factored,
            gram_inverse=torch.block_diag(*[g.inverse for g in factored if g is not None]),
        )
    return Stack(tuple(adapters), modules, dense, tuple(name for name in shapes if name in modules or name in dense))


def _together(blocks: Sequence[Tensor], dtype: torch.dtype, dim: int) -> Tensor:
    parts = [read(block).to(dtype) for block in blocks]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _grams(lora_A: Iterable[Tensor]) -> Iterator[GramFactor]:
    """The Gram factors of all, in batches of which each is in memory alone."""
    remaining = iter(lora_A)
    while batch := list(islice(remaining, GRAMS_AT_ONCE)):
        yield from GramCache().factor([read(A) for A in batch])
        trim_memory()


def whitened(stack: Stack) -> Stack:
    """Return the same products B_k A_k with orthonormal rows in every A_k.

    Rows with their own coefficients are left as they are, since another basis would mix them.

    Args:
        stack: the adapters.

    Returns:
        The stack in float64, until it is placed in a model.
    """
    return replace(stack, modules={n: m if m.by_rank else _whiten(m) for n, m in stack.modules.items()})


def by_rank(stack: Stack) -> Stack:
    """Return the same adapters with one coefficient per row of every A_k; a layer fine-tuned whole keeps one per task.

    Args:
        stack: the adapters.

    Returns:
        The stack.
    """
    return replace(stack, modules={name: replace(module, by_rank=True) for name, module in stack.modules.items()})


def _whiten(module: ModuleStack) -> ModuleStack:
    factored = [g for g in module.grams if g is not None]
    whiten = torch.block_diag(*[g.whiten for g in factored])
    unwhiten = torch.block_diag(*[g.unwhiten for g in factored])
    A, B = whiten @ module.A.double(), module.B.double() @ unwhiten
    return replace(module, A_blocks=(A,), B_blocks=(B,), gram_inverse=None)
