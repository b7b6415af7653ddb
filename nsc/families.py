"""What is taken from a model by its structure: the body, its linear layers, its blocks, whether it is causal.

No model is known by name here. The body is what ``AutoModel`` gives (no LM head, nothing after the last block's norm).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from nsc.bodies import ImageTextBody, require_llava, takes_images_and_text
from nsc.errors import NSCError, TargetError
from nsc.places import reload_in_backward
from nsc.quantized import dequantise_where_used, quantization_config

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
IMAGES_AND_TEXT = "input_ids with pixel_values"
PREFERRED_TARGETS = ("v_proj", "o_proj")  # the paper's choice for LLMs and VLMs, then for ViT


def load_body(
    base: str, dtype: str = "auto", device: str = "auto", weights: str = "full", device_map: str | None = None
) -> nn.Module:
    """The frozen transformer body of a local folder or Hub id, in eval mode. Raises NSCError if it cannot be loaded.

    weights: "full", or fewer bits for its linears (see ``nsc.quantized``).  device_map: as accelerate takes it, instead
    of ``device``; what no device holds stays on the CPU or disk and is brought where it is used.
    """
    place = one_device(device)
    try:
        precision = dtype if dtype == "auto" else getattr(torch, dtype)
        options: dict[str, Any] = {"device_map": device_map} if device_map else {}
        if weights != "full":
            options |= {"quantization_config": quantization_config(weights)}
            if place != "cpu":  # of which transformers 4 would think that it is offloaded, and left in full
                options.setdefault("device_map", {"": place})
        config = AutoConfig.from_pretrained(base)
        with quiet_loading():
            model, info = _auto_class(config).from_pretrained(
                base, **{DTYPE: precision}, output_loading_info=True, **options
            )
    except TypeError as error:
        raise NSCError(
            f"transformers and the library of weights {weights} do not fit: update both ({error})"
        ) from error
    except (OSError, ValueError, AttributeError, ImportError, RuntimeError, SafetensorError) as error:
        raise NSCError(f"base {base!r} cannot be loaded by transformers' AutoModel: {error}") from error
    lost = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # behind all that is measured
    if lost:
        raise NSCError(
            f"base {base!r} has no weights for {', '.join(lost[:3])}{' and more' * (len(lost) > 3)}: transformers would"
            " fill them at random; fetch the base again, or give the model that its config describes"
        )
    if takes_images_and_text(config):
        model = ImageTextBody(model)
    model.config.use_cache = False  # nothing is generated: a key-value cache would only hold memory
    model.requires_grad_(False).eval()
    if device_map:
        reload_in_backward(model)
    if weights != "full":
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NSCError(f"weights {weights} do not go with offloading, as device_map {device_map} does: give one")
        dequantise_where_used(model)
    return model if options else model.to(place)


def _auto_class(config: Any) -> Any:
    """AutoModel, but for LLaVA in transformers 4, whose body is the whole model."""
    mapped = type(config) in transformers.MODEL_MAPPING
    return AutoModel if mapped or not takes_images_and_text(config) else transformers.AutoModelForImageTextToText


def one_device(device: str) -> str:
    """ "auto" is CUDA where there is one, else the CPU."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


@contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers without its bars and reports: a body leaves the head of its checkpoint unused, and that is meant."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_tokenizer(base: str) -> Any:
    """The base's own tokenizer. Raises NSCError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(base)
    except (OSError, ValueError, ImportError) as error:
        raise NSCError(f"base {base!r} has no tokenizer that transformers can load: {error}") from error


def load_image_processor(base: str) -> Any:
    """The base's own image processor. Raises NSCError if there is none."""
    try:
        with quiet_loading():
            return AutoImageProcessor.from_pretrained(base)
    except (OSError, ValueError, ImportError) as error:
        raise NSCError(
            f"base {base!r} has no image processor that transformers can load (preprocessor_config.json): {error}"
        ) from error


def load_processor(base: str) -> Any:
    """The base's own processor of images with text. Raises NSCError if there is none."""
    try:
        with quiet_loading():
            return AutoProcessor.from_pretrained(base)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise NSCError(f"base {base!r} has no processor that transformers can load: {error}") from error


