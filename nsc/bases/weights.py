"""The base's own checkpoint: where it lies, which files hold its weights, and tensors read from it by their keys."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nsc.bases.base_model import Base
from nsc.bases.checkpoint_keys import parameter_names
from nsc.bases.codes import FLOATS, Codes, Stored
from nsc.bases.conv1d import transposed_weights
from nsc.bases.experts import Part, expert_of, parts_of
from nsc.errors import NameMismatch, NSCError
from nsc.paths import lfs_remedy

WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CODES_REMEDY = (
    "give the full-precision model that it was made from as base, or, where all adapters are LoRA alone, write an"
    " adapter (without --full)"
)


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
        Key -> tensor, for the keys that exist; what FP8 codes stand for is float32.

    Raises:
        NSCError: if the checkpoint is not in safetensors, or stores other codes under a key.
    """
    stored = stored_tensors(base)
    wanted = [key for key in keys if key in stored]
    codes = Codes(stored, base.config)
    for key in wanted:
        require_readable(base, codes, key)
    found = read_stored(stored, wanted)
    return found | {key: read_codes(codes, key, found[key]).float() for key in wanted if key in codes.scales}


def read_stored(stored: Mapping[str, Stored], keys: Collection[str]) -> dict[str, Tensor]:
    """Read tensors as they are stored.

    Args:
        stored: key -> tensor, of the whole checkpoint.
        keys: which of them.

    Returns:
        Key -> tensor.
    """
    found: dict[str, Tensor] = {}
    for shard in {stored[key].shard for key in keys}:
        with safe_open(shard, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in keys if stored[key].shard == shard}
    return found


