"""Proof by reload: what stock PEFT and transformers read back from disk is what was merged in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from nsc.adapters.fused_layers import on_experts
from nsc.adapters.lora import Adapter, read_adapter
from nsc.adapters.stack import Stack
from nsc.adapters.tensor_file import TRIM_EVERY, read, trim_memory
from nsc.bases.base_model import Base
from nsc.bases.codes import Codes, quantization_settings
from nsc.bases.conv1d import as_stored, transposed_weights
from nsc.bases.experts import expert_of, fused_experts
from nsc.bases.loading import load_body
from nsc.bases.weights import codes_to_spell_out, expert_parts, merged_places, read_stored
from nsc.batch import Batch
from nsc.errors import AdapterError, NSCError, ProofError
from nsc.export.expected_merge import Merge, hidden_states
from nsc.export.parameters import part_updates
from nsc.export.peft_model import factors_by_peft, layers_of, loaded_by_peft, updates_of
from nsc.methods import LowRank
from nsc.recipes.updates import distance, norm

HEADS = "heads"  # the folder of what each task keeps for itself
WEIGHT_TOLERANCE = 1e-5  # float32 files against float64 products, relative to the largest entry
NUMBERS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # no update is added in another dtype
OUTPUT_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Proof:
    """What was compared, with relative errors: of weights to each update's largest entry, of outputs to their norm.

    Attributes:
        what: "adapter" or "full model".
        modules: how many were loaded back.
        weights: largest error of a weight.
        outputs: error of the hidden states; None where no base was at hand.
        effect: how far the merge itself moves the hidden states of the base; None where no base was at hand.
        lost: the most that a truncation left out of an update's norm; the truncated merge is what was compared.
        unfed: why outputs were not compared.
    """

    what: str
    modules: int
    weights: float
    outputs: float | None = None
    effect: float | None = None
    lost: float = 0.0
    unfed: str = "no base loaded"

    def __str__(self) -> str:
        truncated = f"truncated (up to {self.lost:.1%} of an update's norm left out), " if self.lost >= 5e-4 else ""
        line = f"{self.what}: {self.modules} modules reloaded, {truncated}weights agree to {self.weights:.1e}"
        if self.outputs is None:
            return f"{line} ({self.unfed}: outputs not compared)"
        return f"{line}, hidden states to {self.outputs:.1e} (the merge itself moves them by {self.effect:.1e})"


def prove_complete(adapters: Mapping[str, Adapter], stack: Stack) -> None:
    """Count the tensors of adapters: each must be merged, or kept for its own task.

    Args:
        adapters: task -> adapter, with what its task keeps.
        stack: what is merged.

    Raises:
        ProofError: naming the adapter, if one is in neither.
    """
    for task, adapter in adapters.items():
        k = stack.tasks.index(task)
        factors = sum(module.present[k] for module in stack.modules.values())
        dense = [layer for layer in stack.dense.values() if layer.present[k]]
        whole = len(dense) + sum(layer.bias_deltas is not None for layer in dense)
        if (factors, whole + len(adapter.saved)) != (len(adapter.factors), len(adapter.given)):
            raise ProofError(
                f"adapter {task} holds factors of {len(adapter.factors)} modules and {len(adapter.given)} tensors of"
                f" modules_to_save, but {factors} and {whole} are merged and {len(adapter.saved)} kept; do not use it"
            )


def prove_heads(folder: Path, adapters: Mapping[str, Adapter]) -> None:
    """Read back what tasks keep for themselves: bit for bit what their adapters held when they were read.

    Args:
        folder: folder the merge was written to.
        adapters: task -> adapter, with what its task keeps.

    Raises:
        ProofError: if something is missing, extra or different.
    """
    kept = {f"{task}.safetensors": adapter.saved for task, adapter in adapters.items() if adapter.saved}
    _same_names({file.name for file in (folder / HEADS).glob("*")}, set(kept), HEADS)
    for name, tensors in kept.items():
        try:
            written = load_file(folder / HEADS / name)
        except (SafetensorError, OSError) as error:
            raise ProofError(f"{HEADS}/{name} cannot be read back from {folder}: {error}") from error
        _same_names(set(written), set(tensors), f"{HEADS}/{name}")
        for key, tensor in tensors.items():
            same = written[key].dtype == tensor.dtype and written[key].shape == tensor.shape
            if not (same and torch.equal(_bits(written[key]), _bits(tensor))):
                raise ProofError(f"{key} read back from {HEADS}/{name} is not what the adapter held; do not use it")


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def prove_files(folder: Path, merge: Merge, base: Base) -> Proof:
    """Read the adapter back without weights of a model: every update must be there, and nothing else.

    Stock PEFT loads it, too, onto a class of transformers without weights, where the base's config can be read.

    Args:
        folder: folder the adapter was written to.
        merge: what should be there.
        base: the base; its weights need not be loaded.

    Returns:
        What was compared: weights alone.

    Raises:
        ProofError: if something is missing, extra or different.
    """
    try:
        stored = read_adapter(folder, "merged")
    except AdapterError as error:
        raise ProofError(f"the merged adapter cannot be read back: {error}") from error
    in_file = {name.removeprefix(merge.prefix): f for name, f in stored.factors.items()}
    if any(map(expert_of, in_file)):
        stored = on_experts({"merged": stored}, base.model)["merged"]
    written = {name.removeprefix(merge.prefix): f for name, f in stored.factors.items()}
    _same_names(_without_idle(written, merge), set(merge.factors), "the adapter file")
    whole = {name.removeprefix(merge.prefix): tensor for name, tensor in stored.saved.items()}
    updates = ((name, LowRank(f.scale * read(f.B).double(), read(f.A))) for name, f in written.items())
    worst = max(_worst_update(updates, merge), _worst_whole(whole, merge))
    if not _has_config(base):
        return Proof("adapter", len(merge.names), worst, unfed="no base at hand, onto which PEFT could load it")
    with loaded_by_peft(folder, merge, base) as (layers, loaded):
        there = factors_by_peft(layers)
        _same_names(set(there), set(in_file), "PEFT's model")
        for name, f in in_file.items():
            A, B, scale = there[name]
            if not (torch.equal(A, read(f.A)) and torch.equal(B, read(f.B)) and math.isclose(scale, f.scale)):
                raise ProofError(f"PEFT loads other factors of {name} than there are in {folder}; do not use it")
        return Proof("adapter", len(merge.names), max(worst, _worst_whole(loaded, merge)))


def prove_adapter(folder: Path, merge: Merge, base: Base, batch: Batch) -> Proof:
    """Load the folder with stock PEFT onto the base: its updates and hidden states must be those in memory.

    Args:
        folder: folder the adapter was written to.
        merge: what should be there.
        base: with its body in full precision, which is left as it was.
        batch: rows on the body's device.

    Returns:
        What was compared.

    Raises:
        ProofError: if something is missing, extra or different.
    """
    model = base.model
    in_memory = merge.hidden_states(model, batch)
    bare = hidden_states(model, batch)
    fused = fused_experts(model)
    with as_stored(model), loaded_by_peft(folder, merge, base) as (layers, whole):
        held = {name: layers_of(name, layer, fused) for name, layer in layers.items()}
        _same_names(_without_idle(chain(*held.values()), merge), set(merge.factors), "PEFT's model")
        updates = updates_of(layers, held, fused)
        weights = max(_worst_update(updates, merge), _worst_whole(whole, merge, _dtype(model)))
        outputs = hidden_states(model, batch)
    return _proof("adapter", len(merge.names), weights, in_memory, outputs, bare, _dtype(model))


def prove_full_model(
    folder: Path, merge: Merge, base: Base, model: nn.Module | None = None, batch: Batch | None = None
) -> Proof:
    """Compare every tensor with the base's files, then load the folder with transformers and compare hidden states.

    Merged layers must be base plus update, rounded once to the file's dtype; all others equal the base bit for bit.

    Args:
        folder: folder the model was written to.
        merge: what should be there.
        base: whose checkpoint was copied.
        model: body of the base in full precision; None leaves hidden states out.
        batch: rows on the model's device; None leaves hidden states out.

    Returns:
        What was compared.

    Raises:
        ProofError: if something is missing, extra or different, or cannot be loaded.
    """
    weights, coarsest = _worst_tensor(folder, base, merge)
    if model is None or batch is None:
        return Proof("full model", len(merge.names), weights)
    by_router = any(map(expert_of, merge.names)) and not merge.merged.whole
    in_memory = merge.rounded_states(model, batch, coarsest) if by_router else merge.hidden_states(model, batch)
    bare = hidden_states(model, batch)
    try:
        loaded = load_body(Base(str(folder)), str(_dtype(model)).removeprefix("torch."), str(batch.weight.device))
    except NSCError as error:
        raise ProofError(f"transformers cannot load what was written to {folder}: {error}") from error
    outputs = hidden_states(loaded, batch)
    return _proof("full model", len(merge.names), weights, in_memory, outputs, bare, _dtype(model), coarsest)


def _worst_tensor(folder: Path, base: Base, merge: Merge) -> tuple[float, torch.dtype]:
    """Largest error of a written tensor, relative to its largest entry, and the coarsest dtype of a merged one."""
    shards, places = merged_places(base, merge.names)
    parts = expert_parts(base, merge.names)
    codes, turned = codes_to_spell_out(base, [*places, *parts]), transposed_weights(base.model)
    if codes and quantization_settings(Base(str(folder)).config):
        raise ProofError(f"the weights written to {folder} are numbers, but its config still speaks of codes")
    worst, dtypes = 0.0, set()
    for shard in shards:
        try:
            with safe_open(shard, framework="pt") as before, safe_open(folder / shard.name, framework="pt") as after:
                keys = set(before.keys()) - (codes.dropped if codes else set())
                _same_names(set(after.keys()), keys, shard.name)
                for key in keys:
                    written, stored, dtype = after.get_tensor(key), before.get_tensor(key), None
                    update = merge.update(places[key]) if key in places else None
                    update = update.T if update is not None and places[key] in turned else update
                    if codes and key in codes.scales:
                        stored, dtype = _numbers(codes, key, stored), codes.dtype
                        update = torch.zeros(()) if update is None else update
                    here = parts.get(key, ()) if written.shape == stored.shape else ()
                    for at, rows in part_updates(merge.merged, here):
                        worst = max(worst, _tensor_error(key, written[at], stored[at], rows, dtype or stored.dtype))
                        stored[at].copy_(written[at])  # what is left of the tensor must be as it was
                        dtypes.add(written.dtype)
                    worst = max(worst, _tensor_error(key, written, stored, update, dtype or stored.dtype))
                    if key in places and update is not None:
                        dtypes.add(written.dtype)
        except (SafetensorError, OSError) as error:
            raise ProofError(f"{shard.name} cannot be read back from {folder}: {error}") from error
    return worst, max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _numbers(codes: Codes, key: str, stored: Tensor) -> Tensor:
    """What the FP8 codes of a weight stand for, in float64: one scale after another, unlike the writer."""
    numbers, scale = stored.double(), codes.scales[key]
    factors = read_stored(codes.stored, [scale])[scale].double() if scale else torch.ones(1, dtype=torch.float64)
    if factors.numel() == 1:
        return numbers * factors.item()
    m, d = numbers.shape[-2:]
    grid = factors if factors.ndim == numbers.ndim else factors[..., None]
    rows, columns = (1, d) if grid.shape[-2:] == (m, 1) else codes.block or (m, d)
    place: Any
    for place in itertools.product(*map(range, grid.shape)):
        *which, i, j = place
        numbers[(*which, slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))] *= grid[place]
    return numbers


def _tensor_error(key: str, written: Tensor, stored: Tensor, update: Tensor | None, dtype: torch.dtype) -> float:
    """Relative to the largest entry; one rounding to the file's dtype is no error, nor is anything else allowed."""
    if written.dtype != dtype or written.shape != stored.shape:
        was, now = (f"{kind} {tuple(t.shape)}" for kind, t in ((dtype, stored), (written.dtype, written)))
        raise ProofError(f"{key} should be {was} and is {now} read back")
    if update is None:
        if not torch.equal(_bits(written), _bits(stored)):
            raise ProofError(f"{key} carries no LoRA, but what was read back is not what the base holds")
        return 0.0
    if dtype not in NUMBERS:
        raise ProofError(f"{key} read back from disk is in {dtype}, which holds codes and no weight")
    expected = stored.double() + update
    rounding = torch.finfo(written.dtype).eps * expected.abs()
    error = ((written.double() - expected).abs() - rounding).clamp_min(0).max()
    relative = (error / expected.abs().max().clamp_min(1e-30)).item()
    if not relative <= WEIGHT_TOLERANCE:
        raise ProofError(f"{key} read back from disk differs from the merge by {relative:.1e} of its largest entry")
    return relative


