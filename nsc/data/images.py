"""Unlabeled images -> seeded batches that carry every task at once, as the base's own processor prepares them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.data.expected import Output, expected
from nsc.data.sampling import draw_each
from nsc.data.sources import FOLDER, IMAGE_SUFFIXES, Fields, Kind, naming_errors, optional_module, read_samples
from nsc.errors import DataError, TargetError
from nsc.runtime.placement import input_device

IMAGE_FIELDS = ("image", "img", "picture")


@dataclass(frozen=True)
class Image:
    """One image, decoded when it is used; two are equal if their digests are.

    Attributes:
        name: where it is from, for errors.
        content: a file, a file's bytes, or a PIL image in RGB.
        digest: SHA-256 of the content.
    """

    name: str = field(compare=False)
    content: Any = field(compare=False, repr=False)
    digest: str

    def decode(self) -> Any:
        """Decode the image.

        Returns:
            A PIL image in RGB.

        Raises:
            DataError: naming the image, if Pillow cannot read it.
        """
        pillow = optional_module("PIL.Image")
        if isinstance(self.content, pillow.Image):
            return self.content
        file = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        with naming_errors(self.name), pillow.open(file) as image:
            return image.convert("RGB")


def read_images(source: str | Path | Sequence[Any]) -> list[Image]:
    """Read the images of one task, without labels.

    Args:
        source: a folder (every PNG and JPEG in it and below), a parquet file or ``hub:NAME[:CONFIG[:SPLIT]]`` (a Hub
            dataset; needs the ``datasets`` extra) with a column of images as Hub datasets store them, or images in
            memory: PIL images, uint8 arrays or tensors, (H, W, 3) or (3, H, W). Append ``#column`` to name the
            column; otherwise the usual names are tried (image, img, picture).

    Returns:
        The images, which are decoded when they are used.

    Raises:
        DataError: for a missing or empty source, an image that cannot be read (by name) or an unknown column, and if
            the ``images`` extra (Pillow, pyarrow) is not installed.
    """
    return read_samples(source, IMAGES)


@dataclass(frozen=True)
class ImageBatches:
    """Batches of images as a pure function of the step, the same in every process and after every resume.

    Attributes:
        images: task -> its images.
        pixels: image -> (3, H, W), as the base takes it.
        tokens: tokens that the base makes of one image.
        batch_size: images of each task in a step, drawn as in ``TextBatches``.
        seed: seed of the permutations.
        outputs: task and number of an image -> what its expert says about it, where the batches hold it.
        borrowed: task -> how many of its last images are those of other tasks; every second one drawn is one of them.
    """

    images: Mapping[str, Sequence[Image]]
    pixels: Callable[[Image], Tensor]
    tokens: int
    batch_size: int
    seed: int = 0

    outputs: Mapping[tuple[str, int], Output] | None = None
    borrowed: Mapping[str, int] | None = None

    shares_rows = False

    def __call__(self, step: int) -> list[Batch]:
        """Return the one batch of a step.

        Args:
            step: from 0.

        Returns:
            The batch, on the CPU, in a list.
        """
        return self.packed([(task, i) for task, row in self.drawn(step).items() for i in row])

    def packed(self, picks: Sequence[tuple[str, int]]) -> list[Batch]:
        """Return the one batch of some images.

        Args:
            picks: task and number of each image.

        Returns:
            The batch, on the CPU, in a list.
        """
        order = list(self.images)
        outputs = [self.outputs[pick] for pick in picks] if self.outputs is not None else None
        pixels = [self.pixels(self.images[task][i]) for task, i in picks]
        return [collate_images(pixels, [order.index(task) for task, _ in picks], self.tokens, outputs)]

    @property
    def rows(self) -> Mapping[str, Sequence[Any]]:
        """Task -> its images."""
        return self.images

    def with_outputs(self, outputs: Mapping[tuple[str, int], Output]) -> ImageBatches:
        """Return the same batches, holding what experts say.

        Args:
            outputs: task and number of an image -> what its expert says, of every image that is drawn.

        Returns:
            The batches.
        """
        return replace(self, outputs=outputs)

    def counted_of(self, pick: tuple[str, int]) -> slice:
        """Return the tokens of an image that count.

        Args:
            pick: task and number.

        Returns:
            All of them.
        """
        return slice(0, self.tokens)

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Return which images of each task a step takes.

        Args:
            step: from 0.

        Returns:
            Task -> numbers of images.
        """
        counts = {task: len(rows) for task, rows in self.images.items()}
        return draw_each(counts, self.borrowed or {}, self.batch_size, step, self.seed)


