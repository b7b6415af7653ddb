"""Gradient descent as all examples train: AdamW, the learning rates warming up and then falling to zero."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

WARMUP = 0.05  # of the training


def warmed_up(progress: float) -> float:
    """Return the share of the full learning rate at this progress, from 0 to 1: a short rise, then a fall to zero."""
    return min(progress / WARMUP, 1) * (1 - progress)


def descend(
    name: str,
    groups: list[dict],
    loss_of: Callable[[], Tensor],
    rates: Iterable[float],
    *,
    weight_decay: float = 0.01,
    clip: float | None = None,
    every: int = 50,
) -> int:
    """Take a step for each of ``rates``, shares of the groups' own learning rates, and return their number.

    Args:
        name: of what is trained, for the printed lines.
        groups: parameter groups as torch's optimizers take them, each with its "lr".
        loss_of: the loss () of the next batch.
        rates: one for each step, asked for just before it.
        weight_decay: of AdamW.
        clip: the largest norm of a gradient; None leaves it as it is.
        every: so many steps' mean loss is printed at a time.
    """
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay)
    full = [group["lr"] for group in optimizer.param_groups]
    losses: list[float] = []
    for share in rates:
        for group, lr in zip(optimizer.param_groups, full, strict=True):
            group["lr"] = lr * share
        loss = loss_of()
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if len(losses) % every == 0:
            print(f"{name}  step {len(losses)}  loss {sum(losses[-every:]) / every:.3f}", flush=True)
    return len(losses)