def _has_config(base: Base) -> bool:
    try:
        return base.config is not None
    except NSCError:
        return False


def _proof(
    what: str, modules: int, weights: float, in_memory: Tensor, outputs: Tensor, bare: Tensor, *dtypes: torch.dtype
) -> Proof:
    error = ((outputs - in_memory).norm() / in_memory.norm()).item()
    effect = ((bare - in_memory).norm() / in_memory.norm()).item()
    if not error <= max(OUTPUT_TOLERANCE.get(dtype, 5e-2) for dtype in dtypes):
        raise ProofError(
            f"the {what} read back from disk does not compute what the merge in memory does: hidden states differ by"
            f" {error:.1e} of their norm (the whole merge moves them by {effect:.1e})"
        )
    return Proof(what, modules, weights, error, effect)


def _worst_update(updates: Iterable[tuple[str, LowRank | Tensor]], merge: Merge) -> float:
    """Largest relative Frobenius error of a written update, beyond the truncation that was asked for."""
    worst = 0.0
    for number, (name, written) in enumerate(updates):
        if name not in merge.factors:  # an expert that no adapter touches
            if norm(written) != 0:
                raise ProofError(f"{name} read back from disk has an update, though no adapter touches it")
            continue
        expected = merge.merged.update(name)
        away = distance(written, expected).item() / max(norm(expected).item(), 1e-30)
        allowed = merge.factors[name].error + _rounding(written)
        excess = max(0.0, away - allowed) if math.isfinite(away) else away
        if not excess <= WEIGHT_TOLERANCE:
            raise ProofError(
                f"the update of {name} read back from disk is {away:.1e} of its norm away from the merge in memory"
                f" (truncation accounts for {merge.factors[name].error:.1e}); the export is wrong, do not use it"
            )
        worst = max(worst, excess)
        if number % TRIM_EVERY == 0:
            trim_memory()
    return worst


