"""The files of a PEFT folder or Hub repository, parsed; what is not supported is refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nsc.adapters.config_types import wrong_field
from nsc.adapters.tensor_file import map_tensors
from nsc.adapters.unsupported import PREFIX, unsupported
from nsc.errors import AdapterError, UnsupportedAdapter, clipped, one_line, reading
from nsc.paths import digest_of_file, lfs_remedy

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
TOKENIZER_FILES = (  # patterns of names, in the adapter's folder
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "sentencepiece*",
    "chat_template*",
    "additional_chat_templates/*",
    "*processor_config.json",
)
# What torch.compile, FSDP, checkpointing, DeepSpeed, DDP and PEFT put into names.
_OWN = "_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module"
TRAINING_WRAPPERS = re.compile(rf"(?:{_OWN})\\?\.|(?<![^.])(?:module|base_model\\?\.model)\\?\.(?![*+?])")
CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")  # of transformers' Trainer
NAMING_FIELDS = ("target_modules", "exclude_modules", "modules_to_save", "rank_pattern", "alpha_pattern")
BUNDLE = re.compile(r".*\.(?=base_model\.(?:model\.|vera_))")  # whatever a PeftModel was a part of


@dataclass(frozen=True)
class Checkpoint:
    """The files of an adapter folder, parsed but not judged.

    Attributes:
        name: name of the adapter.
        path: its folder.
        config: adapter_config.json, its module names without what wrapped the model in training.
        tensors: key, without what wrapped the model in training -> tensor, as stored.
        sha256: digest of the weights file.
    """

    name: str
    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    sha256: str

    def error(self, text: str) -> AdapterError:
        """Return an AdapterError that names this adapter.

        Args:
            text: what is wrong, with the remedy.

        Returns:
            The error, to be raised.
        """
        return AdapterError(f"adapter '{self.name}' ({self.path}): {text}")


def load_checkpoint(path_or_hub_id: str | Path, name: str | None = None) -> Checkpoint:
    """Load the files of a PEFT folder, or of a Hub repository.

    Args:
        path_or_hub_id: folder or Hub id.
        name: name of the adapter; by default the folder's.

    Returns:
        The parsed files.

    Raises:
        AdapterError: if a file is missing or cannot be read.
    """
    path = _named_folder(_local_folder(path_or_hub_id))
    name = name or Path(path_or_hub_id).expanduser().resolve().name
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise AdapterError(f"adapter '{name}': {path} has no {file}; {_missing_file_remedy(path)}")
    config, weights = _read_config(path / CONFIG, name), path / WEIGHTS
    try:
        stored, digest = map_tensors(weights), digest_of_file(weights)
    except Exception as error:  # of safetensors, of torch, or of the operating system
        why = lfs_remedy(weights) or f"it is truncated or corrupt ({one_line(error)}); copy it again"
        raise AdapterError(f"adapter '{name}': {weights} cannot be read: {why}") from error
    return Checkpoint(name, path, _unwrapped_config(config), _unwrapped(stored, name, path), digest)


def refuse_unsupported(checkpoint: Checkpoint) -> None:
    """Refuse an adapter with features that cannot be merged.

    Args:
        checkpoint: what ``load_checkpoint`` returned.

    Raises:
        UnsupportedAdapter: listing all of them.
    """
    if features := unsupported(checkpoint.config, checkpoint.tensors):
        listed = "".join(f"\n  - {feature}" for feature in features)
        raise UnsupportedAdapter(
            f"{checkpoint.error('cannot be merged, it is not plain LoRA or VeRA on linear layers')}{listed}"
        )


def _unwrapped(stored: Mapping[str, Tensor], name: str, path: Path) -> dict[str, Tensor]:
    """The tensors by keys that PEFT alone would give them; AdapterError where two become one."""
    keys: dict[str, str] = {}
    for key in stored:
        inner = BUNDLE.sub("", key)
        inner = PREFIX * inner.startswith(PREFIX) + TRAINING_WRAPPERS.sub("", inner)
        if (other := keys.setdefault(inner, key)) != key:
            raise AdapterError(
                f"adapter '{name}' ({path}): '{other}' and '{key}' both name '{inner}' once what wrapped the model in"
                " training is taken off; save one adapter a folder"
            )
    return {inner: stored[key] for inner, key in keys.items()}


def _unwrapped_config(config: dict[str, Any]) -> dict[str, Any]:
    """The config with module names and patterns without wrappers; fields of another type are left as they are."""

    def strip(value: Any) -> Any:
        if isinstance(value, str):
            return TRAINING_WRAPPERS.sub("", value)
        if isinstance(value, dict):
            return {strip(key): entry for key, entry in value.items()}
        return list(map(strip, value)) if isinstance(value, list) else value

    return config | {field: strip(config[field]) for field in NAMING_FIELDS if field in config}


def _read_config(path: Path, name: str) -> dict[str, Any]:
    """adapter_config.json as a dict. Raises AdapterError where it is no JSON object, or a field has another type."""
    with reading(f"adapter '{name}': {path}", "copy it again", AdapterError, "is not valid JSON"):
        config = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        raise AdapterError(f"adapter '{name}': {path} holds no JSON object; copy it again")
    if wrong := wrong_field(config):
        field = wrong.partition(" ")[0]
        raise AdapterError(f"adapter '{name}': in {path}, {wrong}, not {clipped(repr(config[field]), 80)}; correct it")
    return config


def _local_folder(path_or_hub_id: str | Path) -> Path:
    """The folder itself, or a snapshot of the Hub repository of that name."""
    path = Path(path_or_hub_id).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.isfile(path):
        raise AdapterError(f"{path} is a file; give the folder that it lies in")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_hub_id)):
        raise AdapterError(
            f"adapter folder {clipped(str(path))} does not exist; check the path (a Hub id would be user/name)"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=[CONFIG, WEIGHTS, *TOKENIZER_FILES]))
    except Exception as error:  # the Hub client raises its own, httpx's and the operating system's
        cause = f"{type(error).__name__}: {error}"
        tried = f"'{path_or_hub_id}' is no local folder, and the Hub gave no such adapter ({cause})"
        raise AdapterError(f"{tried}; check the spelling, the network or `hf auth login`") from error


def _named_folder(path: Path) -> Path:
    """The only sub-folder with an adapter, which PEFT makes for every name but "default"; else the folder itself."""
    inner = _inner_folders(path)
    alone = len(inner) == 1 and not CHECKPOINT_FOLDER.fullmatch(inner[0].name)
    return inner[0] if alone and not any((path / file).is_file() for file in (CONFIG, WEIGHTS, PICKLE)) else path


def _inner_folders(path: Path) -> list[Path]:
    """Its sub-folders that hold an adapter, those of a Trainer by their steps."""
    return sorted((file.parent for file in path.glob(f"*/{CONFIG}")), key=lambda p: (_steps(p), p.name))


def _steps(folder: Path) -> int:
    found = CHECKPOINT_FOLDER.fullmatch(folder.name)
    return int(found[1]) if found else -1


def _missing_file_remedy(path: Path) -> str:
    if inner := _inner_folders(path):
        if _steps(inner[-1]) >= 0:
            return f"it holds checkpoints of a Trainer: give one of them, such as the last, {inner[-1]}"
        return f"it holds several adapters: give the folder of one, of {', '.join(folder.name for folder in inner)}"
    if (path / PICKLE).is_file():
        return f"{PICKLE} is a pickle, which is never loaded: load it with PEFT and save it with save_pretrained"
    return f"nsc needs the folder that PEFT's save_pretrained wrote ({PICKLE} will not do)"
