"""Prompts as the base's own chat template and processor write them, and the image features that stand in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsc.bases.image_tower import ImageTower
from nsc.bases.llava import ImageTextBody, places
from nsc.data.image_text import Prompt, Sample
from nsc.data.images import Image, pixels_by
from nsc.data.packing import NEAR
from nsc.errors import DataError, NSCError
from nsc.runtime.placement import input_device


class Writer:
    """Writes prompts as the base reads them.

    Args:
        processor: processor of the base.
        image_token: id of the placeholder.
        expand: how many placeholders an image takes.
        max_length: text tokens of a prompt, at most.
    """

    def __init__(self, processor: Any, image_token: int, expand: int, max_length: int) -> None:
        self.processor = processor
        self.image_token = image_token
        self.expand = expand
        self.max_length = max_length
        self.placeholder = processor.tokenizer.convert_ids_to_tokens(image_token)

    def text(self, prompt: Prompt) -> str:
        """Return the text of a prompt with one placeholder.

        It follows the chat template, if there is one; a text that contains the placeholder is taken as it is.

        Args:
            prompt: image and text.

        Returns:
            What is tokenised.
        """
        if self.placeholder in prompt.text:
            return prompt.text
        if not getattr(self.processor, "chat_template", None):
            return f"{self.placeholder}\n{prompt.text}"
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
        said = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids of a prompt with all placeholders, cut after ``max_length`` text tokens.

        Args:
            prompt: image and text.

        Returns:
            Token ids.

        Raises:
            DataError: if the placeholder is cut off, or is not the only one.
        """
        tokenizer, text = self.processor.tokenizer, self.text(prompt)
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not begun)["input_ids"]
        if (count := ids.count(self.image_token)) != 1:
            raise DataError(f"{prompt.image.name}: its prompt has {count} images, {text[:80]!r}; give one in each row")
        ids = ids[: self.max_length + 1]
        if self.image_token not in ids:
            raise DataError(f"{prompt.image.name}: its place is beyond {self.max_length} tokens; raise max_length")
        at = ids.index(self.image_token)
        return [*ids[:at], *[self.image_token] * self.expand, *ids[at + 1 :]]

    def sample(self, prompt: Prompt) -> Sample:
        """Return a prompt as a sample without an answer, all of which counts.

        Args:
            prompt: image and text.

        Returns:
            The sample.
        """
        ids = self.ids(prompt)
        return Sample(ids, prompt.image, len(ids), slice(0, len(ids)))


@torch.no_grad()
def writer_of(body: ImageTextBody, processor: Any, features: Tensor, max_length: int) -> Writer:
    """Return a writer for the images of a base, with as many placeholders as its projector makes of their features.

    Args:
        body: body of the base.
        processor: processor of the base.
        features: (P, h) of one image.
        max_length: text tokens of a prompt, at most.

    Returns:
        The writer.
    """
    projected = body.multi_modal_projector(features[None].to(input_device(body)))  # type: ignore[operator]
    return Writer(processor, body.image_token, projected.shape[1], max_length)


def image_features(body: ImageTextBody, processor: Any) -> Callable[[Image], Tensor]:
    """Return a function that runs the frozen tower on one image.

    Args:
        body: body of the base.
        processor: processor of the base.

    Returns:
        Image -> (P, h) features, as the projector takes them.
    """
    pixels = pixels_by(processor.image_processor, next(body.parameters()).dtype)
    tower, device = ImageTower(body), input_device(body)
    skipped = int(body.config.vision_feature_select_strategy == "default")  # the class token

    def features(image: Image) -> Tensor:
        return tower.features(pixels(image)[None].to(device))[0, skipped:]

    return features


@torch.no_grad()
def require_same_forward(body: ImageTextBody, writer: Writer, prompt: Prompt, features: Tensor) -> None:
    """Refuse a base whose own processor and forward give other hidden states for a prompt.

    Args:
        body: body of the base.
        writer: writer of its prompts.
        prompt: one prompt.
        features: (P, h) of its image.

    Raises:
        NSCError: if the hidden states differ, or the base does not take the prompt.
    """
    device, ids = input_device(body), torch.tensor([writer.ids(prompt)])
    place = places(ids == body.image_token).to(device)
    found = body(ids.to(device), features[None, None].to(device), place)[0]
    pixels = pixels_by(writer.processor.image_processor, features.dtype)(prompt.image)
    own = dict(input_ids=ids.to(device), pixel_values=pixels[None].to(device))
    stock: Any = body.__dict__["stock"]
    try:
        expected = stock(**own, output_hidden_states=True).hidden_states[-1]
    except (TypeError, ValueError, RuntimeError) as error:
        raise NSCError(
            f"{type(stock).__name__} does not take one image for {writer.expand} placeholders: {error}"
        ) from error
    if not (found - expected).norm() <= NEAR.get(features.dtype, 0.1) * expected.norm():
        raise NSCError(f"{type(stock).__name__} makes something else of its images than LLaVA does; not supported")
