"""The fields of adapter_config.json that are read, with the types and ranges that they must have."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nsc.checks import expected, typed

NAMES = str | list[str] | None
FIELDS: dict[str, Any] = {
    "peft_type": str | None,
    "task_type": str | None,
    "base_model_name_or_path": str | None,
    "r": int,
    "lora_alpha": float,
    "use_rslora": bool | None,
    "rank_pattern": dict[str, int] | None,
    "alpha_pattern": dict[str, float] | None,
    "target_modules": NAMES,
    "exclude_modules": NAMES,
    "modules_to_save": list[str] | None,
    "layers_to_transform": int | list[int] | None,
    "layers_pattern": NAMES,
    "target_parameters": list[str] | None,
    "bias": str | None,
    "init_lora_weights": bool | str | None,
    "fan_in_fan_out": bool | None,
    "save_projection": bool | None,
}


def wrong_field(config: Mapping[str, Any]) -> str | None:
    """Find a field of a type or size that PEFT would not read either.

    Args:
        config: adapter_config.json.

    Returns:
        What is wrong with the first such field, in words; None where all are sound.
    """
    for field, kind in FIELDS.items():
        if field not in config:
            continue
        try:
            value = typed(config[field], kind)
        except TypeError:
            return f"{field} must be {expected(kind)}"
        ranks = [value] if field == "r" else list((value or {}).values()) if field == "rank_pattern" else []
        if any(not 1 <= rank < 2**31 for rank in ranks):
            return f"{field} must be 1 or more"
        alphas = [value] if field == "lora_alpha" else list((value or {}).values()) if field == "alpha_pattern" else []
        if not all(map(math.isfinite, alphas)):
            return f"{field} must be finite"
    return None
