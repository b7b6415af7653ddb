"""Coefficients -> files: a PEFT adapter (exact concatenation, or truncated), or the whole model shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.errors import NSCError
from nsc.names import resolve
from nsc.stack import ModuleStack, Stack

OWN_FILES = ("readme.md", ".gitattributes")  # of the base's repository, not of the model
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


@dataclass(frozen=True)
class MergedFactors:
    """One layer's merged update ``B @ A`` with everything folded in: A (R, d), B (m, R), both float32.

    error: relative Frobenius error of a truncation, 0 for the exact concatenation.
    """

    A: Tensor
    B: Tensor
    error: float = 0.0


def merged_factors(stack: Stack, coefficients: Tensor, rank: int | None = None) -> dict[str, MergedFactors]:
    """Every layer's update by exact concatenation, ``[lam_k s_k B_k] [A_k]``, or the best one of at most ``rank``.

    coefficients: (M, K). Raises NSCError for a rank below 1.
    """
    if rank is not None and rank < 1:
        raise NSCError(f"rank must be 1 or more, not {rank}")
    rows = zip(stack.modules.items(), coefficients, strict=True)
    if rank is None:
        return {name: _concatenated(module, row) for (name, module), row in rows}
    return {name: _truncated(module, row, rank) for (name, module), row in rows}


def as_stack(factors: Mapping[str, MergedFactors]) -> Stack:
    """Merged factors as one adapter of scale 1, to run them in a model."""
    modules = {
        name: ModuleStack(f.A, f.B, (f.A.shape[0],), (1.0,), (None,), gram_inverse=None) for name, f in factors.items()
    }
    return Stack(("merged",), modules)


def write_adapter(folder: Path, factors: Mapping[str, MergedFactors], prefix: str, base: str) -> None:
    """A PEFT folder whose scale is 1 in every module and whose targets are full module names.

    prefix: what the names carry before the body's own, "model." for a CausalLM.
    """
    ranks = {prefix + name: f.A.shape[0] for name, f in factors.items()}
    top = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        target_modules=sorted(ranks),
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        lora_dropout=0.0,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = sorted(ranks)  # LoraConfig made a set of it, whose order is another in every process
    config.save_pretrained(folder)
    tensors = {}
    for name, f in factors.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = f.A.contiguous()
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = f.B.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_full_model(folder: Path, base: str, stack: Stack, coefficients: Tensor) -> None:
    """The base's checkpoint with ``lam_k s_k B_k A_k`` added, one shard in memory at a time.

    Shards, index, tied weights, dtypes and side files are the source's own. Raises NSCError if the base has no
    safetensors checkpoint or a merged layer is not in it.
    """
    source = checkpoint_folder(base)
    shards, places = merged_places(source, stack.names)
    rows = dict(zip(stack.names, coefficients, strict=True))
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        for key in tensors.keys() & places.keys():
            delta = stack.modules[places[key]].delta(rows[places[key]])
            tensors[key] = (tensors[key].double() + delta.cpu()).to(tensors[key].dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name.lower() not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)


def merged_places(source: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The shards of a checkpoint, and the key of each merged layer's weight -> its name in the body."""
    shards = [source / name for name in _shard_names(source)]
    shapes = {key: shape for shard in shards for key, shape in _matrix_shapes(shard)}
    stored = {key.removesuffix(".weight"): shape for key, shape in shapes.items() if key.endswith(".weight")}
    return shards, {f"{place}.weight": name for name, place in resolve("merged", names, stored).items()}


def refuse_unstreamable(base: str) -> None:
    """Raise NSCError unless the base has a safetensors checkpoint that ``write_full_model`` can stream."""
    _shard_names(checkpoint_folder(base))


def read_tensors(base: str, keys: Sequence[str]) -> dict[str, Tensor]:
    """Those of ``keys`` that the base's safetensors checkpoint holds. Raises NSCError if there is none."""
    source = checkpoint_folder(base)
    found: dict[str, Tensor] = {}
    for name in _shard_names(source):
        with safe_open(source / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in set(keys) & set(file.keys())}
    return found


def checkpoint_folder(base: str) -> Path:
    """The base's folder: itself, or a Hub snapshot. Raises NSCError if there is neither."""
    if Path(base).is_dir():
        return Path(base)
    others = [f"*{suffix}" for suffix in WEIGHT_FILES if suffix != ".safetensors"]
    try:
        return Path(snapshot_download(base, ignore_patterns=others))
    except Exception as error:  # the Hub client raises its own, httpx's and the operating system's
        raise NSCError(f"base {base!r} is no folder, and the Hub gave no such model: {error}") from error


def _concatenated(module: ModuleStack, row: Tensor) -> MergedFactors:
    weighted = module.B.double() * module.column_weights(row)
    return MergedFactors(module.A.float().cpu(), weighted.float().cpu())


def _truncated(module: ModuleStack, row: Tensor, rank: int) -> MergedFactors:
    """QR of both factors, SVD of the small core: nothing of size (m, d) is ever formed."""
    left, core_left = torch.linalg.qr(module.B.double() * module.column_weights(row))
    right, core_right = torch.linalg.qr(module.A.double().mT)
    u, sigma, vh = torch.linalg.svd(core_left @ core_right.mT)
    kept = min(rank, sigma.numel())
    root = sigma[:kept].sqrt()
    error = (sigma[kept:].norm() / sigma.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    A, B = (root[:, None] * vh[:kept]) @ right.mT, (left @ u[:, :kept]) * root
    return MergedFactors(A.float().cpu(), B.float().cpu(), error)


def _shard_names(source: Path) -> list[str]:
    index = source / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (source / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise NSCError(
        f"base {source} holds no model.safetensors or its index, so the full model cannot be streamed;"
        " convert it with save_pretrained, or export an adapter"
    )


def _matrix_shapes(shard: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                shape = file.get_slice(key).get_shape()
                if len(shape) == 2:
                    yield key, (shape[0], shape[1])
    except (SafetensorError, OSError) as error:
        raise NSCError(f"base shard {shard} cannot be read: {error}; fetch it again") from error
