"""Every option of a merge written plainly: sample by sample, with dense weights and torch's own functions."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsc.adapters.stack import DenseStack, ModuleStack, Stack
from nsc.batch import Batch
from tests.plain import segments


@dataclass(frozen=True)
class Plain:
    """The options of the loss.

    shares: the weight of each task's ratios.  quantile: of the ratios in a sample, None for their mean.  entropies: the
    weight of each task's entropy, None for a loss without.  heads: weight and bias of each task's head.  all_rows:
    entropy at every counted token of a sample, not only the last.  summed: their sum, not their mean.
    """

    shares: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)
    quantile: float | None = None
    entropies: Sequence[float] | None = None
    heads: Sequence[tuple[Tensor, Tensor | None]] = ()
    all_rows: bool = False
    summed: bool = False


def merged_weight(weight: Tensor, module: ModuleStack, row: Tensor) -> Tensor:
    """The merged weight (m, d); ``row`` holds the module's coefficients, (K,), or (C,) if each rank has its own."""
    start = 0
    for k, (a, b, s) in enumerate(segments(module)):
        of_rows = row[start : start + len(a)] if module.by_rank else row[k].expand(len(a))
        weight = weight + s * b.double() @ torch.diag(of_rows) @ a.double()
        start += len(a)
    return weight


def merged_parameters(model: nn.Module, name: str, layer: ModuleStack | DenseStack, row: Tensor) -> dict[str, Tensor]:
    """The merged weight of a layer by its name, and the bias where adapters fine-tuned the layer whole."""
    weight = model.get_parameter(f"{name}.weight")
    if isinstance(layer, ModuleStack):
        return {f"{name}.weight": merged_weight(weight, layer, row)}
    parts = {"weight": layer.deltas, "bias": layer.bias_deltas}
    own = row[torch.tensor(layer.present)]
    return {
        f"{name}.{kind}": model.get_parameter(f"{name}.{kind}") + torch.tensordot(own, deltas.double(), 1)
        for kind, deltas in parts.items()
        if deltas is not None
    }


def plain_loss(model: nn.Module, stack: Stack, lam: Tensor, batch: Batch, targets: list[str], how: Plain) -> Tensor:
    """The loss () of a batch with one sample per row, differentiable in ``lam`` (M, C)."""
    weights: dict[str, Tensor] = {}
    for name, row in zip(stack.names, lam, strict=True):
        weights |= merged_parameters(model, name, stack.layer(name), row)
    total = lam.new_zeros(())
    samples = torch.bincount(batch.task[:, 0], minlength=len(stack.tasks))
    for i in range(len(batch.task)):
        k, counted = int(batch.task[i, 0]), batch.weight[i] > 0
        seen: dict[str, Tensor] = {}
        hooks = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name, seen=seen: seen.update({name: args[0][0]})
            )
            for name in targets
        ]
        inputs = {key: value[i : i + 1] for key, value in batch.inputs.items()}
        states = torch.func.functional_call(model, weights, (), inputs)[0][0]
        for hook in hooks:
            hook.remove()
        own = [name for name in targets if stack.modules[name].ranks[k]]
        for name in own:
            a, z = segments(stack.modules[name])[k][0].double(), seen[name][counted]
            ratio = (z - z @ torch.linalg.pinv(a) @ a).norm(dim=-1) / z.norm(dim=-1)
            of_sample = ratio.mean() if how.quantile is None else ratio.quantile(how.quantile)
            total = total + how.shares[k] * of_sample / len(own) / samples[k]
        if how.entropies is not None:
            said = F.linear(states[counted] if how.all_rows else states[counted][-1:], *how.heads[k])
            unsure = torch.distributions.Categorical(logits=said).entropy()
            total = total + how.entropies[k] * (unsure.sum() if how.summed else unsure.mean()) / samples[k]
    return total


