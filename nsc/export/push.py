"""A written merge to the Hub: only what was proven, as it was proven, and nothing that names this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCard

from nsc.errors import NSCError
from nsc.export.card import CARD
from nsc.export.proof import Proof
from nsc.export.sharing import IGNORED, LOCAL, LOCAL_PATH, require_hub_id
from nsc.paths import digest_of_file

PROOF = "proof.json"
OPEN = (CARD, IGNORED, LOCAL, PROOF)  # what may be edited, or is not uploaded
TEXTS = (".json", ".md", ".yaml")


def seal(folder: Path, proof: Proof) -> None:
    """Write down what was proven, with the digest of every file, by which ``push`` knows them again.

    Args:
        folder: a folder just proven, complete but for this file.
        proof: what was compared.
    """
    told = {"proof": str(proof), "files": {name: digest_of_file(folder / name) for name in _files(folder)}}
    (folder / PROOF).write_text(json.dumps(told, indent=1), encoding="utf-8")
    (folder / IGNORED).write_text(f"{LOCAL}\n", encoding="utf-8")


def push(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a proven merge to the Hub.

    Args:
        folder: folder that ``MergeResult.save`` wrote.
        repository: USER/NAME; made if there is none.
        private: whether a repository that is made is private.

    Returns:
        Address of the commit.

    Raises:
        NSCError: if a file is not what was proven, a text names a place of this machine, the model card is not valid,
            or the Hub refuses.
    """
    folder = Path(folder)
    require_hub_id(repository)
    require_proven(folder)
    _require_card(folder)
    _require_public(folder)
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repository, folder_path=folder, ignore_patterns=[LOCAL], commit_message="A merge, with its proof"
        )
    except Exception as error:  # the Hub client raises its own, httpx's and the operating system's
        raise NSCError(f"the Hub did not take {folder} as {repository}: {error}; check `hf auth login`") from error
    return str(done)


def require_proven(folder: Path) -> None:
    """Refuse a folder that is not, file by file, what was proven when it was written.

    Args:
        folder: folder of a merge.

    Raises:
        NSCError: naming the first file that is missing, changed or new.
    """
    try:
        told = json.loads((folder / PROOF).read_text(encoding="utf-8"))
        files: dict[str, Any] = dict(told["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NSCError(
            f"{folder} holds no readable {PROOF}, so it is not known to be proven: upload only a folder that nsc merge"
            " or nsc apply wrote"
        ) from error
    there = set(_files(folder))
    if lost := sorted(files.keys() - there):
        raise NSCError(f"{folder} lacks {lost[0]}, which was proven; write it again with nsc apply")
    if new := sorted(there - files.keys()):
        raise NSCError(f"{folder / new[0]} was not there when the folder was proven; remove it, or upload it by itself")
    if changed := [name for name in sorted(files) if digest_of_file(folder / name) != files[name]]:
        raise NSCError(f"{folder / changed[0]} is not what was proven; write the folder again with nsc apply")


def _require_card(folder: Path) -> None:
    remedy = f"write the folder again with nsc apply {folder} --base-id USER/NAME --out NEW"
    try:
        data = ModelCard.load(folder / CARD).data
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise NSCError(f"{folder / CARD} is no valid model card: {error}; {remedy}") from error
    if not data.base_model:
        raise NSCError(f"{folder / CARD} names no base_model, for no name of the base on the Hub was known: {remedy}")


def _require_public(folder: Path) -> None:
    """Refuse texts with paths of this machine: known ones, those of home, and any in the adapter's config."""
    known = [*_leaves(_own_places(folder)), str(Path.home())]
    private = [place for place in known if Path(place).is_absolute() and len(Path(place).parts) > 1]
    for name in [CARD, *_files(folder)]:
        if Path(name).suffix not in TEXTS:
            continue
        text = (folder / name).read_text(encoding="utf-8")
        found = next((place for place in private if place in text or json.dumps(place)[1:-1] in text), None)
        if found is None and name == "adapter_config.json":
            base = str(json.loads(text).get("base_model_name_or_path") or "")
            found = base if LOCAL_PATH.match(base) else None
        if found:
            raise NSCError(
                f"{folder / name} names {found}, a place of this machine; write the folder again with nsc apply"
                f" {folder} --base-id USER/NAME --out NEW"
            )


def _own_places(folder: Path) -> Any:
    try:
        return yaml.safe_load((folder / LOCAL).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _leaves(value: Any) -> list[str]:
    """All texts in nested dictionaries and lists."""
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _leaves(item)]
    return [value] if isinstance(value, str) else []


def _files(folder: Path) -> list[str]:
    names = (file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
    return sorted(name for name in names if name not in OPEN)
