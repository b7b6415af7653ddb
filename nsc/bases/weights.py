"""The base's own checkpoint: where it lies, which files hold its weights, and tensors read from it by their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsc.bases.base_model import Base
from nsc.bases.experts import Part, expert_of, parts_of
from nsc.bases.module_names import resolve
from nsc.errors import NameMismatch, NSCError

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def checkpoint_folder(base: Base) -> Path:
    """Return the folder of a base's checkpoint, downloaded from the Hub if need be.

    Args:
        base: the base; its weights need not be loaded.

    Returns:
        The folder.

    Raises:
        NSCError: if there is neither a folder nor such a model on the Hub.
    """
    if Path(base.id).is_dir():
        return Path(base.id)
    others = [f"*{suffix}" for suffix in WEIGHT_FILES if suffix != ".safetensors"]
    try:
        return Path(snapshot_download(base.id, ignore_patterns=others))
    except Exception as error:  # the Hub client raises its own, httpx's and the operating system's
        raise NSCError(f"base {base.id!r} is no folder, and the Hub gave no such model: {error}") from error


def refuse_unstreamable(base: Base) -> None:
    """Refuse a base whose checkpoint cannot be streamed shard by shard.

    Args:
        base: the base; its weights need not be loaded.

    Raises:
        NSCError: unless the checkpoint is in safetensors.
    """
    shard_names(checkpoint_folder(base))


def read_tensors(base: Base, keys: Sequence[str]) -> dict[str, Tensor]:
    """Read tensors from a base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        keys: keys as in the checkpoint.

    Returns:
        Key -> tensor, for the keys that exist.

    Raises:
        NSCError: if the checkpoint is not in safetensors.
    """
    source = checkpoint_folder(base)
    found: dict[str, Tensor] = {}
    for name in shard_names(source):
        with safe_open(source / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in set(keys) & set(file.keys())}
    return found


def shard_names(source: Path) -> list[str]:
    """Return the names of the files that hold a checkpoint's weights.

    Args:
        source: folder of the checkpoint.

    Returns:
        File names.

    Raises:
        NSCError: if the checkpoint is not in safetensors.
    """
    index = source / "model.safetensors.index.json"
    if index.is_file():
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    if (source / "model.safetensors").is_file():
        return ["model.safetensors"]
    raise NSCError(
        f"base {source} holds no model.safetensors or its index, so its weights cannot be streamed;"
        " convert it with save_pretrained, or export an adapter where all adapters are LoRA alone"
    )


def shapes_in(shard: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the shapes of all tensors in a file.

    Args:
        shard: safetensors file.

    Yields:
        Key and shape.

    Raises:
        NSCError: if the file cannot be read.
    """
    try:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise NSCError(f"base shard {shard} cannot be read: {error}; fetch it again") from error


def merged_places(base: Base, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Find the merged layers in a base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body; experts are left out.

    Returns:
        The shards, and the key of each layer's weight and bias -> its name in the body.

    Raises:
        NameMismatch: if a layer is not in the checkpoint.
    """
    source = checkpoint_folder(base)
    names = [name for name in names if not expert_of(name)]
    shards = [source / name for name in shard_names(source)]
    shapes = {key: shape for shard in shards for key, shape in shapes_in(shard)}
    matrices = [key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2]
    two = base.has_two_towers
    inside = [key for key in matrices if not (two and key.startswith("text_model."))]
    stored = {key.removesuffix(".weight"): (shapes[key][0], shapes[key][1]) for key in inside}
    places = resolve("merged", names, stored)
    of_layer = {f"{place}.{kind}": f"{name}.{kind}" for name, place in places.items() for kind in ("weight", "bias")}
    return shards, {key: name for key, name in of_layer.items() if key in shapes}


def expert_parts(base: Base, names: Sequence[str]) -> dict[str, list[Part]]:
    """Find the experts that are merged in a base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body; modules are left out.

    Returns:
        Key -> the parts of its tensor that are rows of these layers.

    Raises:
        NameMismatch: if an expert is not in the checkpoint, or not as transformers' class for it can be asked.
    """
    wanted = {name for name in names if expert_of(name)}
    if not wanted:
        return {}
    source = checkpoint_folder(base)
    shapes = {key: shape for shard in shard_names(source) for key, shape in shapes_in(source / shard)}
    parts = parts_of(base.model, shapes)
    found = {key: [part for part in here if part.layer in wanted] for key, here in parts.items()}
    if lost := wanted - {part.layer for here in found.values() for part in here}:
        raise NameMismatch(
            f"{min(lost)} is not in the checkpoint {source}, or transformers converts what is stored of it in a way"
            " that nsc does not know: export an adapter, or save the base anew with save_pretrained"
        )
    return {key: here for key, here in found.items() if here}


def read_layers(base: Base, names: Sequence[str]) -> dict[str, Tensor]:
    """Read the weights and biases of layers of the body from the base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body.

    Returns:
        Parameter name in the body -> tensor.

    Raises:
        NSCError: if the checkpoint is not in safetensors, or a layer is not in it.
    """
    _, places = merged_places(base, names)
    return {places[key]: tensor for key, tensor in read_tensors(base, list(places)).items()}
