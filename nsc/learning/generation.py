"""What the merged model says, as fixed tokens behind its prompts: for coefficients learned on generated positions.

The continuation of a sample is greedy, from the model at the start coefficients, made once before the first step. Taken
from the model as it changes it would be another loss in every step, of which no gradient passes through the choice of a
token; made once, a batch stays a function of its step, so a run can be resumed, recorded, and shared out over ranks.

With prompt p_0 ... p_{P-1} and answer g_0 ... g_{G-1}, the token at place P - 1 + i is where g_i is computed. Rows hold
the prompt and g_0 ... g_{G-2}: the last answer token is computed, never read. "full" counts the places P - 1 to
P + G - 2, "last" the last of them, P + G - 2.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsc.adapters.stack import Stack
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.heads import Head, load_generating_head
from nsc.bases.llava import ImageTextBody, places
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.modalities import Batches, Features, Generate, feed_of
from nsc.runtime.distributed import ALONE, Team
from nsc.runtime.placement import input_device

TOKENS = 4096  # of prompts of one length that are continued together


def generator(base: Base, stack: Stack, start: float, max_new_tokens: int) -> Generate:
    """Return a function that continues prompts by the merged model at its initial coefficients.

    Args:
        base: causal, with weights.
        stack: the adapters on it.
        start: initial value of every coefficient.
        max_new_tokens: length of an answer, at most.

    Returns:
        A function of prompts and image features, as ``nsc.data.modalities.Generate`` says.

    Raises:
        NSCError: if the base has no head that generates.
    """
    model, head = base.model, load_generating_head(base)
    initial = torch.full(stack.owned.shape, start, device=input_device(model))
    ends = end_tokens(model)

    def generate(prompts: Sequence[Sequence[int]], features: Features | None = None) -> list[list[int]]:
        with merged_layers(model, stack, initial):
            return continue_prompts(model, head, prompts, max_new_tokens, ends, features)

    return generate


def end_tokens(model: nn.Module) -> set[int]:
    """Return the tokens after which an answer ends.

    Args:
        model: body of a causal base.

    Returns:
        Their ids.
    """
    stated = getattr(getattr(model.config, "text_config", model.config), "eos_token_id", None)
    return {stated} if isinstance(stated, int) else set(stated or ())


@torch.no_grad()
def continue_prompts(
    model: nn.Module,
    head: Head,
    prompts: Sequence[Sequence[int]],
    most: int,
    ends: Collection[int] = (),
    features: Features | None = None,
    team: Team = ALONE,
) -> list[list[int]]:
    """Continue prompts greedily.

    Args:
        model: body of a causal base.
        head: over its last hidden states.
        prompts: token ids.
        most: tokens of an answer, at most.
        ends: ids after which an answer ends; the end token is part of it.
        features: number of a prompt -> (P, h) features of its image, where ``model`` is an ImageTextBody.
        team: the processes that share the prompts.

    Returns:
        The answer to each prompt, as token ids.
    """
    answers: dict[int, list[int]] = {}
    for alike in _of_one_length(prompts)[team.rank :: team.size]:
        inputs = {"input_ids": torch.tensor([list(prompts[i]) for i in alike])}
        if features:
            assert isinstance(model, ImageTextBody)
            inputs["features"] = torch.stack([features(i)[None] for i in alike])
            inputs["place"] = places(inputs["input_ids"] == model.image_token)
        tokens = _greedy(model, head, inputs, most, ends)
        for i, row in zip(alike, tokens.tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(row) if token in ends), most)
            answers[i] = row[:end]
    said = {i: answer for share in team.gather(answers) for i, answer in share.items()}
    return [said[i] for i in range(len(prompts))]


def _of_one_length(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of prompts of one length, at most TOKENS together: no padding, so each is as if alone."""
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(i)
    groups = []
    for length, alike in by_length.items():
        rows = max(TOKENS // length, 1)
        groups += [alike[at : at + rows] for at in range(0, len(alike), rows)]
    return groups


def _greedy(model: nn.Module, head: Head, inputs: Mapping[str, Tensor], most: int, ends: Collection[int]) -> Tensor:
    """(b, at most ``most``) on the CPU; inputs: of rows of one length. What is said is text, also behind an image.

    It goes on until every row has ended.
    """
    device, text = input_device(model), getattr(model, "text", model)
    stops = torch.tensor(sorted(ends), dtype=torch.long, device=device)
    output = model(**{name: x.to(device) for name, x in inputs.items()}, use_cache=True)
    said = [head.logits(output[0][:, -1]).argmax(-1, keepdim=True)]
    ended = torch.isin(said[-1], stops)
    while len(said) < most and not ended.all():
        output = text(input_ids=said[-1], past_key_values=output.past_key_values, use_cache=True)
        said.append(head.logits(output[0][:, -1]).argmax(-1, keepdim=True))
        ended |= torch.isin(said[-1], stops)
    return torch.cat(said, 1).cpu()


def batches_of(
    base: Base, stack: Stack, targets: Sequence[str], samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> tuple[Batches, list[Batch]]:
    """Return the batches to learn from, and the fixed ones for evaluation; generated positions follow the merged model.

    Args:
        base: with weights.
        stack: the adapters on it.
        targets: modules whose inputs are measured.
        samples: task -> what its feed read.
        config: settings of the rows.

    Returns:
        A function of the step, and fixed batches.

    Raises:
        NSCError: a subclass, for rows or positions that this base cannot have.
    """
    of_answers = (config.start, config.max_new_tokens)
    continues = [] if config.positions == "prompt" else [generator(base, stack, *of_answers)]
    return feed_of(base).batches(base, targets, samples, config, *continues)
