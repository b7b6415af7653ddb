"""Tensors with facts about them in one safetensors file, sealed by a digest of both: what was changed is refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

FACTS, DIGEST = "facts", "sha256"  # keys of the file's metadata


def sealed(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> bytes:
    """Return a file of tensors and facts, with their digest.

    Args:
        tensors: name -> tensor of any shape and dtype, on any device; no two may share memory.
        facts: name -> plain value, as JSON has them; keys of mappings are text.

    Returns:
        The content of a safetensors file.
    """
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(facts, sort_keys=True)
    return save(own, {FACTS: text, DIGEST: _digest(own, text)})


def unsealed(content: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what ``sealed`` was given.

    Args:
        content: of the file.

    Returns:
        The tensors, on the CPU, and the facts.

    Raises:
        ValueError: if either was changed since. A file of another kind raises whatever its reader does.
    """
    tensors = load(content)
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if metadata[DIGEST] != _digest(tensors, metadata[FACTS]):
        raise ValueError("its content is not what was written")
    return tensors, json.loads(metadata[FACTS])


def _digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of names, dtypes, shapes and bytes of contiguous tensors on the CPU, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
