"""Unlabeled rows -> seeded batches that carry every task at once, each token knowing its task and its weight."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from nsc.batch import Batch
from nsc.data.chat import Chat, chat_of
from nsc.data.expected import Output
from nsc.data.images import image_in
from nsc.data.packing import pack
from nsc.data.sampling import draw_each
from nsc.data.sources import Fields, Kind, read_samples, require_unicode, text_of
from nsc.errors import DataError


def read_texts(source: str | Path | Sequence[Any]) -> list[str | Chat]:
    """Read the texts of one task, without labels.

    Args:
        source: a JSONL file (objects or strings), a parquet file, a plain text file (one sample per line),
            ``hub:NAME[:CONFIG[:SPLIT]]`` (a Hub dataset; needs the ``datasets`` extra), or the rows themselves. Append
            ``#field+field`` to name the fields, which are joined by a newline; otherwise the usual names are tried: a
            conversation in messages or conversations, else text, prompt, text_a + text_b, premise + hypothesis...

    Returns:
        The texts and conversations; blank texts are left out.

    Raises:
        DataError: for a missing or empty source, a line that cannot be read (by number), unknown fields, or a
            conversation that is empty or of unknown shape.
    """
    return read_samples(source, TEXTS)


def text_of_row(row: Any, fields: Fields, where: str, folder: Path) -> str | Chat | None:
    """Return the text or the conversation of a row.

    Args:
        row: a string, an object, or a list of messages.
        fields: names of its fields, which are joined; None for the usual ones.
        where: place of the row, for errors.
        folder: of its file.

    Returns:
        The text or the conversation; None for a blank text.

    Raises:
        DataError: if it has no such fields.
    """
    if chat := chat_of(row, fields, where):
        return chat
    text = require_unicode(row if isinstance(row, str) else text_of(row, fields, where), where)
    return text if text.strip() else None


def _given(value: Any, where: str) -> str | Chat | None:
    if isinstance(value, (Mapping, list)):
        return text_of_row(value, None, where, Path())
    text = require_unicode(str(value), where)
    return text if text.strip() else None


TEXTS = Kind("text", (".jsonl", ".txt", ".text", ".parquet"), text_of_row, _given)


def texts_alone(source: str | Path | Sequence[Any], why: str) -> list[str | Chat]:
    """Read the texts of one task for a base that is fed with no image: a row that holds one is refused.

    Args:
        source: as ``read_texts`` takes it.
        why: why images are not fed to this base.

    Returns:
        The texts and conversations.

    Raises:
        DataError: as ``read_texts`` does, and for a row with an image.
    """

    def of_row(row: Any, fields: Fields, where: str, folder: Path) -> str | Chat | None:
        if field := image_in(row):
            raise DataError(f"{where} holds an image in {field}, but {why}; give this base rows of text alone")
        return text_of_row(row, fields, where, folder)

    def given(value: Any, where: str) -> str | Chat | None:
        if isinstance(value, (Mapping, list)):
            return of_row(value, None, where, Path())
        if not isinstance(value, str):
            raise DataError(f"{where} is a {type(value).__name__}, not a text, but {why}; give this base texts alone")
        return TEXTS.given(value, where)

    return read_samples(source, TEXTS._replace(of_row=of_row, given=given))


AT_ONCE = 10_000  # samples of a task that are tokenised before any is asked for
Value = TypeVar("Value")
Pick = tuple[str, int]  # task and number of a sample


class Samples(Sequence[Value]):
    """What is made of each sample of a task, when it is first asked for, and kept.

    Args:
        make: number of a sample -> what is made of it.
        count: how many samples there are.
    """

    def __init__(self, make: Callable[[int], Value], count: int) -> None:
        self._make, self._count = make, count
        self._made: dict[int, Value] = {}

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self._count))]
        i = range(self._count)[i]
        if i not in self._made:
            self._made[i] = self._make(i)
        return self._made[i]

    def __setitem__(self, i: int, value: Value) -> None:
        self._made[range(self._count)[i]] = value

    def copy(self) -> Samples[Value]:
        """Copy what was made so far, as ``list.copy`` does.

        Returns:
            The same samples, apart from these in what is set.
        """
        other = Samples(self._make, self._count)
        other._made.update(self._made)
        return other


@dataclass(frozen=True)
class TextBatches:
    """Batches of texts as a pure function of the step, the same in every process and after every resume.

    Attributes:
        tokens: task -> token ids of each sample; those of many are made when they are asked for.
        batch_size: samples of each task in a step, drawn from a permutation that is reshuffled each time round.
        pad_id: id of the padding token.
        seed: seed of the permutations.
        causal: whether the body is causal, so that right padding reaches no token and needs no mask.
        shares_rows: whether the body keeps several samples in one row apart.
        few_shapes: whether steps are replayed where their shapes recur.
        counted: task -> which tokens of each sample count; None for all.
        outputs: task and number of a sample -> what its expert says about it, where the batches hold it.
        borrowed: task -> how many of its last samples are those of other tasks; every second one drawn is one of them.
    """

    tokens: Mapping[str, list[list[int]] | Samples[list[int]]]
    batch_size: int
    pad_id: int
    seed: int = 0
    causal: bool = True
    shares_rows: bool = False
    few_shapes: bool = False
    counted: Mapping[str, Sequence[slice]] | None = None
    outputs: Mapping[Pick, Output] | None = None
    borrowed: Mapping[str, int] | None = None

    def __call__(self, step: int) -> list[Batch]:
        """Return the batches of a step.

        Args:
            step: from 0.

        Returns:
            Batches on the CPU, whose losses add up to the step's.
        """
        return self.packed([(task, i) for task, row in self.drawn(step).items() for i in row], self.few_shapes)

    def packed(self, picks: Sequence[Pick], few_shapes: bool = False) -> list[Batch]:
        """Return the batches of some samples.

        Args:
            picks: task and number of each sample.
            few_shapes: whether the shapes should be those of other steps.

        Returns:
            Batches on the CPU, whose losses add up to that of all samples.
        """
        places = list(self.tokens)
        return pack(
            [self.tokens[task][i] for task, i in picks],
            [places.index(task) for task, _ in picks],
            self.pad_id,
            causal=self.causal,
            shares_rows=self.shares_rows,
            few_shapes=few_shapes,
            counted=[self.counted[task][i] for task, i in picks] if self.counted else None,
            outputs=[self.outputs[pick] for pick in picks] if self.outputs is not None else None,
        )

    @property
    def rows(self) -> Mapping[str, Sequence[Any]]:
        """Task -> its samples."""
        return self.tokens

    def prompts_of(self, picks: Sequence[Pick]) -> tuple[list[list[int]], None]:
        """Return what is continued for generated positions.

        Args:
            picks: task and number of each sample.

        Returns:
            Token ids of each sample, and no images.
        """
        return [self.tokens[task][i] for task, i in picks], None

    def with_answers(self, answers: Mapping[Pick, Sequence[int]], positions: str) -> TextBatches:
        """Return the same batches with answers behind some samples, of which only what computed them counts.

        Args:
            answers: task and number of a sample -> token ids of its answer.
            positions: "last" or "full".

        Returns:
            The batches.
        """
        tokens = {task: own.copy() for task, own in self.tokens.items()}
        counted = {task: Samples(partial(_all_of, own), len(own)) for task, own in tokens.items()}
        for (task, i), answer in answers.items():
            tokens[task][i], counted[task][i] = with_answer(tokens[task][i], answer, positions)
        return replace(self, tokens=tokens, counted=counted)

    def with_outputs(self, outputs: Mapping[Pick, Output]) -> TextBatches:
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
        task, i = pick
        return self.counted[task][i] if self.counted else slice(0, len(self.tokens[task][i]))

    def drawn(self, step: int) -> dict[str, list[int]]:
        """Return which samples of each task a step takes.

        Args:
            step: from 0.

        Returns:
            Task -> numbers of samples.
        """
        counts = {task: len(rows) for task, rows in self.tokens.items()}
        return draw_each(counts, self.borrowed or {}, self.batch_size, step, self.seed)


def _all_of(samples: Sequence[list[int]], i: int) -> slice:
    return slice(0, len(samples[i]))


def tokenize(
    tokenizer: Any, texts: Mapping[str, Sequence[str | Chat]], max_length: int, answered: bool = False
) -> dict[str, list[list[int]] | Samples[list[int]]]:
    """Tokenise every sample, cut at ``max_length``; of a task with more than ``AT_ONCE``, each when it is asked for.

    Args:
        tokenizer: tokenizer of the base.
        texts: task -> its texts and conversations; of these the chat template writes the special tokens.
        max_length: tokens of a sample, at most.
        answered: whether the samples are to be answered, so that a conversation ends where the assistant's turn begins.

    Returns:
        Task -> token ids of each sample.

    Raises:
        DataError: naming a sample that has no token, or a conversation that the chat template cannot write, at once or
            when it is asked for.
    """

    def encode(task: str, rows: Sequence[str | Chat], first: int = 0) -> list[list[int]]:
        ids: list[list[int]] = []
        for plain, group in groupby(rows, key=lambda row: isinstance(row, str)):
            own = [row if isinstance(row, str) else row.written(tokenizer, answered) for row in group]
            ids += tokenizer(own, truncation=True, max_length=max_length, add_special_tokens=plain)["input_ids"]
        if empty := [i for i, own in enumerate(ids, start=first) if not own]:
            raise DataError(f"sample {empty[0] + 1} of task {task} has no token; remove empty texts from its data")
        return ids

    def lazily(task: str, rows: Sequence[str | Chat]) -> Samples[list[int]]:
        return Samples(lambda i: encode(task, rows[i : i + 1], i)[0], len(rows))

    return {task: (encode if len(rows) <= AT_ONCE else lazily)(task, rows) for task, rows in texts.items()}


def pad_id_of(tokenizer: Any) -> int:
    """Return the id of the padding token; any token will do, since padding weighs nothing.

    Args:
        tokenizer: tokenizer of the base.

    Returns:
        A token id.
    """
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def with_answer(prompt: Sequence[int], answer: Sequence[int], positions: str) -> tuple[list[int], slice]:
    """Return a prompt with its answer, and which of the tokens count.

    Args:
        prompt: token ids.
        answer: token ids; the last is computed and never read.
        positions: "full" counts all tokens that computed the answer, "last" the last of them.

    Returns:
        Token ids of the row, and the tokens that count.
    """
    ids = [*prompt, *answer[:-1]]
    return ids, slice(len(prompt) - 1 if positions == "full" else len(ids) - 1, len(ids))