def stored_tensors(base: Base) -> dict[str, Stored]:
    """Return all tensors of a base's checkpoint by the headers of its files.

    Args:
        base: the base; its weights need not be loaded.

    Returns:
        Key -> tensor.

    Raises:
        NSCError: if the checkpoint is not in safetensors, or a file of it cannot be read.
    """
    source, found = checkpoint_folder(base), {}
    for shard in (source / name for name in shard_names(source)):
        try:
            with safe_open(shard, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    header = file.get_slice(key)
                    found[key] = Stored(shard, header.get_dtype(), tuple(header.get_shape()))
        except (SafetensorError, OSError) as error:
            why = lfs_remedy(shard) or f"{error}; fetch it again"
            raise NSCError(f"base shard {shard} cannot be read: {why}") from error
    return found


def spelled_out(codes: Codes) -> dict[str, Tensor]:
    """Read a whole checkpoint as the numbers that its FP8 codes stand for.

    Args:
        codes: of the checkpoint; all FP8 weights can be read.

    Returns:
        Key -> tensor; what was FP8 is in ``codes.dtype``, rounded once.
    """
    tensors = read_stored(codes.stored, codes.stored.keys() - codes.dropped)
    for key in codes.scales.keys() & tensors.keys():
        tensors[key] = read_codes(codes, key, tensors[key]).to(codes.dtype)
    return tensors


def read_codes(codes: Codes, key: str, tensor: Tensor) -> Tensor:
    """Return the weight that FP8 codes stand for, with its scale from wherever that lies.

    Args:
        codes: of the checkpoint.
        key: key of the weight, which can be read.
        tensor: as stored.

    Returns:
        Of the same shape, float64.
    """
    scale = codes.scales[key]
    return codes.read(key, tensor, read_stored(codes.stored, [scale])[scale] if scale else None)


def require_readable(base: Base, codes: Codes, key: str, layer: str = "") -> None:
    """Refuse a weight that is stored as codes which cannot be read as numbers.

    Args:
        base: the base, for the error.
        codes: of its checkpoint.
        key: key of the weight.
        layer: what the base's body calls its layer, for the error.

    Raises:
        NSCError: naming the layer and the remedy.
    """
    if there := codes.unreadable(key):
        raise NSCError(
            f"base {base.id!r} stores layer {layer or key.rpartition('.')[0]} as codes ({there}), to which no update"
            f" can be added: {CODES_REMEDY}"
        )


def has_safetensors(base: Base) -> bool:
    """Return whether a base lies in a folder with weights in safetensors.

    Args:
        base: the base; its weights need not be loaded.

    Returns:
        Whether it does; nothing is downloaded to find out.
    """
    return any((Path(base.id) / name).is_file() for name in (SINGLE, INDEX))


def shard_names(source: Path) -> list[str]:
    """Return the names of the files that hold a checkpoint's weights.

    Args:
        source: folder of the checkpoint.

    Returns:
        File names.

    Raises:
        NSCError: if the checkpoint is not in safetensors.
    """
    if (source / SINGLE).is_file():
        return [SINGLE]
    if (source / INDEX).is_file():
        return names_in_index(source / INDEX)
    raise NSCError(
        f"base {source} holds no model.safetensors or its index, so its weights cannot be streamed;"
        " convert it with save_pretrained, or export an adapter where all adapters are LoRA alone"
    )


def names_in_index(index: Path) -> list[str]:
    """Return the names of the files that an index spreads a checkpoint's weights over.

    Args:
        index: JSON file beside them.

    Returns:
        File names.

    Raises:
        NSCError: if it cannot be read, or names anything but a file in its own folder.
    """
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise NSCError(f"base index {index} cannot be read ({error!r}); fetch it again") from error
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\:"):
            raise NSCError(
                f"base index {index} names {name!r}, which is no file name: weights must lie beside the index; fetch"
                " the base again"
            )
    return sorted(names)


def require_own_files(base: Base) -> None:
    """Refuse a base in a folder, an index of which names files that lie elsewhere.

    Args:
        base: the base; its weights need not be loaded.

    Raises:
        NSCError: naming index and file.
    """
    for index in Path(base.id).glob("*.index.json"):
        names_in_index(index)


def merged_places(base: Base, names: Sequence[str]) -> tuple[list[Path], dict[str, str]]:
    """Find the merged layers in a base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body; experts are left out.

    Returns:
        The shards, and the key of each layer's weight and bias -> its name in the body.

    Raises:
        NameMismatch: if a layer is not in the checkpoint.
        NSCError: if a layer is stored as codes that cannot be read as numbers.
    """
    source = checkpoint_folder(base)
    tensors, names = stored_tensors(base), [name for name in names if not expert_of(name)]
    codes = Codes(tensors, base.config)
    keys = [*tensors, *(f"{module}.weight" for module in codes.packed())]
    wanted = {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}
    places = {key: name for key, name in parameter_names(base.blank, keys).items() if name in wanted}
    if behind := {f"{name}.{kind}" for name in _behind(base, names) for kind in ("weight", "bias")}:
        places |= {key: name for key, name in parameter_names(base.generating, keys).items() if name in behind}
    if lost := sorted({f"{name}.weight" for name in names} - set(places.values())):
        raise NameMismatch(
            f"{len(lost)} merged layers, such as {lost[0]}, are not in the checkpoint {source}, or transformers"
            " fuses or splits them on loading: give the base that its config describes, or export an adapter"
        )
    for key, name in places.items():
        if name.endswith(".weight"):
            require_readable(base, codes, key, name.removesuffix(".weight"))
    return [source / name for name in shard_names(source)], {k: name for k, name in places.items() if k in tensors}


def _behind(base: Base, names: Sequence[str]) -> list[str]:
    """Those of the layers that the body has not, but the whole model that generates tokens."""
    body = dict(base.blank.named_modules())
    outside = [name for name in names if name not in body]
    return [name for name in outside if name in base.output_layers]


def read_parameters(base: Base, model: Any, names: Sequence[str]) -> dict[str, Tensor]:
    """Read parameters of any model class from a base's checkpoint, whatever their keys are called in it.

    Args:
        base: the base; its weights need not be loaded.
        model: a model of transformers on this base; the meta device is enough.
        names: names of its parameters.

    Returns:
        Name -> tensor, for the parameters that the checkpoint holds.

    Raises:
        NSCError: if the checkpoint is not in safetensors.
    """
    keys = list(stored_tensors(base))
    places = {key: name for key, name in parameter_names(model, keys).items() if name in set(names)}
    return {places[key]: tensor for key, tensor in read_tensors(base, list(places)).items()}


def codes_to_spell_out(base: Base, places: Collection[str]) -> Codes | None:
    """Return how FP8 weights are read where one of them is merged, so that all are to be written in full.

    Args:
        base: the base; its weights need not be loaded.
        places: keys of the merged weights in the checkpoint, which can be read.

    Returns:
        The codes of the checkpoint; None where no merged weight is a code, so that all others may stay codes.

    Raises:
        NSCError: if another tensor is stored as codes that cannot be read as numbers.
    """
    codes = Codes(stored_tensors(base), base.config)
    if not codes.scales.keys() & set(places):
        return None
    if left := codes.left_over():
        raise NSCError(
            f"base {base.id!r} stores {left} as codes in {codes.stored[left].dtype} that cannot be read as numbers, and"
            f" others, which are merged, as FP8: {CODES_REMEDY}"
        )
    return codes


def refuse_codes(base: Base, names: Sequence[str]) -> None:
    """Refuse to add updates to layers that a base's checkpoint stores as codes which cannot be read as numbers.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body.

    Raises:
        NameMismatch: if a layer is not in the checkpoint.
        NSCError: naming the layer and the remedy.
    """
    if names:
        codes_to_spell_out(base, [*merged_places(base, names)[1], *expert_parts(base, names)])


def expert_parts(base: Base, names: Sequence[str]) -> dict[str, list[Part]]:
    """Find the experts that are merged in a base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body; modules are left out.

    Returns:
        Key -> the parts of its tensor that are rows of these layers.

    Raises:
        NameMismatch: if an expert is not in the checkpoint, or not as a matrix of its own or of a stack.
        NSCError: if an expert is stored as codes that cannot be read as numbers.
    """
    wanted = {name for name in names if expert_of(name)}
    if not wanted:
        return {}
    tensors = stored_tensors(base)
    parts = parts_of(base.model, {key: tensor.shape for key, tensor in tensors.items()})
    found = {key: own for key, here in parts.items() if (own := [part for part in here if part.layer in wanted])}
    if lost := wanted - {part.layer for here in found.values() for part in here}:
        raise NameMismatch(
            f"expert {min(lost)} is not in the checkpoint of base {base.id!r}, or stored as codes or otherwise than in"
            " matrices, one by one or stacked: export an adapter, or give the base as save_pretrained writes it"
        )
    codes = Codes(tensors, base.config)
    for key, here in found.items():
        if key.endswith(".weight") or tensors[key].dtype not in FLOATS:  # else a parameter, and no module's weight
            require_readable(base, codes, key, here[0].layer)
    return found


def read_layers(base: Base, names: Sequence[str]) -> dict[str, Tensor]:
    """Read the weights and biases of layers of the body from the base's checkpoint.

    Args:
        base: the base; its weights need not be loaded.
        names: layers of the body.

    Returns:
        Parameter name in the body -> tensor; (m, d) of a weight.

    Raises:
        NSCError: if the checkpoint is not in safetensors, or a layer is not in it.
    """
    _, places = merged_places(base, names)
    stored, turned = read_tensors(base, list(places)), transposed_weights(base.model)
    return {places[key]: x.T if places[key] in turned else x for key, x in stored.items()}
