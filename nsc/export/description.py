"""``merge.yaml``: typed, and sealed by digests of itself and of the tensor files beside it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from nsc.checks import expected, typed
from nsc.errors import NSCError, reading
from nsc.plain_yaml import parse_yaml
from nsc_kernels import __version__

DESCRIPTION, FILES, DIGEST = "merge.yaml", "files", "digest"
REMEDY = "it is damaged or was edited: restore it, or merge again; places that moved are given by --base and --adapter"
REQUIRED: dict[str, Any] = {
    "method": str,
    "base": str,
    "adapters": dict[str, dict[str, str]],
    "data": dict[str, str],
    "prefix": str,
    "start": float,
    "targets": list[str],
    "settings": dict[str, Any],
}
OPTIONAL: dict[str, Any] = {
    "rank": int | None,
    "dense": list[str],
    "masks": bool,
    "factors": bool,
    "started": dict[str, Any],
    "magnitudes": bool,
    "searched": dict[str, Any],
    "fitted": str,
    "layers": str,
    "made": dict[str, Any],
    FILES: dict[str, str],
    DIGEST: str,
}


def write_description(folder: Path, values: Mapping[str, Any], files: Iterable[str]) -> None:
    """Write merge.yaml, with digests of its values and of files.

    Args:
        folder: where the files lie already.
        values: keys of REQUIRED and OPTIONAL -> plain values.
        files: names of the tensor files that belong to the record.
    """
    made = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **_versions()}
    values = {**values, "made": made, FILES: {name: _sha256(folder / name) for name in files}}
    as_read = yaml.safe_load(yaml.safe_dump(values))
    text = yaml.safe_dump({**values, DIGEST: digest_of(as_read)}, sort_keys=False, allow_unicode=True)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def read_description(folder: Path) -> dict[str, Any]:
    """Read merge.yaml, and verify it and the tensor files beside it by their digests.

    Args:
        folder: folder of an earlier merge.

    Returns:
        Key -> value of the type that REQUIRED or OPTIONAL says. A record of a version before digests has no "digest",
        and nothing is verified.

    Raises:
        NSCError: naming the file that is missing, damaged or edited, or the key at fault.
    """
    file = folder / DESCRIPTION
    values = parse_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise NSCError(f"{file} must hold a mapping of keys to values; {REMEDY}")
    known = REQUIRED | OPTIONAL
    if strange := [key for key in values if key not in known]:
        raise NSCError(
            f"{file} has the key {strange[0]}, which this version of nsc does not know: update it, or {REMEDY}"
        )
    if lost := sorted(REQUIRED.keys() - values.keys()):
        raise NSCError(f"{file} lacks {lost[0]}; {REMEDY}")
    if DIGEST in values and values[DIGEST] != digest_of({key: x for key, x in values.items() if key != DIGEST}):
        raise NSCError(f"{file} is not what was written; {REMEDY}")
    for key, value in values.items():
        try:
            values[key] = typed(value, known[key])
        except TypeError:
            raise NSCError(f"{file}: {key} must be {expected(known[key])}, not {value!r}; {REMEDY}") from None
    for name, digest in values.get(FILES, {}).items():
        with reading(f"{folder / name}", REMEDY):
            if _sha256(folder / name) != digest:
                raise NSCError(f"{folder / name} is not what was written; {REMEDY}")
    return values


def digest_of(values: Mapping[str, Any]) -> str:
    """Return a digest of plain values.

    Args:
        values: as YAML has them.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"nsc": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
