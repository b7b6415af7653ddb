"""A merge -> files: a PEFT adapter (its exact factors, or truncated), or the whole model shard by shard."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.bases.base_model import Base
from nsc.bases.weights import WEIGHT_FILES, checkpoint_folder, expert_parts, merged_places, read_layers
from nsc.export.parameters import ParameterFactors, part_updates
from nsc.recipes.merged_factors import MergedFactors
from nsc.recipes.updates import Merged, parameter_update, whole_updates

OWN_FILES = ("readme.md", ".gitattributes")  # of the base's repository, not of the model


def merged_layers_whole(base: Base, merged: Merged) -> dict[str, Tensor]:
    """Merge every parameter that adapters fine-tuned whole, base and update together.

    Args:
        base: whose checkpoint is read, if there is any such parameter.
        merged: the merge.

    Returns:
        Parameter by name -> what it is merged to, float32.

    Raises:
        NSCError: if the base has no safetensors checkpoint that holds them.
    """
    stored = read_layers(base, merged.whole) if merged.whole else {}
    return {name: (stored[name].double() + update).float() for name, update in whole_updates(merged).items()}


def write_adapter(
    folder: Path,
    factors: Mapping[str, MergedFactors],
    prefix: str,
    base: str,
    whole: Mapping[str, Tensor] | None = None,
    parameters: Mapping[str, ParameterFactors] | None = None,
) -> None:
    """Write a PEFT folder whose scale is 1 in every module and whose targets are full module names.

    Args:
        folder: an existing folder.
        factors: module -> its factors.
        prefix: what the names carry before the body's own, such as "model." for a CausalLM.
        base: id of the base, for the config.
        whole: parameters of layers that are written to modules_to_save as they are.
        parameters: full name of a parameter -> its factors, of experts and routers.
    """
    whole, parameters = whole or {}, parameters or {}
    saved = sorted({prefix + name.rpartition(".")[0] for name in whole})
    modules, held = sorted(prefix + name for name in factors), sorted(prefix + name for name in parameters)
    ranks = {prefix + name: f.A.shape[0] for name, f in factors.items()}
    ranks |= {prefix + name: f.rank for name, f in parameters.items()}
    top = max(ranks.values())
    smaller = {name: rank for name, rank in ranks.items() if rank != top}
    config = LoraConfig(
        r=top,
        lora_alpha=top,
        target_modules=modules,
        **({"target_parameters": held} if held else {}),
        rank_pattern=smaller,
        alpha_pattern=dict(smaller),
        lora_dropout=0.0,
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        inference_mode=True,
    )
    config.target_modules = modules  # LoraConfig made a set of it, whose order is another in every process
    config.save_pretrained(folder)
    tensors = {}
    for name, f in factors.items():
        tensors[f"base_model.model.{prefix}{name}.lora_A.weight"] = f.A.contiguous()
        tensors[f"base_model.model.{prefix}{name}.lora_B.weight"] = f.B.contiguous()
    for p in parameters.values():
        tensors[f"base_model.model.{prefix}{p.module}.lora_A.weight"] = p.A.contiguous()
        tensors[f"base_model.model.{prefix}{p.module}.lora_B.weight"] = p.B.contiguous()
    tensors |= {f"base_model.model.{prefix}{name}": tensor.contiguous() for name, tensor in whole.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def write_full_model(folder: Path, base: Base, merged: Merged) -> None:
    """Write the base's checkpoint with the updates added, one shard and one layer's update in memory at a time.

    Shards, index, tied weights, dtypes and side files are the base's own.

    Args:
        folder: an existing folder.
        base: whose checkpoint is copied.
        merged: the merge.

    Raises:
        NSCError: if the base has no safetensors checkpoint, or a merged layer is not in it.
    """
    source = checkpoint_folder(base)
    shards, places = merged_places(base, merged.names)
    parts = expert_parts(base, merged.names)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        for key in tensors.keys() & places.keys():
            if (update := parameter_update(merged, places[key])) is not None:
                tensors[key] = (tensors[key].double() + update).to(tensors[key].dtype)
        for key in tensors.keys() & parts.keys():
            for index, update in part_updates(merged, parts[key]):
                stored = tensors[key][index]
                stored.copy_(stored.double() + update)
        save_file(tensors, folder / shard.name, metadata=metadata)
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name.lower() not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)
