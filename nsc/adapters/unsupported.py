"""What nsc refuses, by name: PEFT settings and tensors that mean more than plain LoRA or VeRA on a linear layer."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from nsc.adapters.target_parameters import INNER
from nsc.adapters.targets import is_targeted, narrowed
from nsc.errors import clipped

PREFIX = "base_model.model."
LORA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
VERA_KEY = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.vera_lambda_(?P<side>[bd])(?:\.[^.]+)?")
VERA_SHARED = re.compile(r"(?:base_model\.)?vera_(?P<side>[AB])(?:\.[^.]+)?")
# Config fields that do not change the update, or that the reader takes into account.
# fmt: off
UNDERSTOOD = frozenset({
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core", "modules_to_save", "peft_type",
    "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "runtime_config", "target_modules",
    "target_parameters", "task_type", "use_rslora",
})
VERA_UNDERSTOOD = frozenset({
    "auto_mapping", "base_model_name_or_path", "bias", "d_initial", "fan_in_fan_out", "inference_mode", "init_weights",
    "layers_pattern", "layers_to_transform", "modules_to_save", "peft_type", "peft_version", "projection_prng_key", "r",
    "revision", "save_projection", "target_modules", "task_type", "vera_dropout",
})
# fmt: on
REFUSED_FIELDS = {
    "use_dora": "DoRA: the update depends on the norm of the base weight; retrain with use_dora=False",
    "lora_bias": "lora_bias: lora_B has a bias; retrain with lora_bias=False",
    "trainable_token_indices": "trainable tokens: rows of the embedding were trained; retrain without them",
    "alora_invocation_tokens": "aLoRA: the update applies to some positions only; retrain as plain LoRA",
    "layer_replication": "layer_replication: trained on a model with repeated layers; use that model as base",
    "use_qalora": "QALoRA: the input is pooled before lora_A; retrain with use_qalora=False",
    "use_bdlora": "BD-LoRA: block-diagonal factors; expand them to dense factors first",
    "arrow_config": "Arrow: a router over several adapters; give the routed adapters themselves",
    "kasa_config": "KaSA: it truncates the base weight and puts a diagonal between B and A; retrain as plain LoRA",
    "velora_config": "VeLoRA: a variant with compressed activations; save the adapter with velora_config=None",
    "monteclora_config": "MonteCLoRA: the update is sampled; retrain as plain LoRA",
    "megatron_config": "megatron: the factors belong to parallel linear layers; save them for transformers first",
    "ensure_weight_tying": "ensure_weight_tying: tied embeddings were trained; retrain with ensure_weight_tying=False",
}
# PEFT resets init_lora_weights to true when it converts such an adapter, so these still apply to a changed base.
REBASING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
HARMLESS_INITS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
REFUSED_TENSORS = {
    r"\.lora_magnitude_vector\b": "DoRA magnitudes",
    r"\.lora_[AB](\.[^.]+)?\.bias$": "lora_bias",
    r"\.lora_embedding_[AB]\b": "embedding LoRA",
    r"\.trainable_tokens_": "trainable tokens",
    r"\.base_layer\.(.*\.)?lora_": "LoRA on parameters that no target_parameters of its config names",
    r"\.lora_diag\b": "KaSA diagonal",
    r"\.lora_monteclora_": "MonteCLoRA sampler",
    r"\.bias$": "trained bias",
    r"(^|\.)(embed_tokens|lm_head|wte|word_embeddings)\.weight$": "embeddings saved outside modules_to_save",
}
NO_PROJECTION = (
    "save_projection=False: A and B are not in the checkpoint, and drawn again they need not be the same on another"
    " system; where it was trained, load it with PEFT and add base_model.vera_A['default'] and vera_B['default'] to"
    " adapter_model.safetensors as base_model.vera_A and base_model.vera_B, with save_projection=True in its config"
)
HEADS_BY_TASK = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def unsupported(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """List every feature of an adapter that cannot be merged.

    Args:
        config: adapter_config.json.
        tensors: the checkpoint as stored.

    Returns:
        One line per feature; empty for plain LoRA or VeRA on linear layers.
    """
    if config.get("peft_type") not in ("LORA", "VERA"):
        return [f"peft_type={config.get('peft_type')!r}: its update is not made of LoRA factors; retrain with LoRA"]
    found = [f"{reason} ({field} is set)" for field, reason in REFUSED_FIELDS.items() if config.get(field)]
    saved = config.get("save_projection", True) and any(map(VERA_SHARED.fullmatch, tensors))
    if config["peft_type"] == "VERA" and not saved:
        found.append(NO_PROJECTION)
    found += _by_value(config) + _unknown_fields(config) + _by_tensor(config, tensors) + _doubled(config, tensors)
    return found + _untargeted(config, tensors)


def saved_name(key: str, config: Mapping[str, Any]) -> str | None:
    """Return the name of a modules_to_save tensor relative to the model.

    ``base_model.model.score.modules_to_save.default.weight`` is ``score.weight``.

    Args:
        key: key in the checkpoint.
        config: adapter_config.json.

    Returns:
        The name, or None for any other tensor.
    """
    if any(part.startswith(("lora_", "vera_", "trainable_tokens_")) for part in key.split(".")):
        return None
    name = re.sub(r"\.modules_to_save\.[^.]+\.", ".", key.removeprefix(PREFIX)).replace(".original_module.", ".")
    # PEFT adds the task's head whether or not its older configs mention it, and matches by the end of the name.
    heads = tuple(config.get("modules_to_save") or ()) + HEADS_BY_TASK.get(config.get("task_type") or "", ())
    parents = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
    return name if heads and any(parent.endswith(heads) for parent in parents) else None


def _by_value(config: Mapping[str, Any]) -> list[str]:
    """Settings that are refused for some of their values."""
    found = []
    if (bias := config.get("bias") or "none") != "none":
        found.append(f"trained bias (bias={bias!r}): the base's biases were changed; retrain with bias='none'")
    init = config.get("init_lora_weights")
    init = init.lower() if isinstance(init, str) else init
    if isinstance(init, str) and init.startswith(REBASING_INITS):
        remedy = "save it again with PEFT's path_initial_model_for_weight_conversion"
        found.append(f"init_lora_weights={init!r}: the update applies to a base that this init changed; {remedy}")
    elif init not in HARMLESS_INITS:
        found.append(f"init_lora_weights={init!r}: unknown to this version of nsc; retrain with a known one")
    return found


def _unknown_fields(config: Mapping[str, Any]) -> list[str]:
    """Fields that are set and newer than this code: they may change the update."""
    known = (VERA_UNDERSTOOD if config["peft_type"] == "VERA" else UNDERSTOOD) | REFUSED_FIELDS.keys()
    unknown = [field for field, value in config.items() if value and field not in known]
    return [
        f"{field}={clipped(repr(config[field]), 80)}: a setting unknown to this version of nsc" for field in unknown
    ]


def _by_tensor(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[str]:
    """Tensors that are neither factors nor in modules_to_save: one line a kind, with the first name."""
    kinds: dict[str, list[str]] = {}
    vera = config["peft_type"] == "VERA"
    for key, tensor in tensors.items():
        known = VERA_KEY.fullmatch(key) or VERA_SHARED.fullmatch(key) if vera else LORA_KEY.fullmatch(key)
        plain = key.replace(INNER, "") if config.get("target_parameters") else key
        if saved_name(key, config) is None and (kind := _refused_kind(plain, tensor.ndim, bool(known))):
            kinds.setdefault(kind, []).append(key)
    return [f"{kind}: '{keys[0]}'" + f" and {len(keys) - 1} more" * (len(keys) > 1) for kind, keys in kinds.items()]


def _untargeted(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Modules that carry factors, but not by the adapter's own config: PEFT leaves them out when it loads them.

    Where the targets name none of the modules, they are those of another version of transformers, and say nothing.
    """
    if not config.get("target_modules") or config.get("target_parameters"):
        return []
    matches = (LORA_KEY.fullmatch(key) or VERA_KEY.fullmatch(key) for key in tensors)
    modules = dict.fromkeys(match["module"] for match in matches if match)
    try:
        outside = [module for module in modules if not is_targeted(config, module)]
    except (ValueError, TypeError, re.error) as error:
        return [f"target_modules, exclude_modules and their like cannot be read ({error}); correct adapter_config.json"]
    if not outside or (len(outside) == len(modules) and not narrowed(config)):
        return []
    return [
        f"factors of '{outside[0]}'"
        + f" and {len(outside) - 1} more" * (len(outside) > 1)
        + ", which its own config does not target (target_modules, exclude_modules, layers_to_transform): PEFT leaves"
        " them out; correct adapter_config.json, or take the tensors out"
    ]


def _doubled(config: Mapping[str, Any], tensors: Iterable[str]) -> list[str]:
    """Modules that carry factors and are saved whole as well: which of the two is the update?"""
    saved = {saved_name(key, config) for key in tensors}
    lora = {match["module"] for key in tensors if (match := LORA_KEY.fullmatch(key) or VERA_KEY.fullmatch(key))}
    doubled = sorted(module for module in lora if f"{module}.weight" in saved)
    return [f"LoRA on '{module}', which is also in modules_to_save; retrain with one of them" for module in doubled[:1]]


def _refused_kind(key: str, ndim: int, known: bool) -> str | None:
    kind = next((kind for pattern, kind in REFUSED_TENSORS.items() if re.search(pattern, key)), None)
    if kind or not known:
        return kind or "tensor of unknown kind"
    return {3: "Conv1d or fused expert LoRA (3-D)", 4: "Conv2d LoRA (4-D)", 5: "Conv3d LoRA (5-D)"}.get(ndim)
