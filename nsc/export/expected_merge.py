"""What a written folder is held against: the merge in memory, truncated or rounded as its file has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from nsc.adapters.stack import Stack
from nsc.adapters.surgery import copied, merged_layers
from nsc.batch import Batch
from nsc.methods import LowRank
from nsc.recipes.merged_factors import MergedFactors
from nsc.recipes.updates import Merged, as_stack, dense, parameter_update, whole_updates


@torch.no_grad()
def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """Return the last hidden states of the tokens that count.

    Args:
        model: body of the base, carrying a merge or not.
        batch: rows on the model's device.

    Returns:
        (n, d) float64 on the CPU, without padding.
    """
    states = model(**batch.arguments(next(model.parameters()).dtype))[0]
    counts = batch.weight > 0
    return (states.flatten(0, -2) if counts.all() else states[counts]).double().cpu()


@dataclass(frozen=True)
class Merge:
    """What should have been written.

    Attributes:
        merged: the merge.
        factors: module -> the factors made of it; none where the whole model is written.
        prefix: what module names carry before the body's own.
        whole: parameter -> what it is merged to, of layers that adapters fine-tuned whole.
    """

    merged: Merged
    factors: Mapping[str, MergedFactors]
    prefix: str
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Of all layers."""
        return self.merged.names

    def update(self, parameter: str) -> Tensor | None:
        """Return the update of a parameter, straight from the adapters' own factors.

        Args:
            parameter: name of the parameter in the body.

        Returns:
            (m, d) or (m,) float64 on the CPU; None where there is none.
        """
        return parameter_update(self.merged, parameter)

    def hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the hidden states of the merged model in memory, or of the truncated one where the merge is truncated.

        Args:
            model: body of the base.
            batch: rows on the model's device.

        Returns:
            (n, d) float64 on the CPU, as ``hidden_states`` gives them.
        """
        truncated = any(f.error for f in self.factors.values())
        stack, lam = self._truncated() if truncated else self.merged.in_model()
        with merged_layers(model, stack, lam.to(batch.weight.device)):
            return hidden_states(model, batch)

    def rounded_states(self, model: nn.Module, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return the hidden states of the merge with weights rounded as a file has them.

        A router takes a sum that is rounded otherwise for another choice of experts.

        Args:
            model: body of the base.
            batch: rows on the model's device.
            dtype: of the file.

        Returns:
            (n, d) float64 on the CPU, as ``hidden_states`` gives them.
        """
        with copied(model, self.names) as held:
            for name, (stored, base) in held.items():
                stored.copy_((base.double() + dense(self.merged.update(name)).to(base.device)).to(dtype))
            return hidden_states(model, batch)

    def _truncated(self) -> tuple[Stack, Tensor]:
        whole = whole_updates(self.merged)
        updates: dict[str, LowRank | Tensor] = {name: LowRank(f.B, f.A) for name, f in self.factors.items()}
        updates |= {name: whole[f"{name}.weight"] for name in self.merged.whole}
        stack = as_stack(updates, {name: whole[f"{name}.bias"] for name in updates if f"{name}.bias" in whole})
        return stack, torch.ones(len(updates), 1)
