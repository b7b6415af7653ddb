"""Conversations as rows: the shapes in which they are stored, and what the base's chat template makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from nsc.data.sources import Fields, require_unicode
from nsc.errors import DataError, clipped, reading

CHAT_FIELDS = ("messages", "conversations")
ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
ONE_DAY = (  # put before templates that write today's date, so that rows are the same on every day
    "{% macro strftime_now(format) %}{{ format.replace('%d', '26').replace('%m', '07').replace('%b', 'Jul')"
    ".replace('%B', 'July').replace('%y', '24').replace('%Y', '2024').replace('%A', 'Friday').replace('%a', 'Fri')"
    ".replace('%H', '00').replace('%M', '00').replace('%S', '00') }}{% endmacro %}\n"
)
REMEDY = "mend or remove that row, or give rows of text"


@dataclass(frozen=True)
class Chat:
    """One conversation of a task's rows.

    Attributes:
        turns: role and text of each message; a role is "system", "user" or "assistant".
        where: place of the row, for errors.
    """

    turns: tuple[tuple[str, str], ...]
    where: str = field(compare=False)

    @property
    def digest(self) -> str:
        """The digest of the turns."""
        return hashlib.sha256(json.dumps(self.turns).encode()).hexdigest()

    def written(self, tokenizer: Any, answered: bool) -> str:
        """Write the conversation as text, special tokens included.

        Args:
            tokenizer: tokenizer of the base, whose chat template writes it.
            answered: whether the text is to be answered; a last turn of the assistant is then left out and asked for.

        Returns:
            The text.

        Raises:
            DataError: naming the row, if the tokenizer has no chat template, or its template refuses the conversation
                or leaves out what the user says.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                f"{self.where}: the base's tokenizer has no chat template to write a conversation with; give rows of"
                " text, or a base with a template"
            )
        turns = list(self.turns)
        while answered and turns and turns[-1][0] == "assistant":
            turns.pop()
        users = [text.strip() for role, text in turns if role == "user"]
        if answered and not users:
            raise DataError(f"{self.where}: there is no turn of a user that could be answered; {REMEDY}")
        with reading(f"{self.where}:", REMEDY, DataError, "the base's chat template refuses it"):
            text = _rendered(tokenizer, turns, answered)
        if any(said not in text for said in users):
            raise DataError(f"{self.where}: the base's chat template leaves out what the user says; {REMEDY}")
        return text


def chat_of(row: Any, fields: Fields, where: str) -> Chat | None:
    """Return the conversation that a row holds.

    Args:
        row: a list of messages, or an object with such a list.
        fields: those that the source names; None for the usual ones, CHAT_FIELDS.
        where: place of the row, for errors.

    Returns:
        The conversation; None for a row that holds none.

    Raises:
        DataError: naming the row, for an empty conversation, or a message of unknown shape or role, or that holds
            anything but text.
    """
    name, messages = _field(row, fields)
    if messages is None:
        return None
    if not isinstance(messages, list):
        raise DataError(
            f"{where}: {name} holds a {type(messages).__name__}, not a list of messages; mend that row, or name another"
            " field as in FILE#field"
        )
    turns = tuple(_turn(message, f"{where}: message {n}") for n, message in enumerate(messages, start=1))
    if not any(text.strip() for _, text in turns):
        raise DataError(f"{where}: its conversation is empty; remove that row")
    require_unicode("".join(text for _, text in turns), where)
    return Chat(turns, where)


def _rendered(tokenizer: Any, turns: list[tuple[str, str]], answered: bool) -> str:
    template = tokenizer.get_chat_template()
    return tokenizer.apply_chat_template(
        [{"role": role, "content": text} for role, text in turns],
        chat_template=ONE_DAY + template if "strftime_now" in template else template,
        tokenize=False,
        add_generation_prompt=answered,
    )


def _field(row: Any, fields: Fields) -> tuple[str, Any]:
    """Name of the field with the messages, and what it holds: None where the row is to be read as text."""
    if isinstance(row, list):
        return "the row", row if all(isinstance(message, Mapping) for message in row) else None
    if not isinstance(row, Mapping) or (fields and len(fields) > 1):
        return "", None
    name = next((name for name in fields or CHAT_FIELDS if row.get(name) is not None), "")
    return name, None if fields and not isinstance(row.get(name), list) else row.get(name)


def _turn(message: Any, where: str) -> tuple[str, str]:
    """Role and text of a message ``{role, content}`` or ``{from, value}``."""
    if not isinstance(message, Mapping):
        raise DataError(f"{where} is a {type(message).__name__}, not an object with role and content; mend that row")
    role = message.get("from") if message.get("role") is None else message["role"]
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(f"{where} has the role {clipped(repr(role))}, not one of {', '.join(ROLES)}; mend that row")
    if message.get("tool_calls"):
        raise DataError(f"{where} calls tools, which are not written into rows; remove that row")
    content = message.get("value") if message.get("content") is None else message["content"]
    for part in content if isinstance(content, list) else []:
        if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(f"{where} holds a part of type {clipped(repr(kind))}, not text; remove that row")
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where} holds a {type(content).__name__}, not text in content or value; mend that row")
    return ROLES[role], content
