"""The base model as one object: where it lies, what its config says, and its body, whose weights are loaded on demand.

No model is known by name here. The body is what ``AutoModel`` gives: no LM head, nothing after the last block's norm.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
)
from transformers.utils import logging

from nsc.bases.conv1d import run_as_linears
from nsc.bases.llava import ImageTextBody, is_llava
from nsc.errors import NSCError, one_line, reading

MOST = 1_000_000  # layers, heads, labels... of a model
IMAGES_AND_TEXT = "input_ids with pixel_values"


@dataclass(frozen=True)
class Base:
    """A base model, of which nothing is read before it is asked for, and nothing twice.

    Attributes:
        id: folder or Hub id.
        loaded: the body with weights, as ``nsc.bases.loading.load`` puts it here; None while shapes are enough.
    """

    id: str
    loaded: nn.Module | None = field(default=None, compare=False)

    @cached_property
    def config(self) -> Any:
        """The whole config, as transformers reads it.

        Raises:
            NSCError: if there is no such base.
        """
        _refuse_endless(Path(self.id) / "config.json")
        try:
            return AutoConfig.from_pretrained(self.id, trust_remote_code=False)
        except Exception as error:  # whatever a config leads transformers to
            refuse_code(self.id, error)
            raise NSCError(
                f"base {self.id!r} cannot be loaded by transformers' AutoModel: {one_line(error)}; mend its config.json"
            ) from error

    @property
    def has_two_towers(self) -> bool:
        """Whether texts and images are embedded side by side (CLIP, SigLIP); LLaVA's images enter its text."""
        features = ("get_text_features", "get_image_features")
        return hasattr(self.config, "vision_config") and all(
            hasattr(_body_class(self.config), name) for name in features
        )

    @property
    def body_config(self) -> Any:
        """The config of the body: the base's own, or its image tower's where the base has two towers."""
        return self.config.vision_config if self.has_two_towers else self.config

    @cached_property
    def takes(self) -> str:
        """What the body's forward takes first: input_ids, pixel_values..., or IMAGES_AND_TEXT for LLaVA's structure.

        Raises:
            NSCError: if transformers has no body for this config.
        """
        config = self.body_config
        if is_llava(config):
            return IMAGES_AND_TEXT
        body = _body_class(config)
        if body is None:
            raise NSCError(
                f"base {self.id!r} cannot be loaded by transformers' AutoModel: it has none for {config.model_type}"
            )
        return body.main_input_name

    @cached_property
    def tied_outputs(self) -> list[str]:
        """Parameters outside the body that are the body's embeddings themselves, such as "lm_head.weight"."""
        inner = self.config.get_text_config()
        if not any(getattr(c, "tie_word_embeddings", False) for c in (self.config, inner)):
            return []
        causal = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(inner), None)
        if causal is None:  # transformers 4 says of every config that it ties, also of an image model's
            return []
        return list(getattr(causal, "_tied_weights_keys", None) or ["lm_head.weight"])

    @cached_property
    def blank(self) -> Any:
        """The body as transformers itself builds and names it, without weights: on the meta device.

        Raises:
            NSCError: if transformers cannot build it.
        """
        config = self.body_config
        try:
            with quiet_loading(), torch.device("meta"):
                return auto_class(config).from_config(deepcopy(config), trust_remote_code=False)
        except Exception as error:  # whatever a config leads transformers to
            refuse_code(self.id, error)
            raise NSCError(f"base {self.id!r} cannot be built by transformers' AutoModel: {one_line(error)}") from error

    @cached_property
    def generating(self) -> Any:
        """The whole model that generates tokens, without weights: on the meta device; None if there is none."""
        kind, auto = type(self.config), AutoModelForCausalLM
        if kind in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
            auto = AutoModelForImageTextToText
        elif getattr(self.config, "is_encoder_decoder", False):
            auto = AutoModelForSeq2SeqLM
        try:
            with quiet_loading(), torch.device("meta"):
                return auto.from_config(deepcopy(self.config), trust_remote_code=False)
        except (ValueError, ImportError):
            return None

    @cached_property
    def output_layers(self) -> dict[str, nn.Linear]:
        """The layer behind the body by which the base names its next token, by its name and without weights.

        Empty where it is one with the embeddings, or there is none.
        """
        head = self.generating and self.generating.get_output_embeddings()
        if self.tied_outputs or not isinstance(head, nn.Linear):
            return {}
        if head.weight is self.generating.get_input_embeddings().weight:
            return {}
        return {name: head for name, module in self.generating.named_modules() if module is head}

    @cached_property
    def model(self) -> nn.Module:
        """The body: with weights where they were loaded, else on the meta device, for its layers' names and shapes.

        Raises:
            NSCError: if transformers cannot build it.
        """
        if self.loaded is not None:
            return self.loaded
        run_as_linears(self.blank)
        return ImageTextBody(self.blank) if is_llava(self.body_config) else self.blank


