"""A frozen linear layer plus one LoRA adapter whose factors train, given from outside before each forward.

    y = base(z) + (z A') B'

Autograd keeps z and u = z A' for the backward, as of any linear layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TrainableLoRALinear(nn.Module):
    """A frozen linear layer plus one adapter of scale 1, whose factors are no parameters of its own.

    Attributes:
        base: as given.
        lora_A: (r, d), replaced between forwards, for instance by a view of one long vector that is optimised.
        lora_B: (m, r), likewise.

    Args:
        base: any module mapping (..., d) to (..., m), left as it is.
        lora_A: (r, d) down-projection.
        lora_B: (m, r) up-projection.

    Raises:
        ValueError: if the shapes do not fit together.

    Source: https://arxiv.org/abs/2106.09685 (LoRA).
    """

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(f"lora_A {tuple(lora_A.shape)} and lora_B {tuple(lora_B.shape)} must be (r, d) and (m, r)")
        self.base = base
        self.lora_A, self.lora_B = lora_A, lora_B

    def forward(self, z: Tensor) -> Tensor:
        """Return the output of the layer with its adapter.

        Args:
            z: (..., d), any floating dtype that the base takes.

        Returns:
            (..., m) in the dtype of the base's output. Differentiable in z and both factors.
        """
        y = self.base(z)
        u = F.linear(z, self.lora_A.to(z))
        added = torch.addmm(y.flatten(0, -2), u.flatten(0, -2).to(y.dtype), self.lora_B.to(y).mT)
        return added.view_as(y)

    @property
    def weight(self) -> Tensor:
        """The weight of the base alone (m, d), as PEFT's layers show it."""
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base (m,), or None."""
        return self.base.bias  # type: ignore[return-value]
