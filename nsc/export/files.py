"""A merge -> files: a PEFT adapter (its exact factors, or truncated), or the whole model shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.bases.loading import tower_keys
from nsc.bases.module_names import resolve
from nsc.bases.weights import WEIGHT_FILES, checkpoint_folder, read_tensors, shapes_in, shard_names
from nsc.errors import NSCError
from nsc.methods import LowRank
from nsc.methods.protocol import decomposed
from nsc.recipes.updates import Merged, parameter_update, whole_updates

DENSE_REMEDY = "no exact adapter holds it; give --rank to truncate it, or --full for the whole model"
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # of the range finder
OWN_FILES = ("readme.md", ".gitattributes")  # of the base's repository, not of the model


@dataclass(frozen=True)
class MergedFactors:
    """One layer's merged update ``B @ A`` with everything folded in: A (R, d), B (m, R), both float32.

    error: relative Frobenius error of a truncation, 0 for the exact concatenation.
    """

    A: Tensor
    B: Tensor
    error: float = 0.0


def merged_factors(merged: Merged, rank: int | None = None) -> dict[str, MergedFactors]:
    """The update of every layer that carries LoRA: as its factors are, or the best one of at most ``rank``.

    Raises NSCError for a rank below 1, and for a dense update without a rank.
    """
    if rank is not None and rank < 1:
        raise NSCError(f"rank must be 1 or more, not {rank}")
    whole = set(merged.whole)
    return {name: _factors(name, merged.update(name), rank) for name in merged.names if name not in whole}


def merged_layers_whole(base: str, merged: Merged) -> dict[str, Tensor]:
    """Every parameter that adapters fine-tuned whole, by name, as the merge has it: float32, base and update together.

    Raises NSCError if the base has no safetensors checkpoint that holds them.
    """
    stored = read_layers(base, merged.whole) if merged.whole else {}
    return {name: (stored[name].double() + update).float() for name, update in whole_updates(merged).items()}


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


def write_full_model(folder: Path, base: str, merged: Merged) -> None:
    """The base's checkpoint with the merge's updates added, one shard in memory at a time, and one layer's update.

    Shards, index, tied weights, dtypes and side files are the source's own. Raises NSCError if the base has no
    safetensors checkpoint or a merged layer is not in it.
    """
    source = checkpoint_folder(base)
    shards, places = merged_places(source, merged.names)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        for key in tensors.keys() & places.keys():
            if (update := parameter_update(merged, places[key])) is not None:
                tensors[key] = (tensors[key].double() + update).to(tensors[key].dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name.lower() not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)


def merged_places(source: Path, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The shards of a checkpoint, and the key of each merged layer's weight and bias -> its name in the body."""
    shards = [source / name for name in shard_names(source)]
    shapes = {key: shape for shard in shards for key, shape in shapes_in(shard)}
    matrices = [key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2]
    inside = tower_keys(source, matrices)
    stored = {key.removesuffix(".weight"): (shapes[key][0], shapes[key][1]) for key in inside}
    places = resolve("merged", names, stored)
    of_layer = {f"{place}.{kind}": f"{name}.{kind}" for name, place in places.items() for kind in ("weight", "bias")}
    return shards, {key: name for key, name in of_layer.items() if key in shapes}


def read_layers(base: str, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights and biases of these layers of the body, from the base's own checkpoint.

    Raises NSCError if it is not in safetensors or a layer is not in it.
    """
    _, places = merged_places(checkpoint_folder(base), names)
    return {places[key]: tensor for key, tensor in read_tensors(base, list(places)).items()}


def _factors(name: str, update: LowRank | Tensor, rank: int | None) -> MergedFactors:
    if rank is not None:
        return _truncated(update, rank) if isinstance(update, LowRank) else _leading(update.double(), rank)
    if not isinstance(update, LowRank):
        raise NSCError(f"the update of {name} is dense: {DENSE_REMEDY}")
    return MergedFactors(update.A.float().cpu(), update.B.float().cpu())


def _truncated(update: LowRank, rank: int) -> MergedFactors:
    """Nothing of size (m, d) is ever formed."""
    u, sigma, v = decomposed(update)
    error = sigma[rank:].norm() / sigma.norm().clamp_min(torch.finfo(sigma.dtype).tiny)
    return _balanced(u[:, :rank], sigma[:rank], v[:, :rank].mT, error)


def _leading(update: Tensor, rank: int) -> MergedFactors:
    """Of a dense update (m, d), by a randomised range finder of fixed seed: no SVD of anything of size (m, d).

    The error is the true one, whatever the finder missed: what is kept is a projection of the update, so the squares of
    both norms differ by the square of the rest. https://arxiv.org/abs/0909.4061, Algorithms 4.4 and 5.1.
    """
    kept = min(rank, *update.shape)
    width = min(kept + OVERSAMPLING, *update.shape)
    probe = torch.randn(update.shape[1], width, dtype=update.dtype, generator=torch.Generator().manual_seed(0))
    basis = torch.linalg.qr(update @ probe.to(update.device))[0]
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(update @ torch.linalg.qr(update.mT @ basis)[0])[0]
    u, sigma, vh = torch.linalg.svd(basis.mT @ update, full_matrices=False)
    u, sigma, vh = basis @ u[:, :kept], sigma[:kept], vh[:kept]
    total = update.square().sum()
    lost = (total - sigma.square().sum()).clamp_min(0) / total.clamp_min(torch.finfo(update.dtype).tiny)
    return _balanced(u, sigma, vh, lost.sqrt())


def _balanced(u: Tensor, sigma: Tensor, vh: Tensor, error: Tensor) -> MergedFactors:
    """The root of each singular value on either side."""
    root = sigma.sqrt()
    return MergedFactors((root[:, None] * vh).float().cpu(), (u * root).float().cpu(), error.item())
