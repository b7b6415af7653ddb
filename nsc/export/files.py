"""A merge -> files: a PEFT adapter (its exact factors, or truncated), or the whole model shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.adapters.tensor_file import write_tensors
from nsc.bases.base_model import Base
from nsc.bases.codes import Codes
from nsc.bases.conv1d import transposed_weights
from nsc.bases.weights import (
    INDEX,
    WEIGHT_FILES,
    checkpoint_folder,
    codes_to_spell_out,
    merged_places,
    read_codes,
    read_layers,
)
from nsc.recipes.merged_factors import MergedFactors
from nsc.recipes.updates import Merged, parameter_update, whole_updates

OWN_FILES = ("readme.md", ".gitattributes")  # of the base's repository, not of the model
OF_CODES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")  # beside quantised weights


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
    transposed: bool = False,
    behind: Collection[str] = (),
) -> None:
    """Write a PEFT folder whose scale is 1 in every module and whose targets are full module names.

    Args:
        folder: an existing folder.
        factors: module -> its factors.
        prefix: what the names carry before the body's own, such as "model." for a CausalLM.
        base: id of the base, for the config.
        whole: parameters of layers that are written to modules_to_save as they are.
        transposed: whether the base stores the weights of all these layers transposed, as Conv1D does.
        behind: those of the layers that lie behind the body, whose names take no prefix.
    """
    named = {n if n.rpartition(".")[0] in behind else prefix + n: tensor for n, tensor in (whole or {}).items()}
    saved = sorted({name.rpartition(".")[0] for name in named})
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
        fan_in_fan_out=transposed,
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
    tensors |= {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named.items()}
    write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})


def write_full_model(folder: Path, base: Base, merged: Merged) -> None:
    """Write the base's checkpoint with the updates added, one shard and one layer's update in memory at a time.

    Shards, index, tied weights, dtypes and side files are the base's own; but where a merged weight is stored as FP8
    codes, all FP8 weights are written as the numbers that they stand for, in the dtype that the config names, and
    config and index say no more of codes.

    Args:
        folder: an existing folder.
        base: whose checkpoint is copied.
        merged: the merge.

    Raises:
        NSCError: if the base has no safetensors checkpoint, or a merged layer is not in it, or stored as codes that
            cannot be read as numbers.
    """
    shards, places = merged_places(base, merged.names)
    codes, turned = codes_to_spell_out(base, places), transposed_weights(base.model)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        if codes:
            tensors = {key: x for key, x in tensors.items() if key not in codes.dropped}
        for key in tensors:
            fp8 = codes is not None and key in codes.scales
            update = parameter_update(merged, places[key]) if key in places else None
            update = update.T if update is not None and places[key] in turned else update
            if fp8 or update is not None:
                before = read_codes(codes, key, tensors[key]) if codes and fp8 else tensors[key].double()
                dtype = codes.dtype if codes and fp8 else tensors[key].dtype
                tensors[key] = (before if update is None else before + update).to(dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
    _copy_side_files(folder, checkpoint_folder(base))
    if codes:
        _forget_codes(folder, codes)


def _copy_side_files(folder: Path, source: Path) -> None:
    for file in source.iterdir():
        if file.is_file() and file.suffix not in WEIGHT_FILES and file.name.lower() not in OWN_FILES:
            shutil.copyfile(file, folder / file.name)


def _forget_codes(folder: Path, codes: Codes) -> None:
    """Remove what config and index say of codes from copies of them."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        part.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for side in OF_CODES:
        (folder / side).unlink(missing_ok=True)
    if (folder / INDEX).is_file():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        index["weight_map"] = {key: file for key, file in index["weight_map"].items() if key not in codes.dropped}
        index["metadata"] = {"total_size": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
