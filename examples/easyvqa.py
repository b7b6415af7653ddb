"""Four tasks on the images and questions of easy-VQA, which come with its PyPI package.

    pip install --no-deps easy-vqa==1.0

4000 images to train on and 1000 others to test with, 64 x 64, one coloured shape each. Questions that hold a negation
("is there not a circle?") are left out, and of those answered with "no" only as many are kept as are answered
with "yes"
(otherwise "no" alone would be right in 82 %). The captions are by template, of the answers and of where the pixels lie.
"""

import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from PIL import Image, ImageChops

COLORS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PLACES = ("top left", "top right", "bottom left", "bottom right")
Part = Literal["train", "test"]


@dataclass(frozen=True)
class Row:
    """One question about one image, and its answer."""

    image: Path
    prompt: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """What one image shows."""

    image: Path
    color: str
    shape: str
    place: str

    @property
    def caption(self) -> str:
        """Colour and shape, as the projector is trained to show them."""
        return f"a {self.color} {self.shape}"

    @property
    def long_caption(self) -> str:
        """Colour, shape and place, as the task asks for them."""
        return f"{self.caption} at the {self.place}"


TASKS: dict[str, Callable[[Part], list[Row]]] = {
    "color": lambda part: _questions(part, lambda question, answer: answer in COLORS),
    "shape": lambda part: _questions(part, lambda question, answer: answer in SHAPES),
    "presence": lambda part: _presence(part),
    "caption": lambda part: [Row(s.image, "describe the image", s.long_caption) for s in scenes(part)],
}


def load(task: str, part: Part) -> list[Row]:
    """Return the rows of one task, in the same shuffled order every time."""
    rows = TASKS[task](part)
    random.Random(f"{task}/{part}").shuffle(rows)
    return rows


def write_unlabelled(task: str, path: Path, count: int) -> Path:
    """Write ``count`` training rows as JSON lines of an image and a prompt, without answers, and return ``path``."""
    rows = [{"image": str(row.image), "prompt": row.prompt} for row in load(task, "train")[:count]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@cache
def scenes(part: Part) -> list[Scene]:
    """Return what the images show, by their questions, without the few whose colour or shape these leave open."""
    known: dict[Path, set[str]] = {}
    for row in _all(part):
        told = re.findall("|".join(COLORS + SHAPES), f"{row.prompt} {row.answer}")
        if row.answer not in ("yes", "no") or (row.answer == "yes" and not _negated(row.prompt)):
            known.setdefault(row.image, set()).update(told)
    shown = []
    for image, words in sorted(known.items()):
        color, shape = words & set(COLORS), words & set(SHAPES)
        if color and shape:
            shown.append(Scene(image, color.pop(), shape.pop(), _place(image)))
    return shown


def _questions(part: Part, chosen: Callable[[str, str], bool]) -> list[Row]:
    return [row for row in _all(part) if chosen(row.prompt, row.answer) and not _negated(row.prompt)]


def _presence(part: Part) -> list[Row]:
    yes, no = (_questions(part, lambda question, answer, a=a: answer == a) for a in ("yes", "no"))
    return yes + random.Random(0).sample(no, len(yes))


def _negated(question: str) -> bool:
    return bool(re.search(r"\b(not|no)\b", question))


def _all(part: Part) -> Iterator[Row]:
    folder = _folder() / part
    for question, answer, number in json.loads((folder / "questions.json").read_text()):
        yield Row(folder / "images" / f"{number}.png", question, answer)


def _folder() -> Path:
    spec = find_spec("easy_vqa")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("images and questions are in a PyPI package: pip install --no-deps easy-vqa==1.0")
    return Path(spec.origin).parent / "data"


def _place(image: Path) -> str:
    """Return the quarter of the image that holds the middle of the shape."""
    with Image.open(image) as picture:
        pixels = picture.convert("RGB")
    ground = Image.new("RGB", pixels.size, pixels.getpixel((0, 0)))
    left, top, right, bottom = ImageChops.difference(pixels, ground).getbbox()
    return PLACES[2 * (top + bottom > pixels.height) + (left + right > pixels.width)]
