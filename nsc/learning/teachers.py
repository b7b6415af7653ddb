"""What each task's expert, the base with that adapter alone, says about the rows of its task, once a row.

A task's head is the one that its adapter carries. Where it carries none, a causal base's own head over its vocabulary
is: then the expert's greedy answer stands behind each prompt, and what it says at the places that computed the answer
counts. Where the base has none either, there is no output, and its pooled last hidden states count instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.lora import Adapter
from nsc.adapters.modules_to_save import without_body
from nsc.adapters.stack import Stack
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.heads import NoHeadError, load_generating_head
from nsc.bases.task_head import TaskHead, load_task_head, state_head, vocabulary_head
from nsc.batch import Batch
from nsc.data.expected import Output
from nsc.data.text import Pick
from nsc.errors import DataError, NSCError
from nsc.learning.agreement import Agreement, likeliest, of_likeliest, outputs_of
from nsc.learning.generation import continue_prompts, end_tokens
from nsc.learning.held_back import number_of
from nsc.learning.passes import in_passes, on_each
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.placement import input_device
from nsc.runtime.sharding import shards_of

OF_EACH_TOKEN = ("TOKEN_CLS", "QUESTION_ANS")  # PEFT's task types whose head may be named as one of whole texts is
AnyBatches = Any  # TextBatches, ImageBatches or PromptBatches


class Experts:
    """The experts of all tasks, on one base.

    Args:
        base: with weights.
        adapters: task -> adapter.
        stack: the adapters on the base, with one coefficient for each layer and task.
        positions: which tokens of an answer count, "full" or "last"; with "prompt" those of tasks without a head count
            in full.
        unseen: tasks without rows.
        max_new_tokens: length of an answer, at most.
        team: the processes that share the rows.

    Attributes:
        heads: the head of each task; None for an unseen one.

    Raises:
        NSCError: naming the task, for a head that is not followed, or without one where positions are generated.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter],
        stack: Stack,
        positions: str = "prompt",
        unseen: Collection[str] = (),
        max_new_tokens: int = 16,
        team: Team = ALONE,
    ) -> None:
        self.base, self.stack = base, stack
        self.positions, self.most = positions, max_new_tokens
        self.team, self.shards = team, shards_of(base.model)
        self.heads = _heads(base, adapters, positions, unseen)

    @property
    def in_words(self) -> set[str]:
        """The tasks whose experts answer in words, token by token."""
        pairs = zip(self.stack.tasks, self.heads, strict=True)
        return {task for task, head in pairs if head is not None and head.pooling == "each"}

    @torch.no_grad()
    def teach(
        self, batches: AnyBatches, picks: Sequence[Pick], tokens: int, rows: Mapping[str, Sequence[Any]]
    ) -> AnyBatches:
        """Run each task's expert on samples of the task.

        Args:
            batches: of texts or images.
            picks: task and number of each sample.
            tokens: the most of one forward.
            rows: task -> its own rows, which come first in the batches.

        Returns:
            The same batches, holding what the experts say, and their answers where these are matched.

        Raises:
            DataError: naming a sample of which an expert says NaN or infinity.
        """
        answers: dict[Pick, Sequence[int]] = {}
        for task, head in zip(self.stack.tasks, self.heads, strict=True):
            mine = [pick for pick in picks if pick[0] == task]
            if head and mine and head.pooling == "each":
                answers |= dict(zip(mine, self._answers(task, head, batches.prompts_of(mine)), strict=True))
        if answers:
            batches = batches.with_answers(answers, "last" if self.positions == "last" else "full")
        return batches.with_outputs(self._outputs(batches, picks, tokens, rows))

    @torch.no_grad()
    def agreement(self, batches: AnyBatches, picks: Sequence[Pick], tokens: int) -> Agreement:
        """Return the distance from the experts, relative to that of the base alone on these samples.

        Args:
            batches: what ``teach`` returned.
            picks: task and number of each sample.
            tokens: the most of one forward.

        Returns:
            The agreement.

        Raises:
            NSCError: naming a task whose expert says just what the base says.
        """
        device = input_device(self.base.model)
        plain = Agreement(self.heads, torch.ones(len(self.heads), device=device))
        bare = torch.zeros(len(self.heads), dtype=torch.float64, device=device)
        passes = in_passes(batches.packed(picks), tokens)
        for (part,) in on_each(passes, lambda part: (plain.by_task(*self._states(part)),), self.team, self.shards):
            bare += part.to(bare)
        for task, head, value in zip(self.stack.tasks, self.heads, bare.tolist(), strict=True):
            if head is not None and not value > 0:
                raise NSCError(
                    f"adapter {task} says about its rows just what the base says without it, so there is nothing to"
                    " match; give rows of its task, or name it as unseen"
                )
        scales = torch.tensor([0.0 if head is None else 1.0 for head in self.heads], device=device)
        return Agreement(self.heads, scales / torch.where(bare > 0, bare, 1))

    @contextmanager
    def _alone(self, task: str) -> Iterator[None]:
        """One expert in the model."""
        model, only = self.base.model, self.stack.only(task)
        dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        with merged_layers(model, only, torch.ones(len(only.names), 1, dtype=dtype, device=input_device(model))):
            yield

    def _answers(self, task: str, head: TaskHead, prompts: Any) -> list[list[int]]:
        model = self.base.model
        assert head.generating is not None
        team = ALONE if self.shards else self.team  # ranks with a part of each weight run the same groups of prompts
        with self._alone(task):
            return continue_prompts(model, head.generating, prompts[0], self.most, end_tokens(model), prompts[1], team)

    def _states(self, batch: Batch) -> tuple[Tensor, Batch]:
        """Last hidden states of a batch, and the batch on their device."""
        model = self.base.model
        batch = batch.to(input_device(model))
        return model(**batch.arguments(next(model.parameters()).dtype))[0], batch

    def _outputs(
        self, batches: AnyBatches, picks: Sequence[Pick], tokens: int, rows: Mapping[str, Sequence[Any]]
    ) -> dict[Pick, Output]:
        """What each task's expert says about samples of the task."""
        of = {k: [pick for pick in picks if pick[0] == task] for k, task in enumerate(self.stack.tasks)}
        spans = {pick: spans_of(self._head(k), batches.counted_of(pick)) for k, mine in of.items() for pick in mine}
        passes = [part for mine in of.values() if mine for part in _numbered(batches, mine, spans, tokens)]
        said = on_each(passes, self._said, self.team, self.shards)
        outputs = {}
        for k, mine in of.items():
            parts = [made for part, made in zip(passes, said, strict=True) if _task_of(part) == k]
            at, values, ids = (torch.cat(side) for side in zip(*parts, strict=True)) if parts else [torch.empty(0)] * 3
            sizes, order = [len(spans[pick]) for pick in mine], at.argsort()
            for pick, value, chosen in zip(mine, values[order].split(sizes), ids[order].split(sizes), strict=True):
                self._require_finite(k, pick[0], _where(rows[pick[0]], pick[1]), value)
                outputs[pick] = Output(spans[pick], value, chosen if self._head(k).pooling == "each" else None)
        return outputs

    def _said(self, part: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Numbers of the places of a pass, whose rows are of one task, and what is kept of the outputs there."""
        k = _task_of(part)
        assert part.expected is not None
        there = (part.expected.weight > 0).flatten()
        with self._alone(self.stack.tasks[k]):  # the head may run a pooler of the body, which the adapter changes
            states, batch = self._states(part)
            made = outputs_of(self._head(k), states, batch)[there.to(states.device)]
        return part.expected.values.flatten()[there].long(), *_as_target(self._head(k), made)

    def _head(self, k: int) -> TaskHead:
        head = self.heads[k]
        assert head is not None  # unseen tasks have no rows
        return head

    def _require_finite(self, k: int, task: str, where: str, values: Tensor) -> None:
        if values.isnan().any() or values.isposinf().any() or (self._head(k).numbers and values.isinf().any()):
            raise DataError(
                f"the expert of task {task} says NaN or infinity about {where}; check the"
                " base's dtype (float16 overflows: use bfloat16) and the adapter"
            )


def _numbered(
    batches: AnyBatches, picks: Sequence[Pick], spans: Mapping[Pick, Sequence[tuple[int, int]]], tokens: int
) -> list[Batch]:
    """Samples in passes, each place holding its number in the order of the samples, by which it is found again."""
    sizes = [len(spans[pick]) for pick in picks]
    numbers = torch.arange(sum(sizes), dtype=torch.float64)[:, None].split(sizes)
    blank = {pick: Output(spans[pick], given) for pick, given in zip(picks, numbers, strict=True)}
    return in_passes(batches.with_outputs(blank).packed(picks), tokens)


def _where(rows: Sequence[Any], i: int) -> str:
    return f"row {number_of(rows, i) + 1} of its data" if i < len(rows) else "a row that it borrows (borrow_rows)"


def _task_of(part: Batch) -> int:
    return int(part.task[0, 0])


def spans_of(head: TaskHead, counted: slice) -> list[tuple[int, int]]:
    """Return the spans of a sample's tokens that its head reads.

    Args:
        head: the head of its task.
        counted: the tokens of the sample that count: all of them, or those that computed its answer.

    Returns:
        First token and the one after the last, of each place.
    """
    first, last = counted.start, counted.stop
    if head.pooling == "each":
        return [(i, i + 1) for i in range(first, last)]
    return [{"first": (0, 1), "last": (last - 1, last), "mean": (0, last), "all": (0, 1)}[head.pooling]]


def _heads(
    base: Base, adapters: Mapping[str, Adapter], positions: str, unseen: Collection[str]
) -> list[TaskHead | None]:
    """The head that each adapter carries, or one that all others share: the base's own, or its states."""
    heads: list[TaskHead | None] = []
    shared: TaskHead | None = None
    for task, adapter in adapters.items():
        saved = without_body(base.model, adapter).saved
        saved = saved if positions == "prompt" else {}
        if task in unseen:
            heads.append(None)
        elif saved and (kind := adapter.config.get("task_type")) in OF_EACH_TOKEN:
            raise NSCError(
                f"adapter {task} carries a head for each token of a text ({kind}), which is not followed; merge this"
                " task by nsc, or name it as unseen"
            )
        elif saved:
            heads.append(load_task_head(base, saved, task))
        else:
            shared = shared or _without_own(base, task, positions)
            heads.append(shared)
    return heads


def _without_own(base: Base, task: str, positions: str) -> TaskHead:
    """The base's head over its vocabulary; or its states, where it has none and no answers are asked for."""
    try:
        return vocabulary_head(load_generating_head(base))
    except NSCError as error:
        if isinstance(error, NoHeadError) and positions == "prompt":
            return state_head(base)
        raise NSCError(
            f"adapter {task} carries no head that is followed, and the base's own cannot be matched ({error}); merge by"
            " nsc, or name this task as unseen"
        ) from error


def _as_target(head: TaskHead, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept of outputs (n, C), on the CPU: numbers, or log-probabilities, and of a vocabulary their ids."""
    if head.numbers:
        return outputs.cpu(), torch.zeros(len(outputs), 0)
    logs = outputs.log_softmax(-1)
    if head.pooling != "each":
        return logs.cpu(), torch.zeros(len(outputs), 0)
    ids = logs.topk(likeliest(head), -1).indices
    last = torch.zeros_like(ids[:, :1])  # of no token: all the others
    return of_likeliest(logs, ids).cpu(), torch.cat([ids, last], 1).cpu()
