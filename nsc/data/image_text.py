"""Images with text -> seeded batches of prompts, whose images are features that the frozen tower made once.

Each prompt is written by the base's own chat template and processor. Its placeholders are told which feature takes
their place, so prompts are packed like texts: several share a row where that saves padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc.bases.image_tower import ImageTower
from nsc.bases.llava import ImageTextBody, places
from nsc.batch import Batch
from nsc.data.images import IMAGE_FIELDS, Image, as_image, pixels_by
from nsc.data.packing import NEAR, pack
from nsc.data.sampling import draw
from nsc.data.sources import Fields, Kind, read_samples, text_of
from nsc.errors import DataError, NSCError
from nsc.runtime.placement import input_device

MODALITIES = ("both", "text", "image")


@dataclass(frozen=True)
class Prompt:
    """An image and what is said about it."""

    image: Image
    text: str

    @property
    def digest(self) -> str:
        """Of both."""
        return hashlib.sha256(f"{self.image.digest} {self.text}".encode()).hexdigest()


def read_prompts(source: str | Path | Sequence[Any]) -> list[Prompt]:
    """Read the prompts of one task, each with one image, without labels.

    Args:
        source: a JSONL file of objects (image paths are relative to that file's folder), a parquet file or
            ``hub:NAME[:CONFIG[:SPLIT]]`` with a column of images, or pairs (image, text). Append
            ``#image+field+field`` to name the fields, that of the image first; otherwise the usual names are tried, as
            for texts and for images alone.

    Returns:
        The prompts.

    Raises:
        DataError: for a missing or empty source, a row that cannot be read (by number) or unknown fields.
    """
    return read_samples(source, PROMPTS)


class Sample(NamedTuple):
    """What a row holds of a prompt.

    ids: of the prompt, and of the answer behind it where there is one.  image: the prompt's.  prompt: how many of the
    ids are the prompt's.  counted: which of them count, if their modality does.
    """

    ids: list[int]
    image: Image
    prompt: int
    counted: slice


@dataclass(frozen=True)
class Prompts:
    """Samples -> batches.

    features: an image -> (P, h), P placeholders of ``image_token`` each.  modality: whether tokens of text, of images
    or both count.  how: what ``pack`` takes.
    """

    features: Callable[[Image], Tensor]
    image_token: int
    pad_id: int
    modality: str
    how: Mapping[str, Any]

    def batches(self, samples: Sequence[Sample], tasks: Sequence[int]) -> list[Batch]:
        """Packed as texts are, each image beside the row that it is in; samples of a task weigh the same."""
        counted = [sample.counted for sample in samples]
        packed = pack([sample.ids for sample in samples], tasks, self.pad_id, **self.how, counted=counted)
        owners = pack([[i] * len(sample.ids) for i, sample in enumerate(samples)], tasks, -1, **self.how)
        holders = pack([self._holds(sample) for sample in samples], tasks, 0, **self.how)
        weights = [1 / (self.count(s) * list(tasks).count(task)) for s, task in zip(samples, tasks, strict=True)]
        images = [sample.image for sample in samples]
        planes = ((x.inputs["input_ids"], y.inputs["input_ids"] > 0) for x, y in zip(owners, holders, strict=True))
        return [self._with_images(b, *of, images, weights) for b, of in zip(packed, planes, strict=True)]

    def count(self, sample: Sample) -> int:
        """How many tokens of a sample count. Raises DataError naming its image if none does."""
        of_image = self._holds(sample)[sample.counted]
        of = {"both": len(of_image), "text": len(of_image) - sum(of_image), "image": sum(of_image)}
        if not of[self.modality]:
            raise DataError(
                f"{sample.image.name}: with modality {self.modality} none of its tokens counts; give it another text,"
                " or modality both"
            )
        return of[self.modality]

    def _holds(self, sample: Sample) -> list[int]:
        """1 for each token in whose place a feature stands, else 0: an answer is text, even a placeholder in it."""
        return [int(i < sample.prompt and token == self.image_token) for i, token in enumerate(sample.ids)]

    def _with_images(
        self, batch: Batch, owner: Tensor, holds: Tensor, images: Sequence[Image], weights: Sequence[float]
    ) -> Batch:
        """owner: (b, L) the sample that each token is of, -1 for padding.  holds: (b, L) whether a feature is there."""
        rows = [list(dict.fromkeys(i for i in row if i >= 0)) for row in owner.tolist()]
        made = {i: self.features(images[i]) for row in rows for i in row}
        some = next(iter(made.values()))
        features = some.new_zeros(len(rows), max(map(len, rows)), *some.shape)
        for r, row in enumerate(rows):
            for j, i in enumerate(row):
                features[r, j] = made[i]
        counts = (batch.weight > 0) & {"both": owner >= 0, "text": ~holds, "image": holds}[self.modality]
        weight = torch.where(counts, torch.tensor(weights, dtype=batch.weight.dtype)[owner], 0)
        inputs = {**batch.inputs, "features": features, "place": places(holds)}
        return Batch(inputs, batch.task, weight, batch.segment)


@dataclass(frozen=True)
class PromptBatches:
    """Batches as a pure function of the step, the same in every process and after every resume, as ``TextBatches``.

    samples: task -> its own. Raises DataError naming an image of which nothing counts.
    """

    samples: Mapping[str, Sequence[Sample]]
    prompts: Prompts
    batch_size: int
    seed: int = 0

    def __post_init__(self) -> None:
        for rows in self.samples.values():
            for sample in rows:
                self.prompts.count(sample)

    @property
    def shares_rows(self) -> bool:
        """Whether several prompts may share a row."""
        return self.prompts.how["shares_rows"]

    def __call__(self, step: int) -> list[Batch]:
        """The batches of one step, on the CPU; their losses add up to the step's."""
        return self.packed([(task, i) for task, row in self.drawn(step).items() for i in row])

    def packed(self, picks: Sequence[tuple[str, int]]) -> list[Batch]:
        """The batches of some samples, each by its task and number; their losses add up to that of all."""
        order = list(self.samples)
        return self.prompts.batches([self.samples[t][i] for t, i in picks], [order.index(t) for t, _ in picks])

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Task -> which of its samples this step takes."""
        return {task: draw(len(x), self.batch_size, step, f"{self.seed}/{task}") for task, x in self.samples.items()}


class Writer:
    """Writes prompts as the base reads them.

    processor: its own.  image_token: the placeholder's id.  expand: how many placeholders an image takes.  max_length:
    tokens of text in a prompt.
    """

    def __init__(self, processor: Any, image_token: int, expand: int, max_length: int) -> None:
        self.processor = processor
        self.image_token = image_token
        self.expand = expand
        self.max_length = max_length
        self.placeholder = processor.tokenizer.convert_ids_to_tokens(image_token)

    def text(self, prompt: Prompt) -> str:
        """By the chat template, where there is one; as it is, where it says itself where the image goes."""
        if self.placeholder in prompt.text:
            return prompt.text
        if not getattr(self.processor, "chat_template", None):
            return f"{self.placeholder}\n{prompt.text}"
        content = [{"type": "image"}, {"type": "text", "text": prompt.text}]
        said = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)

    def ids(self, prompt: Prompt) -> list[int]:
        """Token ids with all placeholders, cut behind ``max_length`` tokens of text.

        Raises DataError if the image is not among them, or not alone.
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
        """Without an answer: all of it counts."""
        ids = self.ids(prompt)
        return Sample(ids, prompt.image, len(ids), slice(0, len(ids)))


@torch.no_grad()
def writer_of(body: ImageTextBody, processor: Any, features: Tensor, max_length: int) -> Writer:
    """For images of such features (P, h): as many placeholders as the projector makes of them."""
    projected = body.multi_modal_projector(features[None].to(input_device(body)))  # type: ignore[operator]
    return Writer(processor, body.image_token, projected.shape[1], max_length)


def image_features(body: ImageTextBody, processor: Any) -> Callable[[Image], Tensor]:
    """What makes the features of an image by the frozen tower, (P, h), as the projector takes them."""
    pixels = pixels_by(processor.image_processor, next(body.parameters()).dtype)
    tower, device = ImageTower(body), input_device(body)
    skipped = int(body.config.vision_feature_select_strategy == "default")  # the class token

    def features(image: Image) -> Tensor:
        return tower.features(pixels(image)[None].to(device))[0, skipped:]

    return features


@torch.no_grad()
def require_same_forward(body: ImageTextBody, writer: Writer, prompt: Prompt, features: Tensor) -> None:
    """Raise NSCError unless one prompt gives the hidden states of the base's own processor and forward."""
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


def _prompt(row: Any, fields: Fields, where: str, folder: Path) -> Prompt:
    if not isinstance(row, Mapping):
        raise DataError(f"{where} holds a {type(row).__name__}; each row must be an object with an image and a text")
    column = next((name for name in (fields[:1] if fields else IMAGE_FIELDS) if name in row), None)
    if column is None or row[column] is None:
        raise DataError(f"{where} has the fields {', '.join(row)}, no image; name it first, as in FILE#image+question")
    value = row[column]
    image = as_image(folder / value if isinstance(value, str) else value, where)
    rest = {name: x for name, x in row.items() if name != column}
    return Prompt(image, text_of(rest, (fields or ())[1:] or None, where))


def _given(pair: Any, where: str) -> Prompt:
    image, text = pair
    return Prompt(as_image(image, where), str(text))


PROMPTS = Kind("image with text", (".jsonl", ".parquet"), _prompt, _given)
