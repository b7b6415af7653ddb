"""How bodies are fed, by what their forward takes first: a row of the table a kind of input, none for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nsc.bases import loading, structure
from nsc.bases.base_model import IMAGES_AND_TEXT, Base
from nsc.bases.llava import ImageTextBody
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.feature_store import FeatureStore
from nsc.data.image_text import (
    Prompt,
    PromptBatches,
    Prompts,
    image_features,
    read_prompts,
    require_same_forward,
    writer_of,
)
from nsc.data.images import Image, ImageBatches, collate_images, pixels_by, read_images, tokens_seen
from nsc.data.packing import can_share_rows, collate
from nsc.data.text import TextBatches, pad_id_of, read_texts, tokenize, with_answer
from nsc.errors import NSCError
from nsc.runtime.cuda_graphs import obstacle

Features = Callable[[int], Tensor]  # number of a prompt -> (P, h) of its image
Generate = Callable[[Sequence[Sequence[int]], Features | None], list[list[int]]]  # prompts, images -> answers


class Batches(Protocol):
    """The batches of a step, as a pure function of it; whether several samples share a row."""

    @property
    def shares_rows(self) -> bool: ...

    def __call__(self, step: int) -> list[Batch]: ...


@dataclass(frozen=True)
class Feed:
    """One kind of input.

    read: a source -> the samples of a task.  batches: loaded base, targets, task -> samples, settings -> the batches to
    learn from, and the fixed ones for the ratios before and after; behind them, for generated positions, what continues
    prompts.  example: loaded base -> rows without any data.
    """

    read: Callable[[Any], list[Any]]
    batches: Callable[..., tuple[Batches, list[Batch]]]
    example: Callable[[Base], Batch]


def feed_of(base: Base) -> Feed:
    """The row of the table for this base. Raises NSCError if there is none, or no such base."""
    takes = base.takes
    if takes not in FEEDS:
        raise NSCError(f"base {base.id!r} takes {takes}; nsc feeds bodies that take {' or '.join(FEEDS)}")
    return FEEDS[takes]


def _text_batches(
    base: Base,
    targets: Sequence[str],
    texts: Mapping[str, list[str]],
    config: MergeConfig,
    generate: Generate | None = None,
) -> tuple[TextBatches, list[Batch]]:
    _require_modality(config, "text")
    tokenizer = loading.load_tokenizer(base)
    tokens = tokenize(tokenizer, texts, config.max_length)
    pad_id = pad_id_of(tokenizer)
    causal = structure.is_causal(base.model)
    shares_rows = can_share_rows(base.model)
    few_shapes = config.graphs and obstacle(base.model) is None
    batches = TextBatches(tokens, config.batch_size, pad_id, config.seed, causal, shares_rows, few_shapes)
    if config.positions != "prompt":
        batches = _with_answers(batches, config, generate)
    return batches, batches.packed(_evaluated(batches.tokens, config))


def _with_answers(batches: TextBatches, config: MergeConfig, generate: Generate | None) -> TextBatches:
    """The same with the answers to all samples that are learned from or evaluated; only what computed them counts."""
    generate = _required(generate, config)
    tokens = {task: list(rows) for task, rows in batches.tokens.items()}
    counted = {task: [slice(0, len(ids)) for ids in rows] for task, rows in tokens.items()}
    picks = _needed(batches, tokens, config)
    answers = generate([tokens[task][i] for task, i in picks], None)
    for (task, i), answer in zip(picks, answers, strict=True):
        tokens[task][i], counted[task][i] = with_answer(tokens[task][i], answer, config.positions)
    return replace(batches, tokens=tokens, counted=counted)


def _needed(
    batches: TextBatches | PromptBatches, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> list[tuple[str, int]]:
    """Task and number of each sample that is learned from or evaluated."""
    needed = set(_evaluated(samples, config))
    for step in range(max(1, config.steps)):
        needed |= {(task, i) for task, row in batches.drawn(step).items() for i in row}
    return sorted(needed)


def _required(generate: Generate | None, config: MergeConfig) -> Generate:
    if generate is None:
        raise NSCError(f"positions {config.positions} need a model that generates; give positions prompt here")
    return generate


def _evaluated(tokens: Mapping[str, Sequence[Any]], config: MergeConfig) -> list[tuple[str, int]]:
    """Task and number of each sample that is evaluated before and after."""
    return [(task, i) for task, rows in tokens.items() for i in range(min(len(rows), config.evaluation_samples))]


def _image_batches(
    base: Base, targets: Sequence[str], images: Mapping[str, list[Image]], config: MergeConfig
) -> tuple[ImageBatches, list[Batch]]:
    _require_modality(config, "image")
    processor = loading.load_image_processor(base)
    pixels = FeatureStore(pixels_by(processor, next(base.model.parameters()).dtype))
    some = [(image, k) for k, rows in enumerate(images.values()) for image in rows[: config.evaluation_samples]]
    tokens = tokens_seen(base.model, targets, pixels(some[0][0]))
    evaluation = collate_images([pixels(image) for image, _ in some], [k for _, k in some], tokens)
    return ImageBatches(images, pixels, tokens, config.batch_size, config.seed), [evaluation]


def _prompt_batches(
    base: Base,
    targets: Sequence[str],
    prompts: Mapping[str, list[Prompt]],
    config: MergeConfig,
    generate: Generate | None = None,
) -> tuple[PromptBatches, list[Batch]]:
    model = base.model
    assert isinstance(model, ImageTextBody)
    processor = loading.load_processor(base)
    features = FeatureStore(image_features(model, processor))
    first = next(prompt for rows in prompts.values() for prompt in rows)
    writer = writer_of(model, processor, features(first.image), config.max_length)
    require_same_forward(model, writer, first, features(first.image))
    how = {
        "causal": structure.is_causal(model),
        "shares_rows": can_share_rows(model.text),
        "few_shapes": config.graphs and obstacle(model) is None,
    }
    made = Prompts(features, model.image_token, pad_id_of(processor.tokenizer), config.modality, how)
    samples = {task: [writer.sample(prompt) for prompt in rows] for task, rows in prompts.items()}
    batches = PromptBatches(samples, made, config.batch_size, config.seed)
    if config.positions != "prompt":
        batches = _with_answers_to_images(batches, config, generate)
    fixed = replace(made, how=how | {"few_shapes": False})
    return batches, replace(batches, prompts=fixed).packed(_evaluated(batches.samples, config))


def _with_answers_to_images(batches: PromptBatches, config: MergeConfig, generate: Generate | None) -> PromptBatches:
    """As ``_with_answers``; an answer is text."""
    generate = _required(generate, config)
    samples = {task: list(rows) for task, rows in batches.samples.items()}
    picks = _needed(batches, samples, config)
    prompts = [samples[task][i] for task, i in picks]
    answers = generate([s.ids for s in prompts], lambda j: batches.prompts.features(prompts[j].image))
    for (task, i), answer in zip(picks, answers, strict=True):
        ids, counted = with_answer(samples[task][i].ids, answer, config.positions)
        samples[task][i] = samples[task][i]._replace(ids=ids, counted=counted)
    return replace(batches, samples=samples)


def _require_modality(config: MergeConfig, only: str) -> None:
    if config.modality not in ("both", only):
        raise NSCError(f"modality {config.modality} leaves nothing of a base that takes {only} alone; leave it at both")


def _random_text(base: Base) -> Batch:
    """Seeded random tokens."""
    vocabulary = next(m.num_embeddings for m in base.model.modules() if isinstance(m, nn.Embedding))
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return collate(ids.tolist(), [0, 0], 0, causal=True)


def _random_images(base: Base) -> Batch:
    """Seeded random pixels, as the processor prepares them; a row counts as one token."""
    noise = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels_by(loading.load_image_processor(base), next(base.model.parameters()).dtype)
    return collate_images([pixels(image) for image in read_images(list(noise))], [0, 0], 1)


def _random_prompt(base: Base) -> Batch:
    """Seeded random pixels with a question."""
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = {"example": read_prompts([(noise, "What is shown?")])}
    return _prompt_batches(base, [], prompts, MergeConfig(graphs=False))[1][0]


FEEDS = {
    "input_ids": Feed(read_texts, _text_batches, _random_text),
    "pixel_values": Feed(read_images, _image_batches, _random_images),
    IMAGES_AND_TEXT: Feed(read_prompts, _prompt_batches, _random_prompt),
}
