"""Images with text -> seeded batches of prompts, whose images are features that the frozen tower made once.

Each prompt is written by the base's own chat template and processor. Its placeholders are told which feature takes
their place, so prompts are packed like texts: several share a row where that saves padding.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc.bases.llava import places
from nsc.batch import Batch
from nsc.data.chat import Chat
from nsc.data.expected import Output
from nsc.data.images import IMAGE_FIELDS, Image, as_image, image_in
from nsc.data.packing import pack
from nsc.data.sampling import draw_each
from nsc.data.sources import Fields, Kind, place_of, read_samples, text_of
from nsc.data.text import Pick, text_of_row, with_answer
from nsc.errors import DataError


@dataclass(frozen=True)
class Prompt:
    """An image and a text about it.

    Attributes:
        image: the image.
        text: the text.
    """

    image: Image
    text: str

    @property
    def digest(self) -> str:
        """The digest of image and text."""
        return hashlib.sha256(f"{self.image.digest} {self.text}".encode()).hexdigest()


def read_prompts(source: str | Path | Sequence[Any]) -> list[Prompt] | list[str | Chat]:
    """Read the prompts of one task, each with one image, without labels; or its texts, where no row has an image.

    Args:
        source: a JSONL file of objects (image paths are relative to that file's folder), a parquet file or
            ``hub:NAME[:CONFIG[:SPLIT]]`` with a column of images, or pairs (image, text). Append
            ``#image+field+field`` to name the fields, that of the image first; otherwise the usual names are tried, as
            for texts and for images alone. Or what ``read_texts`` takes.

    Returns:
        The prompts, or the texts.

    Raises:
        DataError: for a missing or empty source, a row that cannot be read (by number) or unknown fields.
    """
    samples = read_samples(source, PROMPTS)
    if len({isinstance(sample, Prompt) for sample in samples}) > 1:
        raise DataError(f"{place_of(source)} holds rows with and without an image; give rows of one kind")
    return samples


class Sample(NamedTuple):
    """What a row holds of one prompt.

    Attributes:
        ids: token ids of the prompt, and of the answer behind it, if there is one.
        image: the image of the prompt.
        prompt: how many of the ids belong to the prompt.
        counted: which of the ids count, if their modality does.
    """

    ids: list[int]
    image: Image
    prompt: int
    counted: slice


@dataclass(frozen=True)
class Prompts:
    """What turns samples into batches.

    Attributes:
        features: image -> (P, h) features for its P placeholders.
        image_token: id of the placeholder.
        pad_id: id of the padding token.
        modality: which tokens count: "text", "image" or "both".
        how: keyword arguments of ``pack``.
    """

    features: Callable[[Image], Tensor]
    image_token: int
    pad_id: int
    modality: str
    how: Mapping[str, Any]

    def batches(
        self, samples: Sequence[Sample], tasks: Sequence[int], outputs: Sequence[Output] | None = None
    ) -> list[Batch]:
        """Pack samples as texts are packed, with each image beside the row that it is in.

        Args:
            samples: what the rows hold.
            tasks: number of each sample's task.
            outputs: what the experts say about each sample, if the batches are to hold it.

        Returns:
            Batches on the CPU, in which the samples of a task weigh the same.
        """
        ids, counted = [sample.ids for sample in samples], [sample.counted for sample in samples]
        packed = pack(ids, tasks, self.pad_id, **self.how, counted=counted, outputs=outputs)
        owners = pack([[i] * len(sample.ids) for i, sample in enumerate(samples)], tasks, -1, **self.how)
        holders = pack([self._holds(sample) for sample in samples], tasks, 0, **self.how)
        weights = [1 / (self.count(s) * list(tasks).count(task)) for s, task in zip(samples, tasks, strict=True)]
        images = [sample.image for sample in samples]
        planes = ((x.inputs["input_ids"], y.inputs["input_ids"] > 0) for x, y in zip(owners, holders, strict=True))
        return [self._with_images(b, *of, images, weights) for b, of in zip(packed, planes, strict=True)]

    def count(self, sample: Sample) -> int:
        """Return how many tokens of a sample count.

        Args:
            sample: what a row holds.

        Returns:
            Tokens, at least 1.

        Raises:
            DataError: naming the image, if none counts.
        """
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
        return Batch(inputs, batch.task, weight, batch.segment, batch.expected)


@dataclass(frozen=True)
class PromptBatches:
    """Batches of prompts as a pure function of the step, as ``TextBatches`` are of texts.

    Attributes:
        samples: task -> its samples.
        prompts: what turns samples into batches.
        batch_size: samples of each task in a step.
        seed: seed of the permutations.
        outputs: task and number of a sample -> what its expert says about it, where the batches hold it.
        borrowed: task -> how many of its last samples are those of other tasks; every second one drawn is one of them.

    Raises:
        DataError: naming an image of which no token counts.
    """

    samples: Mapping[str, Sequence[Sample]]
    prompts: Prompts
    batch_size: int
    seed: int = 0
    outputs: Mapping[Pick, Output] | None = None
    borrowed: Mapping[str, int] | None = None

    def __post_init__(self) -> None:
        for rows in self.samples.values():
            for sample in rows:
                self.prompts.count(sample)

    @property
    def shares_rows(self) -> bool:
        """Whether several prompts may share a row."""
        return self.prompts.how["shares_rows"]

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of a step.

        Args:
            step: from 0.

        Returns:
            Batches on the CPU, whose losses add up to the step's.
        """
        return self.packed([(task, i) for task, row in self.drawn(step).items() for i in row])

    def packed(self, picks: Sequence[Pick]) -> list[Batch]:
        """Return the batches of some samples.

        Args:
            picks: task and number of each sample.

        Returns:
            Batches on the CPU, whose losses add up to that of all samples.
        """
        order = list(self.samples)
        outputs = [self.outputs[pick] for pick in picks] if self.outputs is not None else None
        samples = [self.samples[task][i] for task, i in picks]
        return self.prompts.batches(samples, [order.index(task) for task, _ in picks], outputs)

    @property
    def rows(self) -> Mapping[str, Sequence[Any]]:
        """Task -> its samples."""
        return self.samples

    def prompts_of(self, picks: Sequence[Pick]) -> tuple[list[list[int]], Callable[[int], Tensor]]:
        """Return what is continued for generated positions.

        Args:
            picks: task and number of each sample.

        Returns:
            Token ids of each sample, and a function from its place in ``picks`` to the (P, h) features of its image.
        """
        chosen = [self.samples[task][i] for task, i in picks]
        return [sample.ids for sample in chosen], lambda j: self.prompts.features(chosen[j].image)

    def with_answers(self, answers: Mapping[Pick, Sequence[int]], positions: str) -> PromptBatches:
        """Return the same batches with answers behind some samples, of which only what computed them counts.

        Args:
            answers: task and number of a sample -> token ids of its answer.
            positions: "last" or "full".

        Returns:
            The batches.
        """
        samples = {task: list(rows) for task, rows in self.samples.items()}
        for (task, i), answer in answers.items():
            ids, counted = with_answer(samples[task][i].ids, answer, positions)
            samples[task][i] = samples[task][i]._replace(ids=ids, counted=counted)
        return replace(self, samples=samples)

    def with_outputs(self, outputs: Mapping[Pick, Output]) -> PromptBatches:
        """Return the same batches, holding what experts say.

        Args:
            outputs: task and number of a sample -> what its expert says, of every sample that is drawn.

        Returns:
            The batches.
        """
        return replace(self, outputs=outputs)

    def counted_of(self, pick: Pick) -> slice:
        """Return the tokens of a sample that count.

        Args:
            pick: task and number.

        Returns:
            All of them, or those that computed its answer.
        """
        return self.samples[pick[0]][pick[1]].counted

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Return which samples of each task a step takes.

        Args:
            step: from 0.

        Returns:
            Task -> numbers of samples.
        """
        counts = {task: len(rows) for task, rows in self.samples.items()}
        return draw_each(counts, self.borrowed or {}, self.batch_size, step, self.seed)


def _prompt(row: Any, fields: Fields, where: str, folder: Path) -> Prompt | str | Chat | None:
    if isinstance(row, str) or (isinstance(row, Mapping) and not fields and not image_in(row)):
        return text_of_row(row, fields, where, folder)
    if not isinstance(row, Mapping):
        raise DataError(f"{where} holds a {type(row).__name__}; each row must be an object with an image and a text")
    column = next((name for name in (fields[:1] if fields else IMAGE_FIELDS) if name in row), None)
    if column is None or row[column] is None:
        raise DataError(f"{where} has the fields {', '.join(row)}, no image; name it first, as in FILE#image+question")
    value = row[column]
    image = as_image(folder / value if isinstance(value, str) else value, where)
    rest = {name: x for name, x in row.items() if name != column}
    return Prompt(image, text_of(rest, (fields or ())[1:] or None, where))


def _given(pair: Any, where: str) -> Prompt | str:
    if isinstance(pair, str):
        return pair
    image, text = pair
    return Prompt(as_image(image, where), str(text))


PROMPTS = Kind("image with text", (".jsonl", ".parquet", ".txt", ".text"), _prompt, _given)