def _refuse_endless(file: Path) -> None:
    """Raise NSCError for a config.json that is none, or by which transformers would list layers without end."""
    if not os.path.isfile(file):
        return
    with reading(f"base config {file}", "mend it"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it holds no JSON object")
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for key, value in (item for part in parts for item in part.items()):
        if isinstance(value, int) and value > MOST and key.startswith(("num_", "n_", "depth")):
            raise NSCError(f"base config {file}: {key} is above {MOST}, as in no model; mend it")


def rope_misread_by_4(config: Mapping[str, Any]) -> list[str]:
    """Find what transformers 4 would not see of a config's rotary embedding, for which it takes its own defaults.

    Args:
        config: config.json, in which transformers 5 says all of it under rope_parameters.

    Returns:
        Names such as rope_theta: of values that are no default of the class, and that nothing else in the config tells.
    """
    lost: list[str] = []
    for part in (config, *(value for value in config.values() if isinstance(value, dict) and "model_type" in value)):
        rope, scaling = part.get("rope_parameters"), part.get("rope_scaling") or {}
        if isinstance(rope, dict):
            usual = _usual_rope(str(part.get("model_type")))
            lost += [k for k, x in rope.items() if x not in (usual.get(k), part.get(k), scaling.get(k))]
    return lost


def _usual_rope(model_type: str) -> dict[str, Any]:
    """The rotary embedding of a class where its config says nothing of it."""
    try:
        config = AutoConfig.for_model(model_type)
    except ValueError:
        return {}
    return getattr(config, "rope_parameters", None) or {"rope_theta": getattr(config, "rope_theta", None)}


def auto_class(config: Any) -> Any:
    """Return AutoModel, or for images with text in transformers 4, whose body is the whole model, its own auto class.

    Args:
        config: config of the body.

    Returns:
        The class whose ``from_pretrained`` and ``from_config`` give the body.
    """
    mapped = type(config) in transformers.MODEL_MAPPING
    return AutoModel if mapped or not hasattr(config, "vision_config") else AutoModelForImageTextToText


def refuse_code(base: str, error: Exception) -> None:
    """Say in one sentence that a base would run code of its own, where that is why transformers loads nothing.

    Args:
        base: id of the base.
        error: of transformers, to which trust_remote_code=False was given.

    Raises:
        NSCError: if that is the reason.
    """
    if "trust_remote_code" in str(error):
        raise NSCError(
            f"base {base!r} brings Python code of its own (auto_map), which nsc never runs: give a base whose class"
            " transformers has, or a copy of it that was converted to one"
        ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence transformers' bars and reports: a body leaves the head of its checkpoint unused, and that is meant.

    Yields:
        Nothing; verbosity and bars are as before afterwards.
    """
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _body_class(config: Any) -> Any:
    """The class of the body of a config; None if there is none."""
    mappings = (transformers.MODEL_MAPPING, transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
    body = next((mapping[type(config)] for mapping in mappings if type(config) in mapping), None)
    return body[0] if isinstance(body, (list, tuple)) else body
