"""The linear layers of a dense transformer, in the order in which they run."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import nn

from nsc.bases.roles import STAGES
from nsc.bases.structure import block_of, linear_shapes
from nsc.errors import NSCError


@dataclass(frozen=True)
class Linear:
    """One linear layer of the base.

    Attributes:
        name: name in the body.
        m: out_features.
        d: in_features.
        place: number of its block, and its stage within the block (see ``nsc.bases.roles.STAGES``).
    """

    name: str
    m: int
    d: int
    place: tuple[int, int]

    @property
    def parameters(self) -> int:
        """Of its matrix."""
        return self.m * self.d


def linears_in_order(model: nn.Module) -> list[Linear]:
    """Return the linear layers of all blocks, in the order in which they run.

    Args:
        model: body of the base; shapes are enough.

    Returns:
        The layers.

    Raises:
        NSCError: for a body whose linear layers are not attention and MLP projections by their names, or that has other
            matrices than embeddings and patch convolutions: experts, recurrences, Conv1D.
    """
    _refuse_other_matrices(model)
    linears = []
    for name, (m, d) in linear_shapes(model).items():
        if place := block_of(model, name):
            stage = next((s for s, pattern in enumerate(STAGES) if re.search(pattern, name)), None)
            if stage is None:
                raise NSCError(f"no plan for {name}: nsc plan does not know it as an attention or MLP projection")
            linears.append(Linear(name, m, d, (place[0], stage)))
    if {linear.place[1] for linear in linears} != set(range(len(STAGES))):
        raise NSCError("no plan for this base: it has no numbered blocks with attention and MLP projections")
    return sorted(linears, key=lambda linear: linear.place)


def _refuse_other_matrices(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        owner = model.get_submodule(name.rpartition(".")[0])
        vectors = parameter.ndim < 2 or parameter.shape[0] == 1  # such as learned positions
        if "expert" in name or not (vectors or isinstance(owner, (nn.Linear, nn.Embedding, nn.Conv2d))):
            raise NSCError(
                f"no plan for {name}: nsc plan counts dense transformers, whose matrices are nn.Linear; experts,"
                " recurrences and GPT-2's Conv1D are not"
            )
