"""The other objective: how unsure the merged model is of what it says, on each task's rows.

    loss = sum over tasks of pref_k mean over samples, and mean or sum over a sample's rows, of H(softmax(head_k(h)))
    H(p) = - sum_c p_c log p_c

h: the body's last hidden states. A task's head is the one that its adapter carries, or else the base's own over its
vocabulary, the same for all. Every pref_k is 1 unless preferences say otherwise, and their mean over seen tasks is 1.

Paper: https://arxiv.org/abs/2310.02575 (AdaMerging, Eq. 5); on generated tokens, https://arxiv.org/abs/2603.26317.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsc.adapters.lora import Adapter
from nsc.adapters.modules_to_save import without_body
from nsc.bases import structure
from nsc.bases.base_model import Base
from nsc.bases.heads import Head, load_generating_head
from nsc.bases.task_head import TaskHead, load_task_head
from nsc.batch import Batch
from nsc.errors import NSCError, TargetError


@dataclass(frozen=True)
class Entropy:
    """The entropy of what the merged model says.

    Attributes:
        heads: the head of each task; None for a task without rows.
        rows: which rows of a sample a head reads: the "first" or "last" that counts, each that counts ("counted"), or,
            of an image, "all" of them together.
        reduction: "mean" or "sum" over the rows that count.
    """

    heads: Sequence[Head | TaskHead | None]
    rows: str
    reduction: str = "mean"

    def __call__(self, states: Tensor, batch: Batch, preferences: Tensor) -> Tensor:
        """Return the weighted entropy of a batch.

        Args:
            states: (b, L, d) last hidden states.
            batch: whose rows they are.
            preferences: (K,) weight of each task.

        Returns:
            () in at least float32.

        Raises:
            TargetError: if the body does not return a row for every token of the batch.
        """
        if states.shape[:-1] != batch.task.shape:
            raise TargetError(
                f"the body returns {tuple(states.shape)} for tokens {tuple(batch.task.shape)}: the entropy needs a row"
                " for each; choose targets that see all tokens"
            )
        weight = row_weights(batch, self.rows, self.reduction).to(preferences.dtype)
        task, rows = batch.task.flatten(), states.flatten(0, 1)
        if self.rows == "all":
            task, rows, weight = batch.task[:, 0], states, weight.view(states.shape[:2]).sum(1)
        total = weight.new_zeros(())
        for k, head in enumerate(self.heads):
            if head is not None:
                mine = (task == k) & (weight > 0)
                total = total + preferences[k] * (weight[mine] * entropy(head.logits(rows[mine]))).sum()
        return total


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of the softmax of logits.

    Args:
        logits: (n, C).

    Returns:
        (n,) in nats, in at least float32.
    """
    logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(logs.exp() * logs).sum(-1)


def row_weights(batch: Batch, rows: str, reduction: str = "mean") -> Tensor:
    """Return how much each row counts in the entropy.

    Args:
        batch: whose rows are weighted.
        rows: "first" or "last" puts a sample's weight on one of its rows that count; with "counted" and "all", those
            that count share it.
        reduction: "sum" puts the whole sample's weight on each row that counts.

    Returns:
        (b L,).
    """
    weight = batch.weight.flatten()
    if rows == "all" or (rows == "counted" and reduction == "mean"):
        return weight
    sample, place = batch.samples(), torch.arange(len(weight), device=weight.device)
    whole = torch.zeros_like(weight).index_add(0, sample, weight)[sample]
    if rows == "counted":
        return torch.where(weight > 0, whole, 0)
    last = rows == "last"
    counted = torch.where(weight > 0, place, -1 if last else len(place))
    edge = torch.zeros_like(place).scatter_reduce(0, sample, counted, "amax" if last else "amin", include_self=False)
    return torch.where(place == edge[sample], whole, 0)


def entropy_of(
    base: Base,
    adapters: Mapping[str, Adapter],
    positions: str,
    unseen: Collection[str] = (),
    reduction: str = "mean",
) -> Entropy:
    """Return the entropy by the heads that adapters carry, or by the base's own where there are none to use.

    Generated positions always take the base's own head, which reads all tokens of an answer. A head that an adapter
    carries reads what its class of transformers pools.

    Args:
        base: with weights.
        adapters: task -> adapter.
        positions: "prompt", "last" or "full".
        unseen: tasks without data.
        reduction: over the generated tokens of a sample, "mean" or "sum".

    Returns:
        The entropy.

    Raises:
        NSCError: if there is no head, only some adapters carry one, one is not followed, heads pool differently, or all
            have a single output.
    """
    seen = {task: without_body(base.model, adapter) for task, adapter in adapters.items() if task not in unseen}
    carrying = [task for task, adapter in seen.items() if adapter.saved and positions == "prompt"]
    if not carrying:
        rows = "counted" if positions != "prompt" else "last" if structure.is_causal(base.model) else "first"
        head = load_generating_head(base)
        return Entropy([head if task in seen else None for task in adapters], rows, reduction)
    if len(carrying) < len(seen):
        without = sorted(set(seen) - set(carrying))
        raise NSCError(
            f"{', '.join(carrying)} carry a head and {', '.join(without)} do not: their entropies cannot be added;"
            " merge them by the null-space objective, or name those without a head as unseen"
        )
    heads = [load_task_head(base, seen[task].saved, task) if task in seen else None for task in adapters]
    poolings = sorted({head.pooling for head in heads if head is not None})
    if len(poolings) > 1 or poolings[0] in ("mean", "each"):
        raise NSCError(
            f"the heads of {', '.join(carrying)} read {' and '.join(poolings)} of a sample's tokens; the entropy"
            " follows heads that all read the first or all read the last: use the objective match or null-space"
        )
    if all(head is None or head.outputs == 1 for head in heads):
        raise NSCError(
            f"the heads of {', '.join(carrying)} have one output each, so their entropy is always 0;"
            " use the null-space objective"
        )
    return Entropy(heads, poolings[0], reduction)
