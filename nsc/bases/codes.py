"""Weights that a checkpoint stores as codes: FP8 with its scales is read as what it stands for, all else is refused.

What a tensor is, is seen by its dtype and by what lies beside it, not by the name of a model or of a quantiser.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

FLOATS = ("F64", "F32", "F16", "BF16")  # weights themselves; dtypes as safetensors names them
FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")  # behind the key of an FP8 weight: what it is multiplied by, whatever "inv" says
OF_INPUTS = ("input_scale", "activation_scale", "input_scale_ub")  # beside a weight, and no part of it
WRITTEN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Stored(NamedTuple):
    """A tensor in a checkpoint, as the header of its file describes it.

    Attributes:
        shard: the file.
        dtype: as safetensors names it.
        shape: of the tensor.
    """

    shard: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Codes:
    """What in a checkpoint stands for weights without being them.

    Attributes:
        stored: key -> tensor, of the whole checkpoint.
        config: config of the base.
    """

    stored: Mapping[str, Stored] = field(repr=False)
    config: Any = field(repr=False)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The config's quantization_config; empty where it has none."""
        return quantization_settings(self.config)

    @cached_property
    def block(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale, where the config says so."""
        groups = (self.settings.get("config_groups") or {}).values()
        sizes = [(group.get("weights") or {}).get("block_structure") for group in groups]
        found = {_pair(size) for size in (*sizes, self.settings.get("weight_block_size"))} - {None}
        return found.pop() if len(found) == 1 else None

    @cached_property
    def scales(self) -> dict[str, str | None]:
        """Key of each FP8 weight -> the key of its scale, None where it has none."""
        weights = [key for key, tensor in self.stored.items() if tensor.dtype in FP8 and not key.endswith(SCALES)]
        return {key: next((key + s for s in SCALES if key + s in self.stored), None) for key in weights}

    @cached_property
    def dropped(self) -> set[str]:
        """Keys that mean nothing without the codes."""
        modules = {key.rpartition(".")[0] for key in self.scales}
        of_inputs = {f"{module}.{part}" for module in modules for part in OF_INPUTS}
        return {scale for scale in self.scales.values() if scale} | (of_inputs & self.stored.keys())

    @property
    def dtype(self) -> torch.dtype:
        """What weights are written in that were FP8."""
        return dtype_of(self.config)

    def unreadable(self, key: str) -> str | None:
        """Say what is stored in place of a weight that cannot be read as numbers.

        Args:
            key: key of the weight, which need not exist.

        Returns:
            Names and dtypes of the tensors there; None for a weight that can be read.
        """
        module, weight = key.rpartition(".")[0], self.stored.get(key)
        own = self._parts.get(module, [])
        beside = {other for other in own if other.startswith((f"{key}_", f"{key}."))}
        if weight is not None and weight.dtype in FLOATS and not beside:
            return None
        if weight is not None and weight.dtype in FP8:
            known = {key, self.scales[key], *(f"{module}.{part}" for part in ("bias", *OF_INPUTS))}
            there = {*beside, *own} if key.endswith(".weight") else beside
            if there <= known and self._fits(weight, self.scales[key]):
                return None
        shown = [f"{other.removeprefix(f'{module}.')} in {self.stored[other].dtype}" for other in own]
        method = self.settings.get("quant_method")
        return ", ".join(shown[:4]) + (f", written by {method}" if method else "")

    def read(self, key: str, codes: Tensor, scale: Tensor | None) -> Tensor:
        """Return the weight that FP8 codes stand for.

        Args:
            key: key of the weight, which can be read.
            codes: (..., m, d), as stored.
            scale: what ``scales`` names: one number, one a row, or one a block of rows and columns.

        Returns:
            (..., m, d) float64.
        """
        if scale is None or scale.numel() == 1:
            return codes.double() * (1.0 if scale is None else scale.double().reshape(()))
        scale, (m, d) = scale.double(), codes.shape[-2:]
        if tuple(scale.shape) == self._grid(self.stored[key].shape):
            rows, columns = self.block or (m, d)
            return (
                codes.double() * scale.repeat_interleave(rows, -2)[..., :m, :].repeat_interleave(columns, -1)[..., :d]
            )
        return codes.double() * scale.reshape(*codes.shape[:-1], 1)

    def left_over(self) -> str | None:
        """Return the key of a tensor that stays a code where every FP8 weight that can be read is written in full.

        Returns:
            The first such key; None if there is none.
        """
        for key, tensor in self.stored.items():
            if key in self.scales and self.unreadable(key):
                return key
            known = tensor.dtype in FLOATS or key in self.scales or key in self.dropped or key.endswith("bias")
            if not known and tensor.dtype.startswith(("F", "U8", "I8")):
                return key  # an old causal mask is called bias, and holds bytes
        return None

    def packed(self) -> Iterator[str]:
        """Yield the modules that store matrices of integers and no weight, such as GPTQ's qweight.

        Yields:
            Names of modules.
        """
        for module, own in self._parts.items():
            integers = [t for t in map(self.stored.__getitem__, own) if t.dtype not in FLOATS and len(t.shape) > 1]
            if integers and f"{module}.weight" not in self.stored:
                yield module

    @cached_property
    def _parts(self) -> dict[str, list[str]]:
        """Module -> the keys of its tensors; bitsandbytes and quanto name parts of a weight behind "weight."."""
        parts: dict[str, list[str]] = {}
        for key in self.stored:
            before, inside, _ = key.partition(".weight.")
            parts.setdefault(before if inside else key.rpartition(".")[0], []).append(key)
        return parts

    def _fits(self, weight: Stored, scale: str | None) -> bool:
        """Whether a scale says how it is spread over its weight; without one, the codes must be plain numbers."""
        if scale is None:
            return not self.settings
        _, dtype, shape = self.stored[scale]
        rows = (weight.shape[:-1], (*weight.shape[:-1], 1))
        return dtype in (*FLOATS, "F8_E8M0") and shape in ((), (1,), (1, 1), *rows, self._grid(weight.shape))

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, ...] | None:
        """The shape of one scale a block; None where the config names no blocks."""
        if self.block is None or len(shape) < 2:
            return None
        rows, columns = self.block
        return (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))


def dtype_of(config: Any) -> torch.dtype:
    """Return the dtype that a config names for weights.

    Args:
        config: config of a base.

    Returns:
        It, or that of its text model; bfloat16 where neither names one that holds weights.
    """
    for part in (config, config.get_text_config()):
        name = getattr(part, "dtype", None) or getattr(part, "torch_dtype", None)
        dtype = getattr(torch, name, None) if isinstance(name, str) else name
        if dtype in WRITTEN:
            return dtype
    return torch.bfloat16


def quantization_settings(config: Any) -> dict[str, Any]:
    """Return what a config says of quantised weights.

    Args:
        config: config of a base.

    Returns:
        Its quantization_config as plain values; empty where there is none.
    """
    for part in (config, config.get_text_config()):
        if found := getattr(part, "quantization_config", None):
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def _pair(size: Any) -> tuple[int, int] | None:
    """Rows and columns of a list, or of a text such as 128x128."""
    rows, columns = (size.split("x") if isinstance(size, str) else size) or (0, 0)
    return (int(rows), int(columns)) if rows else None
