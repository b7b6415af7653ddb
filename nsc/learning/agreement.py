"""How far the merged model's outputs are from those of each task's own expert, the base with that adapter alone.

    e_k(x) = head_k(h(x; W0 + s_k B_k A_k))        y_k(x) = head_k(h(x; merged))
    d_k    = KL(softmax e || softmax y) in nats for classes and tokens        |y - e|^2 for numbers
    loss   = sum_k p_k mean_x d_k(x) / D_k,        D_k: the same mean of the base without any adapter

So 1 is a merge that knows nothing and 0 one that says what the experts say. Of a vocabulary the expert's likeliest
tokens are kept, and all others as one. Where a task has no output, e_k and y_k are the pooled last hidden states.

Source: Hinton et al., https://arxiv.org/abs/1503.02531 (distillation); docs/methods.md, "Matching the experts".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nsc.bases.task_head import TaskHead
from nsc.batch import Batch, Expected
from nsc.errors import TargetError

LIKELIEST = 64  # tokens of an expert's answer that are kept with their own probability


@dataclass(frozen=True)
class Agreement:
    """The distance of the merged model's outputs from the experts'.

    Attributes:
        heads: the head of each task; None for a task without rows.
        scales: (K,) 1 / D_k.
    """

    heads: Sequence[TaskHead | None]
    scales: Tensor

    def __call__(self, states: Tensor, batch: Batch, preferences: Tensor) -> Tensor:
        """Return the weighted distance of a batch.

        Args:
            states: (b, L, d) last hidden states.
            batch: whose rows they are, with what the experts say.
            preferences: (K,) weight of each task, 1 on average over tasks with rows.

        Returns:
            () in at least float32.

        Raises:
            TargetError: if the body does not return a row for every token of the batch.
        """
        seen = sum(head is not None for head in self.heads)
        return (self.by_task(states, batch) * preferences).sum() / seen

    def by_task(self, states: Tensor, batch: Batch) -> Tensor:
        """Return each task's part of its mean distance, relative to the bare base's.

        Args:
            states: (b, L, d) last hidden states.
            batch: whose rows they are, with what the experts say.

        Returns:
            (K,) in at least float32; 0 for a task without rows.

        Raises:
            TargetError: if the body does not return a row for every token of the batch.
        """
        there = batch.expected
        assert there is not None  # batches are made with it
        task, weight = there.task.flatten(), there.weight.flatten()
        own = (task[:, None] == torch.arange(len(self.heads), device=task.device)).to(weight)  # (b P, K)
        total = weight.new_zeros(len(self.heads))
        for head, tasks in self.groups:
            if not _holds(there, head):
                continue
            mine = tasks[task] & (weight > 0)
            each = distance(head, outputs_of(head, states, batch), there, mine).to(weight.dtype)
            total = total + torch.where(mine, each * weight, 0) @ own
        return total * self.scales.to(total)

    def by_states(self, tasks: Sequence[str]) -> list[str]:
        """Return the tasks without an output, whose pooled states are compared.

        Args:
            tasks: names of all tasks.

        Returns:
            Some of them.
        """
        return [task for task, head in zip(tasks, self.heads, strict=True) if head is not None and head.states]

    @cached_property
    def groups(self) -> list[tuple[TaskHead, Tensor]]:
        """Each head once, with (K,) bool: the tasks that it is the head of."""
        heads = {id(head): head for head in self.heads if head is not None}
        device = self.scales.device
        return [
            (x, torch.tensor([id(other) == key for other in self.heads], device=device)) for key, x in heads.items()
        ]


def outputs_of(head: TaskHead, states: Tensor, batch: Batch) -> Tensor:
    """Run a head in every place of a batch, also in those of other tasks.

    Args:
        head: the head of some task.
        states: (b, L, d) last hidden states.
        batch: whose rows they are, with the places.

    Returns:
        (b P, C) in at least float32.

    Raises:
        TargetError: if the body does not return a row for every token of the batch.
    """
    assert batch.expected is not None
    if head.pooling == "all":
        return head(states)
    if states.shape[:2] != batch.task.shape:
        raise TargetError(
            f"the body returns {tuple(states.shape)} for tokens {tuple(batch.task.shape)}: matching needs a row for"
            " each; choose targets that see all tokens"
        )
    return head(pooled(states, batch.expected, head.pooling == "mean"))


def _holds(there: Expected, head: TaskHead) -> bool:
    """Whether any place can be of this head, as shapes tell; a pass may have no row of some tasks."""
    return there.ids is not None if head.pooling == "each" else there.values.shape[-1] >= head.outputs


def pooled(states: Tensor, there: Expected, mean: bool) -> Tensor:
    """Return the states that a head reads.

    Args:
        states: (b, L, d).
        there: the places.
        mean: whether it reads the mean over a place's tokens; else each place is one token.

    Returns:
        (b P, d) in the dtype of ``states``.
    """
    wide = states.shape[-1]
    if not mean:
        return states.gather(1, there.start[..., None].expand(-1, -1, wide)).flatten(0, 1)
    sums = states.to(torch.promote_types(states.dtype, torch.float32)).cumsum(1)
    sums = torch.cat([torch.zeros_like(sums[:, :1]), sums], 1)  # (b, L + 1, d)
    first, last = (sums.gather(1, at[..., None].expand(-1, -1, wide)) for at in (there.start, there.stop))
    return ((last - first) / (there.stop - there.start).clamp_min(1)[..., None]).to(states.dtype).flatten(0, 1)


def distance(head: TaskHead, outputs: Tensor, there: Expected, mine: Tensor) -> Tensor:
    """Return how far outputs are from the experts' in each place.

    Args:
        head: whose outputs they are.
        outputs: (n, C), n being all places of a batch.
        there: what the experts say: numbers; log-probabilities of C classes; of a vocabulary, those of the ids named
            and, last, of all others together.
        mine: (n,) bool, the places of this head; others give anything finite.

    Returns:
        (n,) in at least float32: squared error, or KL in nats.
    """
    values = torch.where(mine[:, None], there.values.flatten(0, 1), 0)
    if head.numbers:
        return (outputs - values[:, : head.outputs]).square().sum(-1)
    logs = outputs.log_softmax(-1)
    if head.pooling == "each":
        assert there.ids is not None
        logs = of_likeliest(logs, there.ids.flatten(0, 1)[:, : likeliest(head)])
    values = values[:, : logs.shape[1]]
    return torch.where(values > -torch.inf, values.exp() * (values - logs), 0).sum(-1)


def likeliest(head: TaskHead) -> int:
    """Return how many tokens of a vocabulary are kept; the others count as one.

    Args:
        head: a head that reads each token.

    Returns:
        Their number, at most ``LIKELIEST``.
    """
    return min(LIKELIEST, head.outputs - 1)


def of_likeliest(logs: Tensor, ids: Tensor) -> Tensor:
    """Return log-probabilities of some outputs, and of all others together.

    Args:
        logs: (n, C) log-probabilities.
        ids: (n, k) int64, k < C.

    Returns:
        (n, k + 1).
    """
    others = logs.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logs.gather(1, ids), others], 1)
