"""``merge.yaml``: typed, sealed by digests of itself and of the tensor files beside it, and without paths.

Paths of this machine are in ``local.yaml``, sealed likewise, which is not shared.
"""

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
from nsc.export.sharing import LOCAL, PublicNames, difference, overlaid
from nsc.paths import digest_of_file
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
    "ragged": bool,
    "base_id": str,
    "programs": list[str],
    "made": dict[str, Any],
    FILES: dict[str, str],
    DIGEST: str,
}


def write_description(folder: Path, values: Mapping[str, Any], files: Iterable[str], names: PublicNames) -> None:
    """Write merge.yaml, with digests of its values and of files, and local.yaml.

    Args:
        folder: where the files lie already.
        values: keys of REQUIRED and OPTIONAL -> plain values.
        files: names of the tensor files that belong to the record.
        names: what the places of this machine are called.
    """
    made = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **_versions()}
    values = {**values, "made": made, FILES: {name: digest_of_file(folder / name) for name in files}}
    public = names.apply(values)
    _write_sealed(folder / DESCRIPTION, public)
    if own := difference(values, public):
        _write_sealed(folder / LOCAL, own)


def read_description(folder: Path) -> dict[str, Any]:
    """Read merge.yaml, and verify it and the tensor files beside it by their digests.

    Args:
        folder: folder of an earlier merge.

    Returns:
        Key -> value of the type that REQUIRED or OPTIONAL says, with the places of local.yaml, if it is there. A record
        of a version before digests has no "digest", and nothing is verified.

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
    _verify(file, values)
    values = with_own_places(values, folder)
    for key, value in values.items():
        try:
            values[key] = typed(value, known[key])
        except TypeError:
            raise NSCError(f"{file}: {key} must be {expected(known[key])}, not {value!r}; {REMEDY}") from None
    for name, digest in values.get(FILES, {}).items():
        with reading(f"{folder / name}", REMEDY):
            if digest_of_file(folder / name) != digest:
                raise NSCError(f"{folder / name} is not what was written; {REMEDY}")
    return values


def with_own_places(values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Lay the places of this machine over the values of a record.

    Args:
        values: as merge.yaml has them.
        folder: where local.yaml lies, if the record was made here.

    Returns:
        The values with paths instead of names.

    Raises:
        NSCError: if local.yaml is damaged or edited.
    """
    file = folder / LOCAL
    if not file.is_file():
        return dict(values)
    with reading(str(file), REMEDY):
        own = parse_yaml(file.read_text(encoding="utf-8"))
    if not isinstance(own, dict) or DIGEST not in own:
        raise NSCError(f"{file} is not what was written; {REMEDY}")
    _verify(file, own)
    return dict(overlaid(values, {key: value for key, value in own.items() if key != DIGEST}))


def _write_sealed(file: Path, values: Mapping[str, Any]) -> None:
    as_read = yaml.safe_load(yaml.safe_dump(values))
    text = yaml.safe_dump({**values, DIGEST: digest_of(as_read)}, sort_keys=False, allow_unicode=True)
    file.write_text(text, encoding="utf-8")


def _verify(file: Path, values: Mapping[str, Any]) -> None:
    """Raise NSCError where the values are not those of the digest beside them."""
    if DIGEST in values and values[DIGEST] != digest_of({key: x for key, x in values.items() if key != DIGEST}):
        raise NSCError(f"{file} is not what was written; {REMEDY}")


def digest_of(values: Mapping[str, Any]) -> str:
    """Return a digest of plain values.

    Args:
        values: as YAML has them.

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _versions() -> dict[str, str]:
    versions = {"nsc": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
