"""The record of a merge, which replays it without learning: coefficients, and what they were learned for."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.errors import NSCError
from nsc_kernels import __version__

COEFFICIENTS, DESCRIPTION = "coefficients.safetensors", "merge.yaml"


@dataclass(frozen=True)
class Record:
    """What ``apply`` needs.

    coefficients: (M, K).  modules: name in the base body -> (out, in).  adapters: task -> {path, fingerprint}.  prefix:
    of the written adapter's names.  start: of the coefficients.  settings, data, targets: how they were learned.  rank:
    that the adapter was truncated to, if it was.  dense: parameters of the base that adapters fine-tuned whole.
    """

    base: str
    prefix: str
    start: float
    coefficients: Tensor
    modules: dict[str, tuple[int, int]]
    adapters: dict[str, dict[str, str]]
    data: dict[str, str]
    targets: list[str]
    settings: dict[str, Any]
    rank: int | None = None
    dense: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """coefficients.safetensors and merge.yaml."""
        metadata = {"modules": json.dumps(self.modules), "tasks": json.dumps(list(self.adapters))}
        save_file({"coefficients": self.coefficients.contiguous()}, folder / COEFFICIENTS, metadata=metadata)
        description = {
            "method": "nsc",
            "base": self.base,
            "adapters": self.adapters,
            "data": self.data,
            "prefix": self.prefix,
            "start": self.start,
            "targets": self.targets,
            "settings": self.settings,
            "rank": self.rank,
            "dense": list(self.dense),
            "made": {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **_versions()},
        }
        text = yaml.safe_dump(description, sort_keys=False, allow_unicode=True)
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """The inverse of ``write``. Raises NSCError naming the file that is missing or broken."""
        try:
            text = yaml.safe_load((folder / DESCRIPTION).read_text(encoding="utf-8"))
            with safe_open(folder / COEFFICIENTS, framework="pt") as file:
                metadata, coefficients = file.metadata(), file.get_tensor("coefficients")
            modules = {name: (shape[0], shape[1]) for name, shape in json.loads(metadata["modules"]).items()}
            adapters = {task: text["adapters"][task] for task in json.loads(metadata["tasks"])}  # by column
            keys = ("base", "prefix", "start", "data", "targets", "settings")
            rest = {key: text[key] for key in keys}
            record = cls(coefficients=coefficients, modules=modules, adapters=adapters, rank=text.get("rank"), **rest)
            record = replace(record, dense=tuple(text.get("dense", ())))
        except (OSError, SafetensorError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise NSCError(
                f"{folder} holds no readable record of a merge ({DESCRIPTION} and {COEFFICIENTS}): {error}"
            ) from error
        record.check()
        return record

    def check(self) -> None:
        """Raise NSCError unless the coefficients are finite and fit the modules and tasks."""
        shape = (len(self.modules), len(self.adapters))
        if tuple(self.coefficients.shape) != shape or not torch.isfinite(self.coefficients).all():
            raise NSCError(f"coefficients {tuple(self.coefficients.shape)} must be finite and of shape {shape}")


def _versions() -> dict[str, str]:
    found = {"nsc": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "safetensors"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
