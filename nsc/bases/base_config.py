"""What a base's config says, without its weights: its body, what that takes, what is tied."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig

from nsc.bases.llava import require_llava, takes_images_and_text
from nsc.errors import NSCError

IMAGES_AND_TEXT = "input_ids with pixel_values"


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
