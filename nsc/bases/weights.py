"""The base's own checkpoint: where it lies, which files hold its weights, and tensors read from it by their keys."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsc.bases.base_model import Base
from nsc.bases.module_names import resolve
from nsc.errors import NSCError

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")


def checkpoint_folder(base: Base) -> Path:
    """The base's folder: itself, or a Hub snapshot. Raises NSCError if there is neither."""
    if Path(base.id).is_dir():
        return Path(base.id)
    others = [f"*{suffix}" for suffix in WEIGHT_FILES if suffix != ".safetensors"]
    try:
        return Path(snapshot_download(base.id, ignore_patterns=others))
    except Exception as error:  # the Hub client raises its own, httpx's and the operating system's
        raise NSCError(f"base {base.id!r} is no folder, and the Hub gave no such model: {error}") from error


def refuse_unstreamable(base: Base) -> None:
    """Raise NSCError unless the base has a safetensors checkpoint that ``write_full_model`` can stream."""
    shard_names(checkpoint_folder(base))


def read_tensors(base: Base, keys: Sequence[str]) -> dict[str, Tensor]:
    """Those of ``keys`` that the base's safetensors checkpoint holds. Raises NSCError if there is none."""
    source = checkpoint_folder(base)
    found: dict[str, Tensor] = {}
    for name in shard_names(source):
        with safe_open(source / name, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in set(keys) & set(file.keys())}
    return found


def shard_names(source: Path) -> list[str]:
    """The files that hold a checkpoint's weights. Raises NSCError if they are not safetensors."""
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
    """Key and shape of every tensor in a file. Raises NSCError if it cannot be read."""
    try:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                yield key, tuple(file.get_slice(key).get_shape())
    except (SafetensorError, OSError) as error:
        raise NSCError(f"base shard {shard} cannot be read: {error}; fetch it again") from error


def merged_places(base: Base, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """The shards of a checkpoint, and the key of each merged layer's weight and bias -> its name in the body."""
    source = checkpoint_folder(base)
    shards = [source / name for name in shard_names(source)]
    shapes = {key: shape for shard in shards for key, shape in shapes_in(shard)}
    matrices = [key for key, shape in shapes.items() if key.endswith(".weight") and len(shape) == 2]
    two = base.has_two_towers
    inside = [key for key in matrices if not (two and key.startswith("text_model."))]
    stored = {key.removesuffix(".weight"): (shapes[key][0], shapes[key][1]) for key in inside}
    places = resolve("merged", names, stored)
    of_layer = {f"{place}.{kind}": f"{name}.{kind}" for name, place in places.items() for kind in ("weight", "bias")}
    return shards, {key: name for key, name in of_layer.items() if key in shapes}


def read_layers(base: Base, names: Sequence[str]) -> dict[str, Tensor]:
    """Weights and biases of these layers of the body, from the base's own checkpoint.

    Raises NSCError if it is not in safetensors or a layer is not in it.
    """
    _, places = merged_places(base, names)
    return {places[key]: tensor for key, tensor in read_tensors(base, list(places)).items()}
