"""Weights of a base into memory, as transformers loads them; its tokenizer and processors."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoProcessor, AutoTokenizer

from nsc.bases.base_model import Base, auto_class, quiet_loading, refuse_code
from nsc.bases.codes import WRITTEN, Codes, dtype_of, quantization_settings
from nsc.bases.conv1d import run_as_linears
from nsc.bases.llava import ImageTextBody, is_llava
from nsc.bases.weights import has_safetensors, require_own_files, spelled_out, stored_tensors
from nsc.errors import NSCError, one_line
from nsc.paths import lfs_remedy
from nsc.runtime.placement import one_device, reload_in_backward
from nsc.runtime.quantization import dequantise_where_used, quantization_config

FULL_PRECISION = "give the full-precision model that it was made from as base (--set weights=nf4 loads it in 4 bits)"
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
    require_own_files(base)
    model = _with_weights(base, dtype, weights, options)
    if weights == "full":
        _require_numbers(base, model)
    run_as_linears(model)
    if is_llava(base.body_config):
        model = ImageTextBody(model)
    if getattr(model.config, "is_encoder_decoder", False) and base.takes == "input_ids":
        model.register_forward_pre_hook(_feed_decoder, with_kwargs=True)
    model.config.use_cache = False  # type: ignore[union-attr]  # nothing is generated: a key-value cache would only hold memory
    model.requires_grad_(False).eval()
    if device_map:
        reload_in_backward(model)
    if weights != "full":
        if any(parameter.is_meta for parameter in model.parameters()):
            raise NSCError(f"weights {weights} do not go with offloading, as device_map {device_map} does: give one")
        dequantise_where_used(model)
    return model if options else model.to(place)


def _require_numbers(base: Base, model: nn.Module) -> None:
    """Refuse linears that transformers left as codes, whose dtype would be taken for that of the adapters."""
    for name, linear in model.named_modules():
        weight = getattr(linear, "weight", None) if isinstance(linear, nn.Linear) else None
        if weight is not None and (type(weight) is not nn.Parameter or weight.dtype not in WRITTEN):
            raise NSCError(
                f"transformers loads layer {name} of base {base.id!r} as codes ({type(weight).__name__},"
                f" {weight.dtype}), on which nothing is learned: {FULL_PRECISION}"
            )


def _with_weights(base: Base, dtype: str, weights: str, options: dict[str, Any]) -> nn.Module:
    """What AutoModel loads; a checkpoint that lacks weights is refused."""
    config = deepcopy(base.body_config)
    settings, numbers = quantization_settings(base.config), _numbers(base)
    try:
        options |= {DTYPE: dtype if dtype == "auto" else getattr(torch, dtype), "output_loading_info": True}
        with quiet_loading():
            if numbers is None:
                model, info = auto_class(config).from_pretrained(
                    base.id, config=config, trust_remote_code=False, **options
                )
            else:
                model, info = _from_numbers(config, numbers, options)
    except TypeError as error:
        what = f"weights {weights}" if not settings else f"{settings.get('quant_method')}, or {FULL_PRECISION}"
        raise NSCError(f"transformers and the library of {what} do not fit: update both ({error})") from error
    except NSCError:
        raise
    except Exception as error:  # whatever config and weights lead transformers to
        refuse_code(base.id, error)
        remedy = f"; its weights are codes ({settings.get('quant_method')}): {FULL_PRECISION}" if settings else ""
        pointers = (f"{shard}: {why}" for shard in Path(base.id).glob("*.safetensors") if (why := lfs_remedy(shard)))
        cause = next(pointers, f"{one_line(error)}{remedy}")
        raise NSCError(f"base {base.id!r} cannot be loaded by transformers' AutoModel: {cause}") from error
    lost = sorted(key for key in info["missing_keys"] if "pooler" not in key)  # behind all that is measured
    if lost:
        raise NSCError(
            f"base {base.id!r} has no weights for {', '.join(lost[:3])}{' and more' * (len(lost) > 3)}: transformers"
            " would fill them at random; fetch the base again, or give the model that its config describes"
        )
    return model


def _feed_decoder(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Let the decoder read the text that the encoder reads, one token later, as BART does where nothing is given."""
    if "decoder_input_ids" in kwargs:
        return args, kwargs
    config, ids = model.config, kwargs["input_ids"]
    known = [getattr(config, f"{name}_token_id", None) for name in ("decoder_start", "bos", "pad")]
    start = next((token for token in known if token is not None), 0)
    return args, {**kwargs, "decoder_input_ids": torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)}


def _numbers(base: Base) -> dict[str, Tensor] | None:
    """All tensors of a checkpoint that stores FP8 codes, as the numbers that they stand for; None for other ones.

    transformers leaves FP8 in codes on GPUs that can multiply them; elsewhere it takes the sizes of blocks from the
    number of scales, and gives layers the dtype of their scales.
    """
    settings = quantization_settings(base.config)
    if not (settings or has_safetensors(base)):
        return None
    try:
        codes = Codes(stored_tensors(base), base.config)
    except NSCError:
        return None  # of which transformers has its own to say
    left = codes.left_over()
    if left and not settings:
        raise NSCError(
            f"base {base.id!r} stores {left} in {codes.stored[left].dtype}, and its config does not say what these"
            f" codes stand for: {FULL_PRECISION}"
        )
    return None if left or not codes.scales else spelled_out(codes)


def _from_numbers(config: Any, numbers: dict[str, Tensor], options: dict[str, Any]) -> Any:
    """What AutoModel would load of these tensors, and the info on what it lacks."""
    for part in (config, config.get_text_config()):
        if hasattr(part, "quantization_config"):
            del part.quantization_config
    with torch.device("meta"):
        kind: Any = type(auto_class(config).from_config(deepcopy(config), trust_remote_code=False))
    if options[DTYPE] == "auto":
        options = {**options, DTYPE: dtype_of(config)}
    return kind.from_pretrained(None, config=config, state_dict=numbers, **options)


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


def _load_beside(load: Callable[..., Any], base: Base, what: str, where: str = "") -> Any:
    """What lies beside the weights of a base, or one error for all reasons why it does not."""
    try:
        with quiet_loading():
            return load(base.id, trust_remote_code=False)
    except Exception as error:  # whatever its files lead transformers and tokenizers to
        refuse_code(base.id, error)
        cause = one_line(error)
        raise NSCError(f"base {base.id!r} has no {what} that transformers can load{where}: {cause}") from error
