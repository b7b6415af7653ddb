"""Tensors over a mapped safetensors file, and a way to read one that leaves nothing of the file in memory.

A page of a mapped file that was once touched counts as memory of the process as long as the mapping lasts. Where all
adapters are gone through again and again, layer by layer, each tensor is read from the file when it is needed instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from nsc.errors import AdapterError


class _Place(NamedTuple):
    path: Path
    offset: int


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file.

    Args:
        path: the file.

    Returns:
        Key -> tensor over the file, of which ``read`` knows the place.

    Raises:
        SafetensorError: if it is no safetensors file, or truncated.
        OSError: if it cannot be opened.
    """
    tensors = load_file(path)  # which checks the header
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    for key, tensor in tensors.items():
        tensor.place = _Place(path, 8 + size + header[key]["data_offsets"][0])  # type: ignore[attr-defined]
    return tensors


def read(tensor: Tensor) -> Tensor:
    """Read a tensor from the file that it was mapped from, without touching the mapping.

    Args:
        tensor: any tensor.

    Returns:
        A copy in memory of its own; a tensor that ``map_tensors`` did not give, itself.

    Raises:
        AdapterError: if the file has gone, or become shorter.
    """
    place: _Place | None = getattr(tensor, "place", None)
    if place is None or not tensor.numel():
        return tensor
    buffer = bytearray(tensor.nbytes)
    try:
        with place.path.open("rb") as file:
            file.seek(place.offset)
            count = file.readinto(buffer)
    except OSError as error:
        raise AdapterError(f"{place.path} cannot be read any more ({error}); merge again once it is there") from error
    if count != len(buffer):
        raise AdapterError(f"{place.path} was truncated during the merge; copy it again")
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)