def _rounding(update: LowRank | Tensor) -> float:
    """What an update may be off because PEFT rounds it to the base's dtype, as it does on parameters."""
    if isinstance(update, Tensor) and update.dtype in (torch.float16, torch.bfloat16):
        return torch.finfo(update.dtype).eps
    return 0.0


def _without_idle(names: Iterable[str], merge: Merge) -> set[str]:
    """The layers without experts that no adapter touches, to which a parameter's factors give zeros."""
    return {name for name in names if name in merge.factors or not expert_of(name)}


def _worst_whole(written: Mapping[str, Tensor], merge: Merge, dtype: torch.dtype = torch.float32) -> float:
    """Largest error of a layer written whole, relative to its largest entry, both rounded to ``dtype``."""
    _same_names(set(written), set(merge.whole), "modules_to_save")
    worst = 0.0
    for name, tensor in written.items():
        expected = merge.whole[name].to(dtype).double()
        error = (tensor.to(dtype).double().cpu() - expected).abs().max() / expected.abs().max().clamp_min(1e-30)
        if not error <= WEIGHT_TOLERANCE:
            raise ProofError(
                f"{name} read back from disk differs from the merge in memory by {error:.1e} of its largest entry;"
                " the export is wrong, do not use it"
            )
        worst = max(worst, error.item())
    return worst


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def _same_names(written: set[str], expected: set[str], where: str) -> None:
    if written != expected:
        lost, extra = sorted(expected - written)[:3], sorted(written - expected)[:3]
        raise ProofError(f"{where} lacks {lost or 'nothing'} and has {extra or 'nothing'} beyond what was merged")
