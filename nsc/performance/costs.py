"""FLOPs, bytes and memory of a step, from the shapes of a body and the ranks on it. Nothing is run.

A step is one forward of the frozen base up to the input of the last target, and one backward for the gradients of
activations, from there down to the first LoRA module, whose own input needs none. Two exact ways to carry the adapters
of a linear (m, d), n rows and R ranks in all, cost beyond that

    factors: y += (u * c) B'      4 n R (d + m)           weights: W + B diag(c) A      2 n d m + 4 R d m

Paper: https://arxiv.org/abs/2603.26317, Eq. 5 (the merged model).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from torch import nn

from nsc.adapters.surgery import PLANS, extra_flops, layer_plan
from nsc.bases.roles import STAGES
from nsc.bases.structure import block_of, is_causal, linear_shapes
from nsc.errors import NSCError


@dataclass(frozen=True)
class Linear:
    """A linear layer (m, d) of the base. place: block and stage (see STAGES)."""

    name: str
    m: int
    d: int
    place: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Of its matrix."""
        return self.m * self.d


@dataclass(frozen=True)
class Work:
    """A part of a step."""

    part: str
    flops: float
    bytes: float

    def seconds(self, rate: float, bandwidth: float) -> float:
        """What its FLOPs or its bytes take at so many a second, whichever is longer."""
        return max(self.flops / rate, self.bytes / bandwidth)


@dataclass(frozen=True)
class LayerKind:
    """All modules of one name and shape that carry LoRA.  shape: (m, d).  R: of one module.  plan: factors, weights."""

    kind: str
    modules: int
    shape: tuple[int, int]
    R: int
    plan: str


