"""LoRA factors from a checkpoint's tensors, with the scale that its config gives each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.patterns import pattern_matches
from nsc.adapters.peft_folder import CONFIG, Checkpoint
from nsc.adapters.target_parameters import unpacked, wrapped_parameters
from nsc.adapters.tensor_file import read
from nsc.adapters.unsupported import LORA_KEY, VERA_KEY, VERA_SHARED, saved_name
from nsc.bases.experts import layer_of
from nsc.errors import one_line

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LoraFactors:
    """The update ``scale * B @ A`` of one module.

    Attributes:
        A: (r, d), in the dtype it was stored in, over the mapped file; of VeRA in at least float32.
        B: (m, r), likewise.
        scale: s = alpha / r, or alpha / sqrt(r) for rsLoRA.
        wide: whether A has columns beyond the module's d, which only the base tells; ``narrowed`` removes them.
    """

    A: Tensor  # (r, d)
    B: Tensor  # (m, r)
    scale: float
    wide: bool = False

    @property
    def rank(self) -> int:
        """Rows of ``A``; the numerical rank may be smaller."""
        return self.A.shape[0]

    @property
    def is_zero(self) -> bool:
        """Whether the update is zero because a factor is: training starts there."""
        return self.scale == 0 or not read(self.A).any() or not read(self.B).any()

    def narrowed(self, d: int) -> LoraFactors:
        """Return the factors for a module with d inputs.

        Args:
            d: in_features of the module.

        Returns:
            The first d columns of a wide A; otherwise the same factors.
        """
        return replace(self, A=self.A[:, :d], wide=False) if self.wide else self


def read_factors(checkpoint: Checkpoint) -> dict[str, LoraFactors]:
    """Read the LoRA factors of a checkpoint, with their scales.

    Args:
        checkpoint: what ``load_checkpoint`` returned.

    Returns:
        Module name -> factors; on a parameter of experts, ``PARAMETER[expert]`` -> factors.

    Raises:
        AdapterError: naming the module or tensor at fault.
    """
    if checkpoint.config.get("peft_type") == "VERA":
        return _read_vera(checkpoint)
    pairs = _by_module(checkpoint, LORA_KEY)
    if not pairs:
        raise checkpoint.error("no lora_A / lora_B tensor in it; is it a LoRA adapter saved by PEFT?")
    try:
        parameters = wrapped_parameters(checkpoint.config, pairs)
    except ValueError as error:
        raise checkpoint.error(f"{error}; correct target_parameters, or save the adapter again") from error
    factors: dict[str, LoraFactors] = {}
    for module, pair in pairs.items():
        if module in parameters:
            factors |= _of_parameter(checkpoint, module, parameters[module], pair)
        else:
            factors[module] = _pair_up(checkpoint, module, pair)
    return factors


def read_saved(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Read the modules_to_save tensors of a checkpoint; ``original_module`` copies of the base's weights are left out.

    Args:
        checkpoint: what ``load_checkpoint`` returned.

    Returns:
        Tensor name relative to the model -> tensor.

    Raises:
        AdapterError: naming the tensor at fault.
    """
    saved: dict[str, Tensor] = {}
    for key, tensor in checkpoint.tensors.items():
        name = saved_name(key, checkpoint.config)
        if name is None or "original_module" in key.split("."):
            continue
        if name in saved:
            raise checkpoint.error(f"'{key}' is there under two adapter names; save one adapter a folder")
        floating = tensor.is_floating_point()
        # Cloned, since the tensors of safetensors are the file itself, and what is kept is written after the merge.
        saved[name] = (_checked(checkpoint, key, tensor, ndim=tensor.ndim) if floating else tensor).clone()
    return saved


def lora_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the scale of a module: ``alpha / rank``, or ``alpha / sqrt(rank)`` for rsLoRA, by ``alpha_pattern``.

    Args:
        config: adapter_config.json.
        module: name of the module.
        rank: rank of its factors.

    Returns:
        The scale.

    Raises:
        ValueError: if patterns with different alphas match. PEFT takes the first one but sorts them when it saves, so
            what it applies to a reloaded adapter need not be what was trained.
    """
    alphas = _matching(config.get("alpha_pattern"), module) or [config["lora_alpha"]]
    if len(set(alphas)) > 1:
        raise ValueError(f"several patterns match, with alpha {alphas}")
    return alphas[0] / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _matching(patterns: Mapping[str, float] | None, module: str) -> list[float]:
    """The values of the patterns that match, in order, by the rule of ``peft.utils.other.get_pattern_key``."""
    patterns = patterns or {}
    found = [value for pattern, value in patterns.items() if pattern_matches(rf"(.*\.)?({pattern})$", module)]
    return found or [value for pattern, value in patterns.items() if pattern == module]


def _by_module(checkpoint: Checkpoint, pattern: re.Pattern[str], ndim: int = 2) -> dict[str, dict[str, Tensor]]:
    """Module -> side -> the tensor whose key matches; the module is "" where the pattern has none."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in checkpoint.tensors.items():
        if match := pattern.fullmatch(key):
            sides = found.setdefault(match.groupdict().get("module", ""), {})
            if match["side"] in sides:
                raise checkpoint.error(f"'{key}' is there under two adapter names; save one adapter a folder")
            sides[match["side"]] = _checked(checkpoint, key, tensor, ndim)
    return found


