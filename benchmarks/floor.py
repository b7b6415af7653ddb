"""What no step can undercut: the frozen base alone, up to the last target's input and back to its embeddings."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nsc.batch import Batch


class _Reached(Exception):
    """Raised inside the forward where the last target begins."""


class Floor:
    """Runs a bare body. target: the module whose input ends the forward."""

    def __init__(self, body: nn.Module, target: str) -> None:
        self.body = body
        self._seen: list[Tensor] = []
        body.get_submodule(target).register_forward_pre_hook(self._reach)

    def __call__(self, batch: Batch) -> Tensor:
        """The gradient of the sum of the target's input to the embeddings, (b, L, d)."""
        inputs = batch.arguments(next(self.body.parameters()).dtype)
        rest = {name: value for name, value in inputs.items() if name != "input_ids"}
        embedded = self.body.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
        try:
            self.body(inputs_embeds=embedded, use_cache=False, **rest)
        except _Reached:
            z = self._seen.pop()
            return torch.autograd.grad(z, embedded, torch.ones_like(z))[0]
        raise RuntimeError("the target never ran")

    def _reach(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self._seen.append(args[0])
        raise _Reached
