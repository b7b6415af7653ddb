"""Tensors that lie in files, and a way to read one that leaves nothing of its file in memory.

A page of a mapped file that was once touched counts as memory of the process as long as the mapping lasts. Where all
adapters are gone through again and again, layer by layer, each tensor is read from the file when it is needed instead.
"""

from __future__ import annotations

import ctypes
import json
import mmap
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from nsc.errors import AdapterError

TRIM_EVERY = 8  # layers: a page that is given back is to be faulted in again


class _Place(NamedTuple):
    file: Path | int  # a path, or the descriptor of an open file
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
        A copy in memory of its own; a tensor that neither ``map_tensors`` nor ``Spill`` gave, itself.

    Raises:
        AdapterError: if the file has gone, or become shorter.
    """
    place: _Place | None = getattr(tensor, "place", None)
    if place is None or not tensor.numel():
        return tensor
    buffer = bytearray(tensor.nbytes)
    try:
        with open(place.file, "rb", closefd=isinstance(place.file, Path)) as file:
            file.seek(place.offset)
            count = file.readinto(buffer)
    except OSError as error:
        raise AdapterError(f"{place.file} cannot be read any more ({error}); merge again once it is there") from error
    if count != len(buffer):
        raise AdapterError(f"{place.file} was truncated during the merge; copy it again")
    return torch.frombuffer(buffer, dtype=tensor.dtype).view(tensor.shape)


def trim_memory() -> None:
    """Give memory that was freed back to the system, where the C library is asked for it (glibc).

    Small objects that last come to lie in what larger ones left, so that nothing of the same size fits there again.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Spill:
    """A nameless temporary file that holds tensors in place of the memory; it goes with its last descriptor.

    Args:
        folder: where there is room for it.
    """

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as this object)

    def put(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the file.

        Args:
            tensor: any tensor on the CPU with at least one element.

        Returns:
            The same over the file, which ``read`` reads while this object lives.
        """
        offset = -(-self._file.seek(0, 2) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        self._file.seek(offset)
        self._file.write(_bytes(tensor))
        self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), tensor.nbytes, access=mmap.ACCESS_COPY, offset=offset)
        moved = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
        moved.place = _Place(self._file.fileno(), offset)  # type: ignore[attr-defined]
        return moved


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file of which one tensor at a time is in memory.

    Args:
        path: the new file.
        tensors: key -> tensor on the CPU.
        metadata: of the file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for key, tensor in tensors.items():
        header[key] = {**_kind(tensor), "data_offsets": [end, end + tensor.nbytes]}
        end += tensor.nbytes
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(_bytes(read(tensor)))


def _bytes(tensor: Tensor) -> Any:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def _kind(tensor: Tensor) -> dict[str, Any]:
    """Dtype and shape, in the words of safetensors itself."""
    one = save({"x": torch.empty(1, dtype=tensor.dtype)})
    dtype = json.loads(one[8 : 8 + int.from_bytes(one[:8], "little")])["x"]["dtype"]
    return {"dtype": dtype, "shape": list(tensor.shape)}
