"""Weights of a base into memory, as transformers loads them; its tokenizer and processors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from nsc.bases.base_model import Base, auto_class, quiet_loading
from nsc.bases.llava import ImageTextBody, takes_images_and_text
from nsc.errors import NSCError, one_line
from nsc.runtime.placement import one_device, reload_in_backward
from nsc.runtime.quantization import dequantise_where_used, quantization_config

DTYPE = "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"


def load(
    base: Base, dtype: str = "auto", device: str = "auto", weights: str = "full", device_map: str | None = None
) -> Base:
    """Return the same base with the weights of its body loaded.

    Args:
        base: the base; its weights need not be loaded.
        dtype: dtype of the weights, such as "bfloat16"; "auto" takes the checkpoint's.
        device: "cpu", "cuda"..., or "auto".
        weights: "full", or fewer bits for its linears (see ``nsc.runtime.quantization``).
        device_map: device map of accelerate; replaces ``device``.

    Returns:
        A base whose ``model`` is what ``load_body`` gives.

    Raises:
        NSCError: as ``load_body`` does.
    """
    return replace(base, loaded=load_body(base, dtype, device, weights, device_map))


def load_body(
    base: Base, dtype: str = "auto", device: str = "auto", weights: str = "full", device_map: str | None = None
) -> nn.Module:
    """Load the frozen transformer body of a base, in eval mode.

    Args:
        base: the base; its weights need not be loaded.
        dtype: dtype of the weights, such as "bfloat16"; "auto" takes the checkpoint's.
        device: "cpu", "cuda"..., or "auto", which is CUDA where there is one.
        weights: "full", or fewer bits for its linears (see ``nsc.runtime.quantization``).
        device_map: as accelerate takes it, instead of ``device``; what no device holds stays on the CPU or disk and is
            brought to where it is used.

    Returns:
        What ``AutoModel`` loads, without gradients; an ``ImageTextBody`` where the base takes images with text.

    Raises:
        NSCError: if transformers cannot load it, or its checkpoint lacks weights.
    """
    place = one_device(device)
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if weights != "full":
        options |= {"quantization_config": quantization_config(weights)}
        if place != "cpu":  # of which transformers 4 would think that it is offloaded, and left in full
            options.setdefault("device_map", {"": place})
    model = _with_weights(base, dtype, weights, options)
    if takes_images_and_text(base.body_config):
        model = ImageTextBody(model)
    model.config.use_cache = False  # type: ignore[union-attr]  # nothing is generated: a key-value cache would only hold memory
    model.requires_grad_(False).eval()
    if device_map:
        reload_in_backward(model)
    if weights != "full":
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NSCError(f"weights {weights} do not go with offloading, as device_map {device_map} does: give one")
        dequantise_where_used(model)
    return model if options else model.to(place)


def _with_weights(base: Base, dtype: str, weights: str, options: dict[str, Any]) -> nn.Module:
    """What AutoModel loads; a checkpoint that lacks weights is refused."""
    config = base.body_config
    try:
        precision = dtype if dtype == "auto" else getattr(torch, dtype)
        with quiet_loading():
            model, info = auto_class(config).from_pretrained(
                base.id, config=deepcopy(config), **{DTYPE: precision}, output_loading_info=True, **options
            )
    except TypeError as error:
        raise NSCError(
            f"transformers and the library of weights {weights} do not fit: update both ({error})"
        ) from error
    except Exception as error:  # whatever config and weights lead transformers to
        cause = one_line(error)
        raise NSCError(f"base {base.id!r} cannot be loaded by transformers' AutoModel: {cause}; mend it") from error
    lost = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # behind all that is measured
    if lost:
        raise NSCError(
            f"base {base.id!r} has no weights for {', '.join(lost[:3])}{' and more' * (len(lost) > 3)}: transformers"
            " would fill them at random; fetch the base again, or give the model that its config describes"
        )
    return model


def load_tokenizer(base: Base) -> Any:
    """Load the base's own tokenizer.

    Args:
        base: whose tokenizer.

    Returns:
        What ``AutoTokenizer`` loads.

    Raises:
        NSCError: if there is none.
    """
    return _load_beside(AutoTokenizer.from_pretrained, base, "tokenizer")


def load_image_processor(base: Base) -> Any:
    """Load the base's own image processor.

    Args:
        base: whose image processor.

    Returns:
        What ``AutoImageProcessor`` loads.

    Raises:
        NSCError: if there is none.
    """
    return _load_beside(
        AutoImageProcessor.from_pretrained, base, "image processor", where=" (preprocessor_config.json)"
    )


def load_processor(base: Base) -> Any:
    """Load the base's own processor of images with text.

    Args:
        base: whose processor.

    Returns:
        What ``AutoProcessor`` loads.

    Raises:
        NSCError: if there is none.
    """
    return _load_beside(AutoProcessor.from_pretrained, base, "processor")


def _load_beside(load: Callable[[str], Any], base: Base, what: str, where: str = "") -> Any:
    """What lies beside the weights of a base, or one error for all reasons why it does not."""
    try:
        with quiet_loading():
            return load(base.id)
    except Exception as error:  # whatever its files lead transformers and tokenizers to
        cause = one_line(error)
        raise NSCError(f"base {base.id!r} has no {what} that transformers can load{where}: {cause}") from error