def collate_images(
    pixels: Sequence[Tensor], tasks: Sequence[int], tokens: int, outputs: Sequence[Output] | None = None
) -> Batch:
    """Put one image in each row; every image weighs the same within its task.

    Args:
        pixels: (3, H, W) of each image.
        tasks: number of each image's task.
        tokens: tokens that the base makes of one image.
        outputs: what the experts say about each image, if the batch is to hold it.

    Returns:
        The batch, with weights in the dtype of the pixels, but at least float32.

    Raises:
        DataError: if images differ in size.
    """
    sizes = sorted({tuple(image.shape) for image in pixels})
    if len(sizes) > 1:
        raise DataError(f"images of one batch differ in size: {sizes[:3]}; have the image processor resize and crop")
    task = torch.tensor(tasks)
    precision = torch.promote_types(pixels[0].dtype, torch.float32)
    weight = 1 / (tokens * torch.bincount(task)[task].to(precision))
    task, weight = (row[:, None].repeat(1, tokens) for row in (task, weight))
    batch = Batch({"pixel_values": torch.stack(list(pixels))}, task, weight)
    if outputs is None:
        return batch
    rows = [[i] for i in range(len(tasks))]
    counts, starts = torch.tensor(list(tasks)).bincount(), dict.fromkeys(range(len(tasks)), 0)
    return replace(batch, expected=expected(rows, starts, tasks, outputs, counts, (len(rows), 1)))


def pixels_by(processor: Any, dtype: torch.dtype) -> Callable[[Image], Tensor]:
    """Return a function that prepares one image for the base.

    Args:
        processor: image processor of transformers.
        dtype: dtype of the pixels.

    Returns:
        Image -> (3, H, W) on the CPU.
    """

    def pixels(image: Image) -> Tensor:
        return processor(images=[image.decode()], return_tensors="pt")["pixel_values"][0].to(dtype)

    return pixels


@torch.no_grad()
def tokens_seen(model: nn.Module, targets: Sequence[str], pixels: Tensor) -> int:
    """Return how many tokens of one image enter the targets, class and register tokens included; one image is run.

    Args:
        model: body of the base.
        targets: names of the measured modules.
        pixels: (3, H, W).

    Returns:
        Tokens.

    Raises:
        TargetError: if a target does not run, or targets see different numbers of tokens.
    """
    seen: dict[str, int] = {}

    def count(name: str) -> Callable[..., None]:
        return lambda module, args: seen.update({name: args[0].shape[:-1].numel()})

    hooks = [model.get_submodule(name).register_forward_pre_hook(count(name)) for name in targets]
    try:
        model(pixel_values=pixels[None].to(input_device(model)))
    finally:
        for hook in hooks:
            hook.remove()
    counts = {name: seen.get(name, 0) for name in targets}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        raise TargetError(f"targets must see the same tokens of an image, but see {counts}; choose among those alike")
    return counts[targets[0]]


def _columns(there: Sequence[str], fields: Fields, where: str) -> list[str]:
    chosen = next((name for name in fields or IMAGE_FIELDS if name in there), None)
    if chosen is None or len(fields or ()) > 1:
        raise DataError(f"{where} has the columns {', '.join(there)}, not one of images; name it as in FILE#column")
    return [chosen]


def _image(row: Any, fields: Fields, where: str, folder: Path) -> Image:
    """A file of a folder, or the one column that is read of a table."""
    return as_image(row if isinstance(row, Path) else next(iter(row.values())), where)


def image_in(row: Any) -> str | None:
    """Return which field of a row holds an image, by its usual names or by what stands in it.

    Args:
        row: of a file or a dataset.

    Returns:
        The field, or None.
    """
    fields = row.items() if isinstance(row, Mapping) else ()
    there = (name for name, value in fields if value is not None and (name in IMAGE_FIELDS or _is_image(value)))
    return next(there, None)


def _is_image(value: Any) -> bool:
    if isinstance(value, str):
        return value.lower().endswith(IMAGE_SUFFIXES)
    return (isinstance(value, Mapping) and {"bytes", "path"} <= value.keys()) or hasattr(value, "getpixel")


def as_image(value: Any, name: str) -> Image:
    """Return an image in any form as an ``Image``.

    Args:
        value: a path, a file's bytes, a row {"bytes", "path"}, a PIL image, a uint8 array or tensor.
        name: name of the image, for errors.

    Returns:
        The image.

    Raises:
        DataError: if it is none of these, or broken.
    """
    pillow = optional_module("PIL.Image")
    if isinstance(value, dict):
        value = value.get("bytes") or (Path(value["path"]) if value.get("path") else None)
    if isinstance(value, pillow.Image):
        value = value.convert("RGB")
        return Image(name, value, _digest(f"{value.size}".encode() + value.tobytes()))
    if not isinstance(value, (bytes, Path)):
        return as_image(_from_array(pillow, value, name), name)
    with naming_errors(name):
        data = value if isinstance(value, bytes) else value.read_bytes()
        with pillow.open(io.BytesIO(data)) as image:
            image.verify()  # what the format can check without decoding
    return Image(name, value, _digest(data))


def _from_array(pillow: Any, value: Any, name: str) -> Any:
    try:
        array = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} is a {type(value).__name__}, not an image; remove it") from error
    if array.dtype != torch.uint8 or array.ndim != 3 or 3 not in (array.shape[0], array.shape[-1]):
        raise DataError(
            f"{name} is {array.dtype} {tuple(array.shape)}; give uint8 from 0 to 255, (H, W, 3) or (3, H, W), or a PIL"
            " image"
        )
    rows = array if array.shape[-1] == 3 else array.movedim(0, -1)
    return pillow.fromarray(rows.contiguous().cpu().numpy())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


IMAGES = Kind("image", (FOLDER, ".parquet"), _image, given=as_image, columns=_columns)
