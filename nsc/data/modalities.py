"""How bodies are fed, by what their forward takes first: a row of the table a kind of input, none for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nsc.bases import loading, structure
from nsc.bases.base_model import IMAGES_AND_TEXT, Base
from nsc.bases.llava import ImageTextBody, without_images
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.data.chat import Chat
from nsc.data.feature_store import FeatureStore
from nsc.data.image_text import Prompt, PromptBatches, Prompts, read_prompts
from nsc.data.images import Image, ImageBatches, collate_images, pixels_by, read_images, tokens_seen
from nsc.data.packing import can_share_rows, collate
from nsc.data.prompt_writer import image_features, require_same_forward, writer_of
from nsc.data.text import Pick, TextBatches, pad_id_of, read_texts, texts_alone, tokenize
from nsc.errors import DataError, NSCError
from nsc.runtime.cuda_graphs import obstacle
from nsc.runtime.placement import input_device

Features = Callable[[int], Tensor]  # number of a prompt -> (P, h) of its image
Generate = Callable[[Sequence[Sequence[int]], Features | None], list[list[int]]]  # prompts, images -> answers


AnyBatches = TypeVar("AnyBatches", TextBatches, PromptBatches)


class Batches(Protocol):
    """The batches of a step, as a pure function of it."""

    @property
    def shares_rows(self) -> bool:
        """Whether several samples may share a row."""

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of a step.

        Args:
            step: from 0.

        Returns:
            Batches on the CPU, whose losses add up to the step's.
        """

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Return which samples of each task a step takes.

        Args:
            step: from 0.

        Returns:
            Task -> numbers of samples.
        """

    def packed(self, picks: Sequence[Pick]) -> list[Batch]:
        """Return the batches of some samples.

        Args:
            picks: task and number of each sample.

        Returns:
            Batches on the CPU, whose losses add up to that of all samples.
        """


@dataclass(frozen=True)
class Feed:
    """How one kind of input is read and batched.

    Attributes:
        read: source -> samples of a task.
        batches: loaded base, targets, task -> samples, settings, and what continues prompts where positions are
            generated -> the batches to learn from, and the fixed ones for evaluation.
        example: loaded base -> a batch without any data.
    """

    read: Callable[[Any], list[Any]]
    batches: Callable[..., tuple[Batches, list[Batch]]]
    example: Callable[[Base], Batch]


def feed_of(base: Base) -> Feed:
    """Return how a base is fed.

    Args:
        base: its config decides.

    Returns:
        One of FEEDS.

    Raises:
        NSCError: if there is none for this base.
    """
    takes = base.takes
    if takes not in FEEDS:
        raise NSCError(f"base {base.id!r} takes {takes}; nsc feeds bodies that take {' or '.join(FEEDS)}")
    why = without_images(base.body_config) if takes == "input_ids" else None
    return replace(FEEDS[takes], read=partial(texts_alone, why=why)) if why else FEEDS[takes]


def example_of(base: Base) -> Batch | None:
    """Make rows on which two forwards of a base can be compared.

    Args:
        base: with weights.

    Returns:
        A batch without any data; None where this base cannot be fed, or does not run on it.
    """
    if base.takes not in FEEDS:
        return None
    model = base.model
    try:
        batch = FEEDS[base.takes].example(base)
        with torch.no_grad():
            model(**batch.to(input_device(model)).arguments(next(model.parameters()).dtype))
    except Exception:  # whatever a model says to inputs that are not its own
        return None
    return batch


def _text_batches(
    base: Base,
    targets: Sequence[str],
    texts: Mapping[str, list[str | Chat]],
    config: MergeConfig,
    generate: Generate | None = None,
) -> tuple[TextBatches, list[Batch]]:
    _require_modality(config.modality, "text")
    tokenizer = loading.load_tokenizer(base)
    tokens = tokenize(tokenizer, texts, config.max_length, answered=config.positions != "prompt")
    pad_id = pad_id_of(tokenizer)
    causal = structure.is_causal(base.model)
    shares_rows = without_images(base.body_config) is None and can_share_rows(structure.language_model(base.model))
    few_shapes = config.graphs and obstacle(base.model) is None
    batches = TextBatches(tokens, config.batch_size, pad_id, config.seed, causal, shares_rows, few_shapes)
    for task, i in _needed(batches, config):
        batches.tokens[task][i]  # a sample without tokens is refused before the first step
    batches = _with_answers(batches, config, generate)
    return batches, batches.packed(_evaluated(batches.rows, config.evaluation_samples))


def _with_answers(batches: AnyBatches, config: MergeConfig, generate: Generate | None) -> AnyBatches:
    """The same with the answers to all samples that are learned from or evaluated, where positions are generated."""
    if config.positions == "prompt":
        return batches
    if generate is None:
        raise NSCError(f"positions {config.positions} need a model that generates; give positions prompt here")
    picks = _needed(batches, config)
    answers = generate(*batches.prompts_of(picks))
    return batches.with_answers(dict(zip(picks, answers, strict=True)), config.positions)


def _needed(batches: TextBatches | PromptBatches, config: MergeConfig) -> list[Pick]:
    """Task and number of each sample that is learned from or evaluated, in order."""
    needed = set(_evaluated(batches.rows, config.evaluation_samples))
    for step in range(max(1, config.steps)):
        needed |= {(task, i) for task, row in batches.drawn(step).items() for i in row}
    return sorted(needed)


def _evaluated(rows: Mapping[str, Sequence[Any]], most: int) -> list[Pick]:
    """Task and number of each sample that is evaluated before and after."""
    return [(task, i) for task, samples in rows.items() for i in range(min(len(samples), most))]


def _image_batches(
    base: Base, targets: Sequence[str], images: Mapping[str, list[Image]], config: MergeConfig
) -> tuple[ImageBatches, list[Batch]]:
    _require_modality(config.modality, "image")
    processor = loading.load_image_processor(base)
    pixels = FeatureStore(pixels_by(processor, next(base.model.parameters()).dtype))
    some = [(image, k) for k, rows in enumerate(images.values()) for image in rows[: config.evaluation_samples]]
    tokens = tokens_seen(base.model, targets, pixels(some[0][0]))
    evaluation = collate_images([pixels(image) for image, _ in some], [k for _, k in some], tokens)
    return ImageBatches(images, pixels, tokens, config.batch_size, config.seed), [evaluation]


def _prompt_batches(
    base: Base,
    targets: Sequence[str],
    prompts: Mapping[str, list[Any]],
    config: MergeConfig,
    generate: Generate | None = None,
) -> tuple[PromptBatches | TextBatches, list[Batch]]:
    model = base.model
    assert isinstance(model, ImageTextBody)
    texts = {task: rows for task, rows in prompts.items() if rows and not isinstance(rows[0], Prompt)}
    if texts:
        if with_image := next((task for task, rows in prompts.items() if rows and task not in texts), None):
            raise DataError(
                f"the rows of {next(iter(texts))} are texts alone, those of {with_image} come with images; give rows of"
                " one kind"
            )
        return _text_batches(base, targets, prompts, config, generate)
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
    batches = _with_answers(batches, config, generate)
    fixed = replace(made, how=how | {"few_shapes": False})
    return batches, replace(batches, prompts=fixed).packed(_evaluated(batches.rows, config.evaluation_samples))


def _require_modality(modality: str, only: str) -> None:
    if modality not in ("both", only):
        raise NSCError(f"modality {modality} leaves nothing of a base that takes {only} alone; leave it at both")


def _random_text(base: Base) -> Batch:
    """Seeded random tokens."""
    inner = structure.language_model(base.model)
    vocabulary = inner.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return collate(ids.tolist(), [0, 0], 0, causal=True)


def _random_images(base: Base) -> Batch:
    """Seeded random pixels, as the processor prepares them, or of the config's size; a row counts as one token."""
    config, dtype = base.body_config, next(base.model.parameters()).dtype
    try:
        pixels = pixels_by(loading.load_image_processor(base), dtype)
    except NSCError:
        size = getattr(config, "image_size", 64)
        height, width = (size, size) if isinstance(size, int) else size
        shape = (2, getattr(config, "num_channels", 3), height, width)
        made = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
        return collate_images(list(made), [0, 0], 1)
    noise = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return collate_images([pixels(image) for image in read_images(list(noise))], [0, 0], 1)


def _random_prompt(base: Base) -> Batch:
    """Seeded random pixels with a question; random tokens where no processor writes prompts."""
    try:
        loading.load_processor(base)
    except NSCError:
        return _random_text(base)
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = {"example": read_prompts([(noise, "What is shown?")])}
    return _prompt_batches(base, [], prompts, MergeConfig(graphs=False))[1][0]


FEEDS = {
    "input_ids": Feed(read_texts, _text_batches, _random_text),
    "pixel_values": Feed(read_images, _image_batches, _random_images),
    IMAGES_AND_TEXT: Feed(read_prompts, _prompt_batches, _random_prompt),
}