def tied_outputs(base: str) -> list[str]:
    """Parameters outside the body that are the body's embeddings themselves, as "lm_head.weight"; no weight is read."""
    config = AutoConfig.from_pretrained(base)
    inner = config.get_text_config()
    if not any(getattr(c, "tie_word_embeddings", False) for c in (config, inner)):
        return []
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(inner), None)
    return list(getattr(found, "_tied_weights_keys", None) or ["lm_head.weight"])


def main_input(base: str) -> str:
    """What the body's forward takes first, such as input_ids or pixel_values, or both; no weight is read.

    Raises NSCError if there is no such base, or no body for it, or one that takes both otherwise than LLaVA.
    """
    try:
        config = AutoConfig.from_pretrained(base)
        if takes_images_and_text(config):
            require_llava(config)
            return IMAGES_AND_TEXT
        found = transformers.MODEL_MAPPING[type(config)]
    except (OSError, ValueError, KeyError) as error:
        raise NSCError(f"base {base!r} cannot be loaded by transformers' AutoModel: {error}") from error
    return (found[0] if isinstance(found, (list, tuple)) else found).main_input_name


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Every linear layer of a body by name, in the model's own order -> (out_features, in_features)."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and not _in_head(model, name)}
    return {name: (m.out_features, m.in_features) for name, m in found.items()}


def body_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every parameter of a body by name, by each of its names where it has several."""
    return {n: p for n, p in model.named_parameters(remove_duplicate=False) if not _in_head(model, n)}


def _in_head(model: nn.Module, name: str) -> bool:
    """Whether a module or parameter belongs to the LM head that transformers 4 leaves in LLaVA's body."""
    return isinstance(model, ImageTextBody) and name.startswith("language_model.lm_head")


def is_causal(model: nn.Module) -> bool:
    """Whether every attention layer sees only the past, so that right padding cannot reach a real token."""
    flags = [m.is_causal for m in model.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def block_of(model: nn.Module, name: str) -> tuple[int, int] | None:
    """(index, depth) of the block that a module lies in: the first numbered child of a ModuleList on its path."""
    place = _place(model, name)
    return (place[1], len(place[0])) if place else None


def blocks_before(model: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """The blocks ahead of all that these modules lie in, in the ModuleList of the last one."""
    places = [place for name in names if (place := _place(model, name))]
    blocks = places[-1][0] if places else nn.ModuleList()
    return list(blocks)[: min((index for home, index in places if home is blocks), default=0)]


def _place(model: nn.Module, name: str) -> tuple[nn.ModuleList, int] | None:
    parent, parts = model, name.split(".")
    for part in parts:
        if isinstance(parent, nn.ModuleList):
            return parent, int(part)
        parent = getattr(parent, part)
    return None


def choose_targets(
    model: nn.Module,
    names: Sequence[str],  # the modules that carry LoRA
    modules: Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
) -> list[str]:
    """The layers whose inputs are measured: those ``modules`` in those ``blocks``.

    Default: v_proj (or else o_proj, or else every module with LoRA) in the last quarter of the blocks, by the model's
    own depth. Raises TargetError if nothing is left, saying what there was.
    """
    places = {name: block_of(model, name) for name in names}
    chosen = [name for name, place in places.items() if _in_blocks(place, blocks)]
    kinds = modules or next(([k] for k in PREFERRED_TARGETS if any(_is_kind(n, [k]) for n in chosen)), None)
    targets = [name for name in chosen if kinds is None or _is_kind(name, kinds)]
    if not targets:
        depth = max((place[1] for place in places.values() if place), default=0)
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        where = f"blocks {list(blocks)}" if blocks is not None else "the last quarter"
        raise TargetError(
            f"no target layer: modules {list(modules or PREFERRED_TARGETS)} in {where} of {depth} blocks match none of"
            f" the {len(names)} modules with LoRA ({there}); choose others with target_modules and target_blocks"
        )
    return targets


def _in_blocks(place: tuple[int, int] | None, blocks: Sequence[int] | None) -> bool:
    if place is None:
        return False
    index, depth = place
    return index in blocks if blocks is not None else index >= depth - max(1, depth // 4)


def _is_kind(name: str, kinds: Sequence[str]) -> bool:
    return any(name == kind or name.endswith(f".{kind}") for kind in kinds)