@dataclass(frozen=True)
class Memory:
    """Bytes on one device for a step in one pass.

    weights: the body as it is loaded.  factors: A and B.  coefficients: with gradient and AdamW's moments.
    activations: kept for the backward.  checkpointed: kept instead with activation checkpointing.  workspace: live
    within a layer.  The last three grow with ``samples``, those of a step.  linears: the share of weights that 8 bits
    would hold.  block: weights of the largest block.
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
        """How many samples of one pass fit into ``room`` bytes beside everything else; 0 where not one does."""
        left = room - (self.weights + self.factors + self.coefficients)
        return min(max(int(left * self.samples / (self.activations + self.workspace)), 0), self.samples)

    def in_8_bits(self, itemsize: int) -> Memory:
        """Linears of one byte a weight, where they had ``itemsize``."""
        return replace(self, weights=self.weights - self.linears * (1 - 1 / itemsize))

    def sharded(self, devices: int) -> Memory:
        """Linears split over ``devices``, all else on each of them, and room for a block of gathered weights."""
        return replace(self, weights=self.weights - self.linears * (1 - 1 / devices) + self.block)

    def fewest_shards(self, room: float) -> int | None:
        """The fewest devices of ``room`` bytes each that hold it ``sharded``, a sample a pass; None where none do."""
        sample = (self.activations + self.workspace) / self.samples
        left = room - (self.weights - self.linears) - self.block - self.factors - self.coefficients - sample
        return math.ceil(self.linears / left) if left > 0 else None


def linears_in_order(model: nn.Module) -> list[Linear]:
    """The linears of all blocks, in the order in which they run.

    Raises NSCError for a body whose linears are not attention and MLP projections by their names, or whose other
    matrices are more than embeddings and patch convolutions: experts, recurrences, Conv1D.
    """
    _refuse_other_matrices(model)
    found = []
    for name, (m, d) in linear_shapes(model).items():
        if place := block_of(model, name):
            stage = next((s for s, pattern in enumerate(STAGES) if re.search(pattern, name)), None)
            if stage is None:
                raise NSCError(f"no plan for {name}: it is no attention or MLP projection that nsc plan knows by name")
            found.append(Linear(name, m, d, (place[0], stage)))
    if {linear.place[1] for linear in found} != set(range(len(STAGES))):
        raise NSCError("no plan for this base: it has no numbered blocks of attention and MLP projections")
    return sorted(found, key=lambda linear: linear.place)


def _refuse_other_matrices(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        vectors = parameter.ndim < 2 or parameter.shape[0] == 1  # such as learned positions
        if "expert" in name or not (vectors or isinstance(owner, (nn.Linear, nn.Embedding, nn.Conv2d))):
            raise NSCError(
                f"no plan for {name}: nsc plan counts dense transformers, whose matrices are nn.Linear; experts,"
                " recurrences and GPT-2's Conv1D are not"
            )


@dataclass(frozen=True)
class Step:
    """One step: a body, the ranks R on its linears, the target layers, and ``samples`` of ``tokens`` tokens each."""

    model: nn.Module
    linears: Sequence[Linear]  # in the order in which they run
    ranks: Mapping[str, int]
    targets: Sequence[str]
    tasks: int
    samples: int
    tokens: int
    itemsize: int

    @property
    def rows(self) -> int:
        """n: tokens of all samples."""
        return self.samples * self.tokens

    @property
    def last(self) -> Linear:
        """The target that is reached last: the forward stops at its input."""
        return [linear for linear in self.linears if linear.name in self.targets][-1]

    @property
    def first(self) -> Linear:
        """The first module that carries LoRA: no gradient is needed of its input."""
        return next(linear for linear in self.linears if linear.name in self.ranks)

    @property
    def forward(self) -> Sequence[Linear]:
        """The linears of the base that run."""
        return self.linears[: self.linears.index(self.last)]

    @property
    def backward(self) -> Sequence[Linear]:
        """Those of them that a gradient passes through."""
        return [x for x in self.forward if self.first.place < x.place < self.last.place]

    def work(self, plan: str = "auto") -> list[Work]:
        """Forward and backward of the base, attention, adapters and ratios."""
        e, n = self.itemsize, self.rows
        ahead, patches = self._ahead()
        before = 2 * (n * ahead + self.samples * (self.tokens - 1) * patches)
        weights = [sum(x.parameters for x in part) for part in (self.forward, self.backward)]
        targets = [x for x in self.linears if x.name in self.targets]
        return [
            Work("base, forward", before + 2 * n * weights[0], e * (ahead + patches + weights[0])),
            Work("base, backward", 2 * n * weights[1], e * weights[1]),
            Work("attention", self._attention(), 0),
            *self._adapters(plan),
            Work("ratios", sum(n * (6 * x.d + 4 * self.ranks[x.name] / self.tasks) for x in targets), 0),
        ]

    def kinds(self, plan: str = "auto") -> list[LayerKind]:
        """The modules with LoRA by name, shape and ranks, and how each is carried."""

        def key(x: Linear) -> tuple[str, int, int, int]:
            return x.name.rsplit(".", 1)[-1], x.m, x.d, self.ranks[x.name]

        groups = groupby(sorted((x for x in self.linears if x.name in self.ranks), key=key), key)
        return [LayerKind(k, len(list(g)), (m, d), R, self._plan(plan, d, m, R)) for (k, m, d, R), g in groups]

    def memory(self) -> Memory:
        """What is counted: the weights of the whole body; A and B in its dtype; for each block that a gradient passes,
        the inputs of its norms, q, k, v (for every head) and the output of fused attention, what the MLP's activation
        reads and writes, u of every module with LoRA; z of every target; three times the widest output, and a norm's
        float32.
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
        outputs = [x for x in self.linears if x.place[1] == 1 and x.place <= self.last.place]
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
                    flops += 4 * n * d * R
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
            if not self.first.place[0] <= block <= self.last.place[0]:
                continue
            linears = list(members)
            norm = linears[0].d * (e if layer_norm else 4)  # RMS norms are computed in float32
            run = [x for x in linears if x.place < self.last.place]
            middle = [x for x in self.forward if x.place == (block, 2)]
            gated = len(middle) > 1 or any("gate_up" in x.name for x in middle)
            attention = 4 * sum(x.d for x in run if x.place[1] == 1)
            mlp = sum(x.m for x in middle) * (1.5 if gated else 1)
            carried = sum(self.ranks.get(x.name, 0) for x in linears if x in run or x.name in self.targets)
            seen = sum(x.d for x in linears if x.name in self.targets)
            yield norm * (2 if any(x.place[1] == 1 for x in run) else 1) + e * (attention + mlp + carried + seen)
