"""What of a merge may leave this machine: names on the Hub; paths stay in a file that is not uploaded."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from nsc.errors import NSCError

LOCAL, IGNORED = "local.yaml", ".gitignore"
LOCAL_PATH = re.compile(r"(?<![\w.:/~-])/[^\s,;:'\"()]+")  # in running text; "and/or" and addresses are none


def hub_id(place: str | Path | None) -> str | None:
    """Return the name that a place has on the Hub.

    Args:
        place: a folder, a snapshot in the Hub's cache, or USER/NAME.

    Returns:
        USER/NAME; None for a folder of this machine alone.
    """
    text = str(place or "")
    cached = [part for part in Path(text).parts if part.startswith("models--")]
    if cached:
        return cached[-1].removeprefix("models--").replace("--", "/")
    return text if "/" in text and not Path(text).exists() and _is_repository(text) else None


def require_hub_id(base_id: str | None) -> None:
    """Refuse what cannot name a base on the Hub.

    Args:
        base_id: as a user gave it; None for nothing given.

    Raises:
        NSCError: for anything but USER/NAME, or NAME alone.
    """
    if base_id is not None and not _is_repository(base_id):
        raise NSCError(f"base id {base_id!r} is no name of the Hub; give USER/NAME, by which others find the base")


def public_base(base: str, named: Iterable[str | None], base_id: str | None = None) -> str | None:
    """Return the name by which others find the base.

    Args:
        base: folder or Hub id that was merged on.
        named: bases that the adapters' own configs name.
        base_id: what the user calls it; overrides all else.

    Returns:
        A Hub id; None where none is known, or where adapters name several.
    """
    own = hub_id(base) or (None if Path(base).exists() or not _is_repository(base) else base)
    others = {name for name in map(hub_id, named) if name}
    return base_id or own or (others.pop() if len(others) == 1 else None)


@dataclass(frozen=True)
class PublicNames:
    """Names for the places of this machine.

    Attributes:
        names: place -> name; any other absolute path is called by its last part.
    """

    names: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, base: str, base_id: str | None, places: Iterable[str]) -> PublicNames:
        """Find the names of a merge's places.

        Args:
            base: folder or Hub id that was merged on.
            base_id: as ``public_base`` gives it.
            places: other places, such as those of the adapters.

        Returns:
            The names.
        """
        names = {place: hub_id(place) or Path(place).name for place in places if Path(place).is_absolute()}
        return cls(names | {base: base_id or Path(base).name})

    def apply(self, value: Any) -> Any:
        """Call every place by its name.

        Args:
            value: text, or dictionaries, sequences and dataclasses of such.

        Returns:
            The same without paths of this machine.
        """
        if isinstance(value, str):
            return self._text(value)
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{f.name: self.apply(getattr(value, f.name)) for f in fields(value)})
        if isinstance(value, Mapping):
            return {key: self.apply(item) for key, item in value.items()}
        return type(value)(map(self.apply, value)) if type(value) in (list, tuple) else value

    def _text(self, text: str) -> str:
        if text in self.names:
            return self.names[text]
        for place in sorted(filter(is_local, self.names), key=len, reverse=True):
            text = text.replace(place, self.names[place])
        if is_local(text):
            return hub_id(text) or Path(text).name
        return LOCAL_PATH.sub(lambda found: Path(found[0]).name, text)


def is_local(text: str) -> bool:
    """Return whether a text is an absolute path, which means nothing elsewhere.

    Args:
        text: any text.

    Returns:
        Whether it is.
    """
    return Path(text).is_absolute() and "\n" not in text


def difference(own: Any, public: Any) -> Any:
    """Return what ``overlaid`` must lay over the public values to have the machine's own again.

    Args:
        own: nested dictionaries.
        public: the same after ``PublicNames.apply``.

    Returns:
        The values that differ, in their dictionaries; None where none does.
    """
    if not isinstance(own, Mapping):
        return None if own == public else own
    parts = {key: difference(value, public[key]) for key, value in own.items()}
    return {key: part for key, part in parts.items() if part is not None} or None


def overlaid(public: Any, own: Any) -> Any:
    """Lay the machine's own values over the public ones.

    Args:
        public: nested dictionaries.
        own: as ``difference`` gives it.

    Returns:
        The machine's own values, where there are any.
    """
    if not (isinstance(public, Mapping) and isinstance(own, Mapping)):
        return own if public and type(own) is type(public) else public
    return {key: overlaid(value, own.get(key)) for key, value in public.items()}


def _is_repository(text: str) -> bool:
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return not text.startswith((".", "/"))
