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
from nsc.stack import DenseStack, ModuleStack, Stack

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
    rows = dict(zip(stack.names, coefficients, strict=True))
    if rank is None:
        return {name: _concatenated(module, rows[name]) for name, module in stack.modules.items()}
    return {name: _truncated(module, rows[name], rank) for name, module in stack.modules.items()}


def merged_layers_whole(base: str, stack: Stack, coefficients: Tensor) -> dict[str, Tensor]:
    """Every parameter that adapters fine-tuned whole, by name, as the merge has it: float32, base and update together.

    Raises NSCError if the base has no safetensors checkpoint that holds them.
    """
    stored = read_layers(base, list(stack.dense)) if stack.dense else {}
    updates = dense_updates(stack, coefficients)
    return {name: (stored[name].double() + update).float() for name, update in updates.items()}


def dense_updates(stack: Stack, coefficients: Tensor) -> dict[str, Tensor]:
    """Parameter that adapters fine-tuned whole -> what the merge adds to it, float64 on the CPU."""
    updates = Updates(stack, coefficients)
    found = {f"{name}.{kind}": updates.of(f"{name}.{kind}") for name in stack.dense for kind in ("weight", "bias")}
    return {name: update for name, update in found.items() if update is not None}


def as_stack(factors: Mapping[str, MergedFactors], updates: Mapping[str, Tensor] | None = None) -> Stack:
    """Merged factors as one adapter of scale 1, with what ``dense_updates`` gives, to run them in a model."""
    updates = updates or {}
    modules = {
        name: ModuleStack(f.A, f.B, (f.A.shape[0],), (1.0,), (None,), gram_inverse=None) for name, f in factors.items()
    }
    biases = {name: update[None] for name, update in updates.items() if update.ndim == 1}
    whole = {key.removesuffix(".weight"): update[None] for key, update in updates.items() if update.ndim == 2}
    dense = {name: DenseStack(update, biases.get(f"{name}.bias"), [True]) for name, update in whole.items()}
    return Stack(("merged",), modules, dense, (*modules, *dense))


def write_adapter(
    folder: Path,
    factors: Mapping[str, MergedFactors],
    prefix: str,
    base: str,
    whole: Mapping[str, Tensor] | None = None,
) -> None:
    """A PEFT folder whose scale is 1 in every module and whose targets are full module names.

    prefix: what the names carry before the body's own, "model." for a CausalLM.  whole: parameters of layers that go to
    modules_to_save as they are.
    """
    whole = whole or {}
    saved = sorted({prefix + name.rpartition(".")[0] for name in whole})
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
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = sorted(ranks)  # LoraConfig made a set of it, whose order is another in every process
    config.save_pretrained(folder)
    tensors = {}
    for name, f in factors.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = f.A.contiguous()
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = f.B.contiguous()
    tensors |= {f"base_model.model.{prefix}{name}": tensor.contiguous() for name, tensor in whole.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_full_model(folder: Path, base: str, stack: Stack, coefficients: Tensor) -> None:
    """The base's checkpoint with ``lam_k s_k B_k A_k`` or ``lam_k (W_k - W0)`` added, one shard in memory at a time.

    Shards, index, tied weights, dtypes and side files are the source's own. Raises NSCError if the base has no
    safetensors checkpoint or a merged layer is not in it.
    """
    source = checkpoint_folder(base)
    shards, places = merged_places(source, stack.names)
    updates = Updates(stack, coefficients)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        for key in tensors.keys() & places.keys():
            if (update := updates.of(places[key])) is not None:
                tensors[key] = (tensors[key].double() + update).to(tensors[key].dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name.lower() not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)


class Updates:
    """What a merge adds to the base's parameters, made when it is asked for. coefficients: (M, K)."""

    def __init__(self, stack: Stack, coefficients: Tensor) -> None:
        self.stack = stack
        self.rows = dict(zip(stack.names, coefficients, strict=True))

    def of(self, parameter: str) -> Tensor | None:
        """(m, d) or (m,) float64 on the CPU for a layer's weight or bias, None where the merge leaves it alone."""
        name, _, kind = parameter.rpartition(".")
        layer, row = self.stack.layer(name), self.rows[name]
        if kind == "weight":
            return layer.delta(row).cpu()
        update = layer.bias_delta(row) if isinstance(layer, DenseStack) else None
        return None if update is None else update.cpu()


def merged_places(source: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The shards of a checkpoint, and the key of each merged layer's weight and bias -> its name in the body."""
    shards = [source / name for name in _shard_names(source)]
    shapes = {key: shape for shard in shards for key, shape in _shapes(shard)}
    stored = {k.removesuffix(".weight"): s for k, s in shapes.items() if k.endswith(".weight") and len(s) == 2}
    places = resolve("merged", names, stored)
    of_layer = {f"{place}.{kind}": f"{name}.{kind}" for name, place in places.items() for kind in ("weight", "bias")}
    return shards, {key: name for key, name in of_layer.items() if key in shapes}


def read_layers(base: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights and biases of these layers of the body, from the base's own checkpoint.

    Raises NSCError if it is not in safetensors or a layer is not in it.
    """
    shards, places = merged_places(checkpoint_folder(base), names)
    found: dict[str, Tensor] = {}
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            keys = places.keys() & set(file.keys())
            found |= {places[key]: file.get_tensor(key) for key in keys}
    return found


def refuse_unstreamable(base: str) -> None:
    """Raise NSCError unless the base has a safetensors checkpoint that ``write_full_model`` can stream."""
    _shard_names(checkpoint_folder(base))


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
        f"base {source} holds no model.safetensors or its index, so its weights cannot be streamed;"
        " convert it with save_pretrained, or export an adapter where all adapters are LoRA alone"
    )


def _shapes(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise NSCError(f"base shard {shard} cannot be read: {error}; fetch it again") from error
