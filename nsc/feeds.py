"""How bodies are fed, by what their forward takes first: a row of the table a kind of input, none for a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import nn

from nsc import families
from nsc.batch import Batch
from nsc.bodies import ImageTextBody
from nsc.config import MergeConfig
from nsc.data import TextBatches, read_texts, tokenize
from nsc.errors import NSCError
from nsc.graphs import obstacle
from nsc.images import Image, ImageBatches, collate_images, pixels_by, read_images, tokens_seen
from nsc.packing import can_share_rows, collate, pack
from nsc.towers import FeatureStore
from nsc.vlm import Prompt, PromptBatches, Prompts, image_features, read_prompts, require_same_forward, writer_of


class Batches(Protocol):
    """The batches of a step, as a pure function of it; whether several samples share a row."""

    @property
    def shares_rows(self) -> bool: ...

    def __call__(self, step: int) -> list[Batch]: ...


@dataclass(frozen=True)
class Feed:
    """One kind of input.

    read: a source -> the samples of a task.  batches: base, body, targets, task -> samples, settings -> the batches to
    learn from, and the fixed ones for the ratios before and after.  example: base, body -> rows without any data.
    """

    read: Callable[[Any], list[Any]]
    batches: Callable[[str, nn.Module, Sequence[str], Mapping[str, Any], MergeConfig], tuple[Batches, list[Batch]]]
    example: Callable[[str, nn.Module], Batch]


def feed_of(base: str) -> Feed:
    """The row of the table for this base. Raises NSCError if there is none, or no such base."""
    takes = families.main_input(base)
    if takes not in FEEDS:
        raise NSCError(f"base {base!r} takes {takes}; nsc feeds bodies that take {' or '.join(FEEDS)}")
    return FEEDS[takes]


def _text_batches(
    base: str, model: nn.Module, targets: Sequence[str], texts: Mapping[str, list[str]], config: MergeConfig
) -> tuple[TextBatches, list[Batch]]:
    tokenizer = families.load_tokenizer(base)
    tokens = tokenize(tokenizer, texts, config.max_length)
    pad_id = pad_id_of(tokenizer)
    causal = families.is_causal(model)
    shares_rows = can_share_rows(model)
    few_shapes = config.graphs and obstacle(model) is None
    batches = TextBatches(tokens, config.batch_size, pad_id, config.seed, causal, shares_rows, few_shapes)
    some = [(ids, k) for k, rows in enumerate(tokens.values()) for ids in rows[: config.evaluation_samples]]
    ids, tasks = [ids for ids, _ in some], [k for _, k in some]
    return batches, pack(ids, tasks, pad_id, causal=causal, shares_rows=shares_rows)


def pad_id_of(tokenizer: Any) -> int:
    """What fills rows up: no matter which token, where it weighs nothing."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def _image_batches(
    base: str, model: nn.Module, targets: Sequence[str], images: Mapping[str, list[Image]], config: MergeConfig
) -> tuple[ImageBatches, list[Batch]]:
    processor = families.load_image_processor(base)
    pixels = FeatureStore(pixels_by(processor, next(model.parameters()).dtype))
    some = [(image, k) for k, rows in enumerate(images.values()) for image in rows[: config.evaluation_samples]]
    tokens = tokens_seen(model, targets, pixels(some[0][0]))
    evaluation = collate_images([pixels(image) for image, _ in some], [k for _, k in some], tokens)
    return ImageBatches(images, pixels, tokens, config.batch_size, config.seed), [evaluation]


def _prompt_batches(
    base: str, model: nn.Module, targets: Sequence[str], prompts: Mapping[str, list[Prompt]], config: MergeConfig,
    *generate: Any,
) -> tuple[PromptBatches, list[Batch]]:  # fmt: skip
    assert isinstance(model, ImageTextBody)
    if (positions := getattr(config, "positions", "prompt")) != "prompt":
        raise NSCError(f"positions {positions} of answers to images are not made yet; give positions prompt here")
    processor = families.load_processor(base)
    features = FeatureStore(image_features(model, processor))
    first = next(prompt for rows in prompts.values() for prompt in rows)
    writer = writer_of(model, processor, features(first.image), config.max_length)
    require_same_forward(model, writer, first, features(first.image))
    how = {
        "causal": families.is_causal(model.text), "shares_rows": can_share_rows(model.text),
        "few_shapes": config.graphs and obstacle(model) is None,
    }  # fmt: skip
    modality = getattr(config, "modality", "both")
    made = Prompts(features, model.image_token, pad_id_of(processor.tokenizer), modality, how)
    ids = {task: [writer.ids(prompt) for prompt in rows] for task, rows in prompts.items()}
    images = {task: [prompt.image for prompt in rows] for task, rows in prompts.items()}
    batches = PromptBatches(ids, images, made, config.batch_size, config.seed)
    fixed = replace(made, how=how | {"few_shapes": False})
    return batches, replace(batches, prompts=fixed).first(config.evaluation_samples)


def _random_text(base: str, model: nn.Module) -> Batch:
    """Seeded random tokens."""
    vocabulary = next(m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding))
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0))
    return collate(ids.tolist(), [0, 0], 0, causal=True)


def _random_images(base: str, model: nn.Module) -> Batch:
    """Seeded random pixels, as the processor prepares them; a row counts as one token."""
    noise = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = pixels_by(families.load_image_processor(base), next(model.parameters()).dtype)
    return collate_images([pixels(image) for image in read_images(list(noise))], [0, 0], 1)


def _random_prompt(base: str, model: nn.Module) -> Batch:
    """Seeded random pixels with a question."""
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = {"example": read_prompts([(noise, "What is shown?")])}
    return _prompt_batches(base, model, [], prompts, MergeConfig(graphs=False))[1][0]


FEEDS = {
    "input_ids": Feed(read_texts, _text_batches, _random_text),
    "pixel_values": Feed(read_images, _image_batches, _random_images),
    families.IMAGES_AND_TEXT: Feed(read_prompts, _prompt_batches, _random_prompt),
}