def _read_vera(checkpoint: Checkpoint) -> dict[str, LoraFactors]:
    """lambda_d folded into A, which stays as wide as the widest module's, and lambda_b into the rows of B it scales."""
    shared = _by_module(checkpoint, VERA_SHARED).get("", {})
    if shared.keys() != {"A", "B"}:
        raise checkpoint.error("no vera_A and vera_B in it, as save_projection=True saves them")
    A, B = (shared[side].to(torch.promote_types(shared[side].dtype, torch.float32)) for side in "AB")
    rank, stated = len(A), checkpoint.config.get("r")
    if not rank == B.shape[1] == stated:
        shapes = f"vera_A {(*A.shape,)} and vera_B {(*B.shape,)}, while {CONFIG} says r = {stated}"
        raise checkpoint.error(f"the ranks disagree: {shapes}; save or copy the adapter again")
    factors = {}
    for module, scales in _by_module(checkpoint, VERA_KEY, ndim=1).items():
        if missing := {"b", "d"} - scales.keys():
            raise checkpoint.error(f"module '{module}' has no vera_lambda_{missing.pop()}; save the adapter again")
        b, d = scales["b"], scales["d"]
        if len(d) != rank or len(b) > len(B):
            shapes = f"vera_lambda_d {(*d.shape,)} and vera_lambda_b {(*b.shape,)}"
            raise checkpoint.error(f"module '{module}': {shapes} do not fit vera_A {(*A.shape,)}, vera_B {(*B.shape,)}")
        factors[module] = LoraFactors(d[:, None] * A, b[:, None] * B[: len(b)], 1.0, wide=True)
    if not factors:
        raise checkpoint.error("no vera_lambda_b / vera_lambda_d tensor in it; is it a VeRA adapter saved by PEFT?")
    return factors


def _of_parameter(
    checkpoint: Checkpoint, module: str, parameter: str, pair: dict[str, Tensor]
) -> dict[str, LoraFactors]:
    """The factors of each expert of a parameter, or those of the weight of a module."""
    A, B = _both(checkpoint, module, pair)
    rank = int(_stated_rank(checkpoint, parameter))
    if rank < 1 or len(A) % rank:
        rows = f"lora_A has {len(A)} rows, no multiple of the rank {rank} that {CONFIG} gives '{parameter}'"
        raise checkpoint.error(f"module '{module}': {rows}; correct r or rank_pattern")
    scale = lora_scale(checkpoint.config, parameter, rank)
    experts = [LoraFactors(a, b, scale) for a, b in unpacked(A, B, rank)]
    if len(experts) == 1 and parameter.endswith(".weight"):
        return {parameter.removesuffix(".weight"): experts[0]}
    return {layer_of(parameter, e): f for e, f in enumerate(experts)}


def _both(checkpoint: Checkpoint, module: str, pair: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A and B, where both are there and share a rank."""
    if missing := {"A", "B"} - pair.keys():
        raise checkpoint.error(f"module '{module}' has no lora_{missing.pop()}; save or copy the adapter again")
    A, B = pair["A"], pair["B"]
    if A.shape[0] != B.shape[1]:
        raise checkpoint.error(f"module '{module}': lora_A {(*A.shape,)} and lora_B {(*B.shape,)} do not share a rank")
    return A, B


def _pair_up(checkpoint: Checkpoint, module: str, pair: dict[str, Tensor]) -> LoraFactors:
    """Check that A and B belong together and agree with the config; the scale would be a guess otherwise."""
    A, B = _both(checkpoint, module, pair)
    rank = A.shape[0]
    if (stated := _stated_rank(checkpoint, module)) != rank:
        ambiguous = f"the tensors have rank {rank}, {CONFIG} says {stated}, so the scale alpha / r is ambiguous"
        raise checkpoint.error(f"module '{module}': {ambiguous}; correct r or rank_pattern")
    return LoraFactors(A, B, lora_scale(checkpoint.config, module, rank))


def _stated_rank(checkpoint: Checkpoint, module: str) -> float:
    """The rank that the config gives this module, after making sure that rank and scale can be computed at all."""
    try:
        rank = (_matching(checkpoint.config.get("rank_pattern"), module) or [checkpoint.config["r"]])[0]
        lora_scale(checkpoint.config, module, int(rank))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        unusable = f"{CONFIG} gives no usable rank and scale for module '{module}' ({one_line(error)})"
        raise checkpoint.error(f"{unusable}; correct r, lora_alpha, rank_pattern or alpha_pattern") from error
    return rank


def _checked(checkpoint: Checkpoint, key: str, tensor: Tensor, ndim: int = 2) -> Tensor:
    """The tensor itself, once it is a finite floating-point tensor of ``ndim`` dimensions."""
    if tensor.ndim != ndim:
        raise checkpoint.error(f"tensor '{key}' has shape {(*tensor.shape,)}; it must be {ndim}-D in a linear layer")
    if tensor.dtype not in DTYPES:
        raise checkpoint.error(f"tensor '{key}' is {tensor.dtype}; save the adapter in float16, bfloat16 or float32")
    if not read(tensor).isfinite().all():
        raise checkpoint.error(f"tensor '{key}' has NaN or infinity in it; its training diverged or it is damaged")
    return tensor
