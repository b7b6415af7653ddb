"""PEFT LoRA and VeRA checkpoints, read straight from safetensors: no base model, no PEFT.

    LoRA    delta W = scale * B @ A,    A: (r, d)   B: (m, r)   scale = alpha / r, or alpha / sqrt(r) for rsLoRA
    VeRA    delta W = diag(lambda_b) B diag(lambda_d) A,    A and B the first columns and rows of what all modules share

Whatever would make the update anything else is refused by name, never ignored: a merge with a wrong delta
raises nothing by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from nsc.adapters.factors import LoraFactors, read_factors, read_saved
from nsc.adapters.peft_folder import load_checkpoint, refuse_unsupported
from nsc.errors import NSCError


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA or VeRA adapter.

    Attributes:
        name: name of the adapter, in a merge its task.
        path: its folder.
        factors: module name, as in the model class it was trained on and without PEFT's prefix -> factors.
        saved: modules_to_save tensors, such as "score.weight".
        config: adapter_config.json.
        sha256: digest of the weights file.
        given: names of all modules_to_save tensors that were read, whatever became of them.
        behind: layer of the base behind its body that the adapter fine-tuned whole and that is merged, if any.
    """

    name: str
    path: Path
    factors: dict[str, LoraFactors]
    saved: dict[str, Tensor]  # modules_to_save, such as "score.weight"
    config: dict[str, Any]
    sha256: str
    given: frozenset[str] = frozenset()
    behind: str | None = None

    @property
    def ranks(self) -> dict[str, int]:
        """Module name -> rank."""
        return {module: factors.rank for module, factors in self.factors.items()}

    @property
    def base(self) -> str | None:
        """The base model that the adapter's config names, if it names one."""
        return self.config.get("base_model_name_or_path")


def read_adapter(path_or_hub_id: str | Path, name: str | None = None) -> Adapter:
    """Read a PEFT LoRA or VeRA adapter from a local folder or, if there is none, from the Hub.

    Args:
        path_or_hub_id: folder or Hub id.
        name: name of the adapter; by default the folder's.

    Returns:
        The adapter.

    Raises:
        UnsupportedAdapter: listing every unsupported feature.
        AdapterError: if the adapter is missing, damaged, contradicts its config, or was never trained.
    """
    checkpoint = load_checkpoint(path_or_hub_id, name)
    refuse_unsupported(checkpoint)
    factors, saved = read_factors(checkpoint), read_saved(checkpoint)
    if all(f.is_zero for f in factors.values()):
        raise checkpoint.error("the update of every module is zero; was it trained, and was the right folder given?")
    return Adapter(
        checkpoint.name, checkpoint.path, factors, saved, checkpoint.config, checkpoint.sha256, frozenset(saved)
    )


def read_adapters(adapters: Mapping[str, str | Path]) -> dict[str, Adapter]:
    """Read every adapter of a merge.

    Args:
        adapters: task -> folder or Hub id.

    Returns:
        Task -> adapter.

    Raises:
        NSCError: if there is none, or a task cannot be a file name.
        AdapterError: as ``read_adapter`` does.
    """
    if not adapters:
        raise NSCError("no adapter given; a merge needs at least one")
    for task in adapters:
        if not task or "/" in task or "\\" in task:
            raise NSCError(f"task name {task!r} must do as a file name: not empty, without / and \\")
    return {task: read_adapter(path, task) for task, path in adapters.items()}


def fingerprint(adapter: Adapter) -> str:
    """Return a digest of an adapter's weights and scales: either changes the merge.

    Args:
        adapter: the adapter.

    Returns:
        SHA-256 in hexadecimal.
    """
    scales = {name: factors.scale for name, factors in sorted(adapter.factors.items())}
    return hashlib.sha256((adapter.sha256 + json.dumps(scales)).encode()).hexdigest()


def base_warnings(base: str, adapters: Mapping[str, Adapter]) -> list[str]:
    """Warn about adapters whose configs name another base; bases of one shape cannot be told apart by their shapes.

    Args:
        base: id of the base.
        adapters: task -> adapter.

    Returns:
        No or one warning.
    """
    named = {task: Path(adapter.base).name for task, adapter in adapters.items() if adapter.base}
    strange = [f"{task} on {name}" for task, name in named.items() if name != Path(base).name]
    return [f"not trained on {Path(base).name} by their own configs: {', '.join(strange)}"] if strange else []
