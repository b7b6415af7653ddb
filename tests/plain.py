"""A step written plainly: task by task, with dense merged weights, full forwards, hooks and pseudo-inverses."""

import torch
from torch import Tensor, nn

from nsc.adapters.stack import ModuleStack, Stack
from nsc.batch import Batch


def plain_objective(model: nn.Module, stack: Stack, lam: Tensor, batch: Batch, targets: list[str]) -> Tensor:
    """The loss () of a batch with one sample per row, differentiable in ``lam`` (M, K)."""
    weights = {
        f"{name}.weight": model.get_parameter(f"{name}.weight")
        + sum(lam[i, k] * s * b @ a for k, (a, b, s) in enumerate(segments(module)) if len(a))
        for i, (name, module) in enumerate(stack.modules.items())
    }
    total = lam.new_zeros(())
    for k in range(len(stack.tasks)):
        mine = batch.task[:, 0] == k
        seen: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.update({name: args[0]})
            )
            for name in targets
        ]
        torch.func.functional_call(model, weights, (), {key: v[mine] for key, v in batch.inputs.items()})
        for hook in hooks:
            hook.remove()
        own = [name for name in targets if stack.modules[name].ranks[k]]
        for name in own:
            a = segments(stack.modules[name])[k][0]
            z = seen[name]
            rest = z - z @ torch.linalg.pinv(a) @ a
            ratio = rest.norm(dim=-1) / z.norm(dim=-1)
            total = total + (ratio * batch.weight[mine]).sum() / len(own) / len(stack.tasks)
    return total


def plain_steps(
    model: nn.Module, stack: Stack, batch: Batch, targets: list[str], start: float, lr: float, steps: int
) -> Tensor:
    """Coefficients (M, K) after ``steps`` of AdamW on the plain objective, every step on the same batch."""
    lam = nn.Parameter(torch.full((len(stack.names), len(stack.tasks)), start, dtype=torch.float64))
    optimizer = torch.optim.AdamW([lam], lr=lr, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        plain_objective(model, stack, lam, batch, targets).backward()
        optimizer.step()
    return lam.detach()


def segments(module: ModuleStack) -> list[tuple[Tensor, Tensor, float]]:
    """A (r_k, d), B (m, r_k) and the scale of each adapter of one module."""
    ranks = list(module.ranks)
    return list(zip(module.A.split(ranks), module.B.split(ranks, dim=1), module.scales, strict=True))