def decoded_entropy(
    model: nn.Module,
    head: Tensor,
    stack: Stack,
    lam: Tensor,
    prompts: Sequence[Sequence[int]],
    most: int,
    ends: Collection[int],
) -> tuple[list[list[float]], Tensor]:
    """Decode greedily with a backward at every token, as the released NSC code does, without cache or batches.

    Returns the entropies at the generated tokens of each prompt, and the gradient (M, K) of their sum over tokens and
    prompts. ``model`` is a body, ``head`` (V, d) its head, ``most`` the number of tokens to generate at most.
    """
    lam = lam.clone().requires_grad_()
    of_prompts = []
    for prompt in prompts:
        ids, entropies = list(prompt), []
        while len(entropies) < most and not (entropies and ids[-1] in ends):
            weights: dict[str, Tensor] = {}
            for name, row in zip(stack.names, lam, strict=True):
                weights |= merged_parameters(model, name, stack.layer(name), row)
            logits = head @ torch.func.functional_call(model, weights, (torch.tensor([ids]),))[0][0, -1]
            p = logits.softmax(0)
            H = -(p * p.log()).sum()
            H.backward()
            entropies.append(H.item())
            ids.append(int(logits.argmax()))
        of_prompts.append(entropies)
    assert lam.grad is not None
    return of_prompts, lam.grad


LINKS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "identity": (lambda t: t, lambda c: c),
    "clip": (lambda t: torch.clip(t, 0, 1), lambda c: c),
    "softplus": (F.softplus, lambda c: c.expm1().log()),
    "sigmoid": (F.sigmoid, torch.logit),
    "exp": (torch.exp, torch.log),
}
OPTIMIZERS: Mapping[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
SCHEDULES: Mapping[str, Callable[[int, int], float]] = {
    "constant": lambda step, steps: 1.0,
    "linear": lambda step, steps: (steps - step) / steps,
    "cosine": lambda step, steps: torch.tensor(torch.pi * step / steps, dtype=torch.float64).cos().item() / 2 + 0.5,
}


def plain_softmax(theta: Tensor, stack: Stack, start: float) -> Tensor:
    """Coefficients (M, C) by a softmax over the tasks that a module has; the others stay at the start."""
    rows = []
    for row, there in zip(theta.expand(len(stack.names), -1), stack.present, strict=True):
        if len(theta) == 1:
            there = torch.ones_like(there)  # one row for all modules
        new = torch.full_like(row, start)
        rows.append(new.masked_scatter(there, row[there].exp() / row[there].exp().sum() * there.sum() * start))
    return torch.stack(rows)


def plain_learning(
    loss: Callable[[Tensor], Tensor],
    stack: Stack,
    start: float,
    lr: float,
    steps: int,
    columns: int,
    link: str = "identity",
    granularity: str = "layer",
    optimizer: str = "adamw",
    schedule: str = "constant",
    weight_decay: float = 0.0,
    max_drift: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first loss (), its gradient in theta, and the coefficients (M, C) after all steps."""
    first = torch.full((1 if granularity == "task" else len(stack.names), columns), start, dtype=torch.float64)
    theta = nn.Parameter(torch.zeros_like(first) if link == "softmax" else LINKS[link][1](first))

    def lam() -> Tensor:
        if link == "softmax":
            return plain_softmax(theta, stack, start)
        return LINKS[link][0](theta).expand(len(stack.names), -1)

    torch_optimizer = OPTIMIZERS[optimizer]([theta], lr=lr, weight_decay=weight_decay)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer, lambda step: SCHEDULES[schedule](step, steps))
    at_start: list[Tensor] = []
    for _ in range(steps):
        torch_optimizer.zero_grad()
        value = loss(lam())
        value.backward()
        at_start = at_start or [value.detach(), theta.grad.clone()]
        frozen = theta.grad == 0
        before = theta.detach().clone()
        torch_optimizer.step()
        scheduler.step()
        with torch.no_grad():
            theta.copy_(torch.where(frozen, before, theta))
            if max_drift is not None:
                theta.copy_(LINKS[link][1](LINKS[link][0](theta).clamp(start - max_drift, start + max_drift)))
    return at_start[0], at_start[1], lam().detach()
