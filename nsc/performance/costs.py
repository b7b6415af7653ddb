"""FLOPs, bytes and memory of a step, from the shapes of a body and the ranks on it. Nothing is run.

A step is one forward of the frozen base up to the input of the last target, and one backward for the gradients of
activations, from there down to the first LoRA module, whose own input needs none. Two exact ways to carry the adapters
of a linear (m, d), n rows and R ranks in all, cost beyond that

    factors: y += (u * c) B'      4 n R (d + m)           weights: W + B diag(c) A      2 n d m + 4 R d m

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from nsc.bases.structure import block_of, is_causal, linear_shapes
from nsc.config import PLANS
from nsc.performance.linears import Linear
from nsc_kernels.modules import extra_flops, layer_plan


@dataclass(frozen=True)
class Work:
    """One part of a step.

    Attributes:
        part: name of the part.
        flops: FLOPs of the part.
        bytes: bytes that the part moves.
    """

    part: str
    flops: float
    bytes: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Return the time that its FLOPs or its bytes take, whichever is longer.

        Args:
            rate: FLOP/s.
            bandwidth: bytes/s.

        Returns:
            Seconds.
        """
        return max(self.flops / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class LayerKind:
    """All modules of one name and shape that carry LoRA.

    Attributes:
        kind: last part of their name.
        modules: how many there are.
        shape: (m, d).
        R: ranks of all adapters on one of them.
        plan: "factors" or "weights".
    """

    kind: str
    modules: int
    shape: tuple[int, int]
    R: int
    plan: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device for a step in one pass.

    Attributes:
        weights: the body as it is loaded.
        factors: A and B of all adapters.
        coefficients: with gradient and AdamW's moments.
        activations: kept for the backward; grows with ``samples``.
        checkpointed: kept instead with activation checkpointing; grows with ``samples``.
        workspace: live within a layer; grows with ``samples``.
        samples: samples of a step.
        linears: share of the weights that 8 bits would hold.
        block: weights of the largest block.
    """

    weights: float
    factors: float
    coefficients: float
    activations: float
    checkpointed: float
    workspace: float
    samples: int
    linears: float
    block: float

    @property
    def total(self) -> float:
        """All of it, without checkpointing."""
        return self.weights + self.factors + self.coefficients + self.activations + self.workspace

    def samples_within(self, room: float) -> int:
        """Return how many samples of one pass fit beside everything else.

        Args:
            room: bytes.

        Returns:
            From 0 to ``samples``.
        """
        left = room - (self.weights + self.factors + self.coefficients)
        return min(max(int(left * self.samples / (self.activations + self.workspace)), 0), self.samples)

    def in_8_bits(self, itemsize: int) -> Memory:
        """Return the memory with one byte per weight of linear layers.

        Args:
            itemsize: bytes per weight now.

        Returns:
            The memory.
        """
        return replace(self, weights=self.weights - self.linears * (1 - 1 / itemsize))

    def sharded(self, devices: int) -> Memory:
        """Return the memory with split linear layers, the rest replicated, and room for a block of gathered weights.

        Args:
            devices: number of devices that share the linear layers.

        Returns:
            The memory of each device.
        """
        return replace(self, weights=self.weights - self.linears * (1 - 1 / devices) + self.block)

    def fewest_shards(self, room: float) -> int | None:
        """Return how many devices it takes to hold the sharded base with one sample per pass.

        Args:
            room: bytes of each device.

        Returns:
            The fewest devices, or None if none are enough.
        """
        sample = (self.activations + self.workspace) / self.samples
        left = room - (self.weights - self.linears) - self.block - self.factors - self.coefficients - sample
        return math.ceil(self.linears / left) if left > 0 else None


@dataclass(frozen=True)
class Step:
    """One step, by its shapes.

    Attributes:
        model: body of the base; shapes are enough.
        linears: linear layers in the order in which they run.
        ranks: linear layer -> R, the ranks of all adapters on it.
        targets: names of the measured layers.
        tasks: K.
        samples: samples of a step, all tasks together.
        tokens: tokens of each sample.
        itemsize: bytes per weight.
        whole: whether the forward runs to its end, as for outputs, and no ratio is measured.
    """

    model: nn.Module
    linears: Sequence[Linear]  # in the order in which they run
    ranks: Mapping[str, int]
    targets: Sequence[str]
    tasks: int
    samples: int
    tokens: int
    itemsize: int
    whole: bool = False

    @property
    def rows(self) -> int:
        """The tokens of all samples, n."""
        return self.samples * self.tokens

    @property
    def last(self) -> Linear:
        """The target that is reached last: the forward stops at its input."""
        return [linear for linear in self.linears if linear.name in self.targets][-1]

    @property
    def end(self) -> tuple[float, ...]:
        """The place up to which the forward runs."""
        return (math.inf,) if self.whole else self.last.place

    @property
    def first(self) -> Linear:
        """The first module that carries LoRA: no gradient is needed of its input."""
        return next(linear for linear in self.linears if linear.name in self.ranks)

    @property
    def forward(self) -> Sequence[Linear]:
        """The linears of the base that run."""
        return self.linears if self.whole else self.linears[: self.linears.index(self.last)]

    @property
    def backward(self) -> Sequence[Linear]:
        """Those of them that a gradient passes through."""
        return [x for x in self.forward if self.first.place < x.place < self.end]

    def work(self, plan: str = "auto") -> list[Work]:
        """Return the work of a step: forward and backward of the base, attention, adapters and ratios.

        Args:
            plan: "factors", "weights", or "auto", the cheaper for each layer.

        Returns:
            The parts; the first two are the base alone.
        """
        e, n = self.itemsize, self.rows
        ahead, patches = self._ahead()
        before = 2 * (n * ahead + self.samples * (self.tokens - 1) * patches)
        weights = [sum(x.parameters for x in part) for part in (self.forward, self.backward)]
        targets = [x for x in self.linears if x.name in self.targets and not self.whole]
        return [
            Work("base, forward", before + 2 * n * weights[0], e * (ahead + patches + weights[0])),
            Work("base, backward", 2 * n * weights[1], e * weights[1]),
            Work("attention", self._attention(), 0),
            *self._adapters(plan),
            Work("ratios", sum(n * (6 * x.d + 4 * self.ranks[x.name] / self.tasks) for x in targets), 0),
        ]

    def kinds(self, plan: str = "auto") -> list[LayerKind]:
        """Group the modules with LoRA by name, shape and ranks.

        Args:
            plan: "factors", "weights" or "auto".

        Returns:
            One entry per group, with how it applies its adapters.
        """

        def key(x: Linear) -> tuple[str, int, int, int]:
            return x.name.rsplit(".", 1)[-1], x.m, x.d, self.ranks[x.name]

        groups = groupby(sorted((x for x in self.linears if x.name in self.ranks), key=key), key)
        return [LayerKind(k, len(list(g)), (m, d), R, self._plan(plan, d, m, R)) for (k, m, d, R), g in groups]

    def memory(self) -> Memory:
        """Count the memory of a step in one pass.

        Counted are the weights of the whole body; A and B in its dtype; for each block that a gradient passes, the
        inputs of its norms, q, k, v (for every head) and the output of fused attention, what the MLP's activation reads
        and writes, and u of every module with LoRA; z of every target; three times the widest output, and a norm's
        float32.

        Returns:
            Bytes by part.
        """
        e, linears = self.itemsize, sum(x.parameters for x in self.linears)
        carried = [x for x in self.linears if x.name in self.ranks]
        blocks = list(self._saved_by_block())
        width, widest = self.linears[0].d, max(x.m for x in self.linears)
        inputs = self.rows * e * width * len(blocks)
        return Memory(
            weights=e * sum(p.numel() for p in self.model.parameters()),
            factors=e * sum((x.d + x.m) * self.ranks[x.name] for x in carried),
            coefficients=16 * len(carried) * self.tasks,
            activations=self.rows * sum(blocks),
            checkpointed=inputs + self.rows * max(blocks),
            workspace=self.rows * (3 * e * widest + 8 * width),
            samples=self.samples,
            linears=e * linears,
            block=e * max(sum(x.parameters for x in g) for _, g in groupby(self.linears, lambda x: x.place[0])),
        )

    def _ahead(self) -> tuple[int, int]:
        """Weights that are multiplied before the first block: with every token, and with every patch of an image."""
        names = list(linear_shapes(self.model).items())
        first = next(i for i, (name, _) in enumerate(names) if block_of(self.model, name))
        patches = sum(x.weight.numel() for x in self.model.modules() if isinstance(x, nn.Conv2d))
        return sum(m * d for _, (m, d) in names[:first]), patches

    def _attention(self) -> float:
        """Two products forward, four backward, with every pair of tokens, or every pair in order."""
        pairs = self.rows * ((self.tokens + 1) / 2 if is_causal(self.model) else self.tokens)
        outputs = [x for x in self.linears if x.place[1] == 1 and x.place <= self.end]
        return sum(4 * pairs * x.d * (3 if self.first.place < x.place else 1) for x in outputs)

    def _adapters(self, plan: str) -> Iterator[Work]:
        """Of the modules that run. Rows are read and written once by every kernel; at a target only u is needed."""
        e, n = self.itemsize, self.rows
        for way in PLANS:
            flops = moved = 0
            for x in (x for x in self.linears if x.name in self.ranks):
                m, d, R = x.m, x.d, self.ranks[x.name]
                if x in self.forward and self._plan(plan, d, m, R) == way:
                    flops += extra_flops(way, n, d, m, R)
                    moved += 2 * R * (d + m) + (3 * n * (d + m + R) if way == "factors" else 4 * d * m + n * (d + m))
                elif x not in self.forward and x.name in self.targets and way == "factors":
                    flops += extra_flops("factors", n, d, 0, R)
                    moved += 2 * R * d + 3 * n * d + 2 * n * R
            if flops:
                yield Work(f"adapters as {way}", flops, e * moved)

    def _plan(self, plan: str, d: int, m: int, R: int) -> str:
        return layer_plan(self.rows, d, m, R) if plan == "auto" else plan

    def _saved_by_block(self) -> Iterator[float]:
        """Bytes a row that every block from the first LoRA module to the last target keeps for the backward."""
        e = self.itemsize
        layer_norm = any(isinstance(x, nn.LayerNorm) for x in self.model.modules())
        for block, members in groupby(self.linears, lambda x: x.place[0]):
            if not self.first.place[0] <= block <= self.end[0]:
                continue
            linears = list(members)
            norm = linears[0].d * (e if layer_norm else 4)  # RMS norms are computed in float32
            run = [x for x in linears if x.place < self.end]
            middle = [x for x in self.forward if x.place == (block, 2)]
            gated = len(middle) > 1 or any("gate_up" in x.name for x in middle)
            attention = 4 * sum(x.d for x in run if x.place[1] == 1)
            mlp = sum(x.m for x in middle) * (1.5 if gated else 1)
            carried = sum(self.ranks.get(x.name, 0) for x in linears if x in run or x.name in self.targets)
            seen = sum(x.d for x in linears if x.name in self.targets and not self.whole)
            yield norm * (2 if any(x.place[1] == 1 for x in run) else 1) + e * (attention + mlp + carried + seen)
