"""What is taken from a model by its structure: the body, its linear layers, its blocks, whether it is causal.

No model is known by name here. The body is what ``AutoModel`` gives (no LM head, nothing after the last block's norm).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.utils import logging

from nsc.bases.llava import ImageTextBody, require_llava, takes_images_and_text
from nsc.bases.weights import read_tensors
from nsc.errors import NSCError
from nsc.runtime.placement import reload_in_backward
from nsc.runtime.quantization import dequantise_where_used, quantization_config

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
IMAGES_AND_TEXT = "input_ids with pixel_values"


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
        config = body_config(base)
        with quiet_loading():
            model, info = _auto_class(config).from_pretrained(
                base, config=config, **{DTYPE: precision}, output_loading_info=True, **options
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


def empty_body(base: str) -> nn.Module:
    """The same body without weights, for the names and shapes of its layers. Raises NSCError if there is none."""
    main_input(base)
    config = body_config(base)
    try:
        with quiet_loading(), torch.device("meta"):
            model = _auto_class(config).from_config(config)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise NSCError(f"base {base!r} cannot be built by transformers' AutoModel: {error}") from error
    return ImageTextBody(model) if takes_images_and_text(config) else model


def _auto_class(config: Any) -> Any:
    """AutoModel, but for LLaVA in transformers 4, whose body is the whole model."""
    mapped = type(config) in transformers.MODEL_MAPPING
    return AutoModel if mapped or not takes_images_and_text(config) else AutoModelForImageTextToText


def load_generating_head(base: str, model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (V, d) and bias (V,), or None, of the layer by which a causal base names its next token.

    model: its body, whose token embeddings they are where the two are tied. Raises NSCError where the base generates
    nothing, its checkpoint has no such layer, or its logits are changed behind it.
    """
    if not is_causal(model):
        raise NSCError(f"base {base!r} generates no tokens: its attention is not causal; give positions prompt")
    config = AutoConfig.from_pretrained(base)
    text, images = getattr(config, "text_config", config), takes_images_and_text(config)
    changed = [n for n in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(text, n, None)]
    if changed:
        raise NSCError(f"base {base!r} changes its logits ({changed[0]}), which nsc does not follow")
    try:
        with torch.device("meta"):
            whole = (AutoModelForImageTextToText if images else AutoModelForCausalLM).from_config(config)
    except ValueError as error:
        raise NSCError(f"base {base!r} has no head that generates tokens: {error}") from error
    head = whole.get_output_embeddings()
    if head.weight is whole.get_input_embeddings().weight:
        body: Any = getattr(model, "text", model)
        return body.get_input_embeddings().weight.detach(), None
    place = next(name for name, module in whole.named_modules() if module is head)
    places = ["lm_head", "language_model.lm_head"] if images else [place]  # LLaVA's, in new and old checkpoints
    stored = read_tensors(base, [f"{place}.{kind}" for place in places for kind in ("weight", "bias")])
    found = next((place for place in places if f"{place}.weight" in stored), None)
    if found is None:
        raise NSCError(
            f"base {base!r} has no {place} in its checkpoint, so it generates no tokens; give positions prompt"
        )
    return stored[f"{found}.weight"], stored.get(f"{found}.bias")


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


def body_config(base: str | Path) -> Any:
    """The config of the body: the base's own, or its image tower's where the base has two towers (CLIP, SigLIP).

    Raises NSCError if there is no such base.
    """
    config = _config(base)
    return config.vision_config if _has_two_towers(config) else config


def tower_keys(folder: str | Path, keys: Iterable[str]) -> list[str]:
    """Those of a checkpoint's keys that may belong to the body: of two towers, not the text's."""
    two = _has_two_towers(_config(folder))
    return [key for key in keys if not (two and key.startswith("text_model."))]


def _config(base: str | Path) -> Any:
    try:
        return AutoConfig.from_pretrained(base)
    except (OSError, ValueError) as error:
        raise NSCError(f"base {str(base)!r} cannot be loaded by transformers' AutoModel: {error}") from error


def _has_two_towers(config: Any) -> bool:
    """Whether texts and images are embedded side by side, neither entering the other's model, as LLaVA's images do."""
    features = ("get_text_features", "get_image_features")
    return hasattr(config, "vision_config") and all(hasattr(_body_class(config), name) for name in features)


def _body_class(config: Any) -> Any:
    """What AutoModel makes of a config; None if nothing."""
    found = transformers.MODEL_MAPPING.get(type(config), None)
    return found[0] if isinstance(found, (list, tuple)) else found


def tied_outputs(base: str) -> list[str]:
    """Parameters outside the body that are the body's embeddings themselves, as "lm_head.weight"; no weight is read."""
    config = _config(base)
    inner = config.get_text_config()
    if not any(getattr(c, "tie_word_embeddings", False) for c in (config, inner)):
        return []
    found = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(inner), None)
    if found is None:  # transformers 4 says of every config that it ties, also of an image model's
        return []
    return list(getattr(found, "_tied_weights_keys", None) or ["lm_head.weight"])


def main_input(base: str) -> str:
    """What the body's forward takes first, such as input_ids or pixel_values, or both; no weight is read.

    Raises NSCError if there is no such base, or no body for it, or one that takes both otherwise than LLaVA.
    """
    config = body_config(base)
    if takes_images_and_text(config):
        require_llava(config)
        return IMAGES_AND_TEXT
    body = _body_class(config)
    if body is None:
        raise NSCError(
            f"base {base!r} cannot be loaded by transformers' AutoModel: it has none for {config.model_type}"
        )
    return body.main_input_name


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
    """Whether every attention layer, of LLaVA's language model, sees only the past: right padding reaches no token."""
    model = model.text if isinstance(model, ImageTextBody) else model
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
