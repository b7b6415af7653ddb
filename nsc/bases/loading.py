"""What is taken from a model by its structure: the body, its linear layers, its blocks, whether it is causal.

No model is known by name here. The body is what ``AutoModel`` gives (no LM head, nothing after the last block's norm).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from nsc.bases.base_config import body_config, main_input
from nsc.bases.llava import ImageTextBody, takes_images_and_text
from nsc.errors import NSCError
from nsc.runtime.placement import reload_in_backward
from nsc.runtime.quantization import dequantise_where_used, quantization_config

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load_body(
    base: str, dtype: str = "auto", device: str = "auto", weights: str = "full", device_map: str | None = None
) -> nn.Module:
    """The frozen transformer body of a local folder or Hub id, in eval mode. Raises NSCError if it cannot be loaded.

    weights: "full", or fewer bits for its linears (see ``nsc.runtime.quantization``).  device_map: as accelerate takes
    it, instead of ``device``; what no device holds stays on the CPU or disk and is brought where it is used.
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
