"""A merge -> files: a PEFT adapter (its exact factors, or truncated), or the whole model shard by shard."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from nsc.adapters.lora import Adapter
from nsc.adapters.peft_folder import CONFIG, TOKENIZER_FILES
from nsc.adapters.tensor_file import write_tensors
from nsc.adapters.unsupported import HEADS_BY_TASK
from nsc.bases.base_model import Base, rope_misread_by_4
from nsc.bases.codes import Codes
from nsc.bases.conv1d import transposed_weights
from nsc.bases.weights import (
    INDEX,
    WEIGHT_FILES,
    checkpoint_folder,
    codes_to_spell_out,
    expert_parts,
    merged_places,
    read_codes,
    read_layers,
)
from nsc.export.description import DESCRIPTION
from nsc.export.parameters import ParameterFactors, part_updates
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
    parameters: Mapping[str, ParameterFactors] | None = None,
    transposed: bool = False,
    behind: Collection[str] = (),
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a PEFT folder whose scale is 1 in every module and whose targets are full module names.

    Args:
        folder: an existing folder.
        factors: module -> its factors.
        prefix: what the names carry before the body's own, such as "model." for a CausalLM.
        base: id of the base, for the config.
        whole: parameters of layers that are written to modules_to_save as they are.
        parameters: full name of a parameter -> its factors, of experts and routers.
        transposed: whether the base stores the weights of all these layers transposed, as Conv1D does.
        behind: those of the layers that lie behind the body, whose names take no prefix.
        about: more fields of the config, as ``agreed_fields`` finds them.
    """
    parameters = parameters or {}
    named = {n if n.rpartition(".")[0] in behind else prefix + n: tensor for n, tensor in (whole or {}).items()}
    saved = sorted({name.rpartition(".")[0] for name in named})
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
        fan_in_fan_out=transposed,
        modules_to_save=saved or None,
        base_model_name_or_path=base,
        inference_mode=True,
        **(about or {}),
    )
    config.target_modules = modules  # LoraConfig made a set of it, whose order is another in every process
    config.save_pretrained(folder)
    tensors = {}
    pairs: dict[str, MergedFactors | ParameterFactors] = {**factors, **{p.module: p for p in parameters.values()}}
    for name, f in pairs.items():
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
    parts = expert_parts(base, merged.names)
    codes, turned = codes_to_spell_out(base, [*places, *parts]), transposed_weights(base.model)
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
            if fp8 or update is not None or key in parts:
                before = read_codes(codes, key, tensors[key]) if codes and fp8 else tensors[key].double()
                for at, rows in part_updates(merged, parts.get(key, ())):
                    before[at] += rows
                dtype = codes.dtype if codes and fp8 else tensors[key].dtype
                tensors[key] = (before if update is None else before + update).to(dtype)
        save_file(tensors, folder / shard.name, metadata=metadata)
    _copy_side_files(folder, checkpoint_folder(base))
    if codes:
        _forget_codes(folder, codes)


def agreed_fields(adapters: Mapping[str, Adapter]) -> dict[str, Any]:
    """Return what all adapters say of the model class that they are for, so that PEFT's auto classes load their merge.

    A task whose head PEFT adds by itself is left out, since that head is each task's own.

    Args:
        adapters: task -> adapter.

    Returns:
        task_type and auto_mapping of their configs, each where it is the same in all of them.
    """
    configs = [adapter.config for adapter in adapters.values()]
    found = {field: configs[0].get(field) for field in ("task_type", "auto_mapping")}
    agreed = {field: x for field, x in found.items() if x and all(config.get(field) == x for config in configs)}
    return {field: x for field, x in agreed.items() if field != "task_type" or x not in HEADS_BY_TASK}


def misread_config(folder: Path) -> list[str]:
    """Warn of a config that the oldest transformers that is supported reads otherwise than the newest.

    Args:
        folder: of a whole model.

    Returns:
        No or one warning, with the remedy.
    """
    lost = rope_misread_by_4(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    return [
        f"transformers before 5 reads config.json without {', '.join(dict.fromkeys(lost))}, which stand under"
        " rope_parameters alone, and computes something else: serve it by transformers 5, or write rope_theta (and"
        " rope_scaling) beside rope_parameters"
    ][: len(lost)]


def copy_tokenizer(folder: Path, adapters: Mapping[str, Adapter]) -> list[str]:
    """Copy the tokenizer, chat template and processor that lie beside adapters, if all that have them have the same.

    Args:
        folder: an existing folder, in which they replace the base's.
        adapters: task -> adapter.

    Returns:
        No or one warning: that they differ.
    """
    beside = {task: _tokenizer_files(adapter.path) for task, adapter in adapters.items()}
    having = {task: files for task, files in beside.items() if files}
    contents = {task: {name: file.read_bytes() for name, file in files.items()} for task, files in having.items()}
    first = next(iter(contents.values()), {})
    for task, found in contents.items():
        if strange := sorted(name for name in {*first, *found} if first.get(name) != found.get(name)):
            return [
                f"no tokenizer or chat template is copied from the adapters: {strange[0]} beside {task} is another than"
                f" beside {next(iter(contents))}; copy those that the merge should be used with, if not the base's"
            ]
    for name, content in first.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return []


def _tokenizer_files(folder: Path) -> dict[str, Path]:
    """Name -> file, of an adapter's folder."""
    if not (folder / CONFIG).is_file():
        return {}
    files = [file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()]
    return {file.relative_to(folder).as_posix(): file for file in files}


def _copy_side_files(folder: Path, source: Path) -> None:
    """All that is no weight of the model; weights below a folder only where sentence-transformers runs it."""
    modules = _module_folders(source)
    for place in [path for path in source.iterdir() if not _is_apart(path, folder)]:
        for file in [path for path in (place, *place.rglob("*")) if path.is_file()]:
            name = file.relative_to(source)
            if file.suffix not in WEIGHT_FILES or place.name in modules:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, folder / name)


def _is_apart(place: Path, folder: Path) -> bool:
    """Whether something in a base's folder is no part of the base: hidden, of its repository, an adapter or a merge."""
    if not place.is_dir():
        return place.name.lower() in OWN_FILES
    results = any(next(place.rglob(name), None) for name in (CONFIG, DESCRIPTION))
    return place.name.startswith(".") or results or place.resolve() in folder.resolve().parents


def _module_folders(source: Path) -> set[str]:
    """The sub-folders of modules that sentence-transformers runs behind the model."""
    try:
        modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
        return {module["path"].split("/")[0] for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return set()


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
