"""A merge to a new folder: written aside, proven by loading it back, then moved into place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file

from nsc.adapters.lora import Adapter
from nsc.adapters.tensor_file import Spill
from nsc.bases.base_model import Base
from nsc.bases.conv1d import transposed_weights
from nsc.bases.weights import refuse_codes, refuse_unstreamable
from nsc.batch import Batch
from nsc.errors import NSCError, ProofError, one_line
from nsc.export.card import CARD, card_data, licence_warnings, model_card
from nsc.export.expected_merge import Merge
from nsc.export.files import (
    agreed_fields,
    copy_tokenizer,
    merged_layers_whole,
    misread_config,
    write_adapter,
    write_full_model,
)
from nsc.export.parameters import split_by_parameter
from nsc.export.programs import vllm_rank
from nsc.export.proof import HEADS, Proof, prove_adapter, prove_files, prove_full_model, prove_heads
from nsc.export.push import seal
from nsc.export.record import Record
from nsc.export.report import Report, draw_heat_map, padding_cost, vllm_limits
from nsc.export.served import require_served, served_prefix
from nsc.paths import CHECKPOINT, STAGING, held, move_into_place, refuse_changed, states_of_files
from nsc.recipes.merged_factors import DENSE_REMEDY, merged_factors, padded, padding_bytes
from nsc.recipes.spec import Recipe
from nsc.recipes.updates import Merged


@dataclass(frozen=True)
class Output:
    """What goes to disk of a merge.

    Attributes:
        merged: the updates.
        record: what replays it.
        report: what was decided and seen, without what is only known once it is written.
        adapters: task -> adapter, with the head that its task keeps.
        checkpoint: where learning kept its state, if it did.
        sources: files of base and adapters -> their states before anything was read of them.
    """

    merged: Merged
    record: Record
    report: Report
    adapters: Mapping[str, Adapter]
    checkpoint: Path | None = None
    sources: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    def write(
        self, out: Path, rank: int | None, full: bool, proof_base: Callable[[], tuple[Base, Batch] | str]
    ) -> Proof:
        """Write everything to ``out.partial``, prove it, and move it to ``out``.

        Args:
            out: new folder.
            rank: rank the adapter is truncated to; None for its exact factors.
            full: whether the whole merged model is written, instead of an adapter.
            proof_base: gives the base in full precision, and rows to compare hidden states with; or why there are none.

        Returns:
            What was compared.

        Raises:
            NSCError: if ``out`` cannot be written, another process writes it, an interrupted merge of it is there, or
                base or adapters were changed since they were read.
            ProofError: if what was loaded back is not what was merged.
        """
        with held(out) as partial, _naming_disk_errors(out), _naming_changes(self.sources):
            self._refuse_interrupted(partial)
            proof = self._write_staged(out, partial / STAGING, rank, full, proof_base)
            (partial / CHECKPOINT).unlink(missing_ok=True)
            return proof

    @cached_property
    def _base(self) -> Base:
        """The base without weights, whose blank models are built once."""
        return Base(self.record.base)

    def _refuse_interrupted(self, partial: Path) -> None:
        """Raise NSCError where the checkpoint of another merge would be removed."""
        left = partial / CHECKPOINT
        if left.exists() and (self.checkpoint is None or self.checkpoint.absolute() != left):
            raise NSCError(
                f"there is an interrupted merge in {partial}: finish it with nsc merge --resume, or remove that folder"
            )

    def _write_staged(
        self, out: Path, staging: Path, rank: int | None, full: bool, proof_base: Callable[[], Any]
    ) -> Proof:
        """What ``write`` does while it holds ``out.partial``."""
        shutil.rmtree(staging, ignore_errors=True)  # of a save that failed
        staging.mkdir()
        spill = Spill(staging.parent)
        merge = self._write_weights(staging, rank, full, spill)
        self._write_heads(staging)
        warnings = copy_tokenizer(staging, self.adapters)
        written = states_of_files(staging, 2)
        lost = max((f.error for f in merge.factors.values()), default=0.0)
        found = proof_base()
        in_memory, unfed = (None, found) if isinstance(found, str) else (found, "")
        proof = _prove(staging, merge, self._base, full, in_memory)
        proof = replace(proof, lost=lost, unfed=unfed or proof.unfed)
        prove_heads(staging, self.adapters)
        warnings += misread_config(staging) if full else []  # proven to be readable
        report = self._reported(merge, proof, rank, full)
        self._describe(staging, replace(report, warnings=report.warnings + warnings))
        replace(self.record, rank=rank).write(staging)
        seal(staging, proof)
        _share(staging)
        if changed := sorted(written.items() - states_of_files(staging, 2).items()):
            raise ProofError(f"{changed[0][0]} was changed by another program after its proof; save again")
        refuse_changed(self.sources)
        if not full:
            require_served(self.record.programs, staging)
        if os.path.lexists(out):
            raise NSCError(f"{out} was made meanwhile; choose another folder, or move it away")
        move_into_place(staging, out)
        return proof

    def _write_weights(self, folder: Path, rank: int | None, full: bool, spill: Spill) -> Merge:
        """The adapter or the whole model, and what it should be when it is read back."""
        base, prefix = self._base, self.record.prefix
        if full:
            write_full_model(folder, base, self.merged)
            return Merge(self.merged, {}, prefix)
        factors = merged_factors(self.merged, rank, spill)
        prefix = served_prefix(self.record.programs, base, list(factors), prefix)
        whole = merged_layers_whole(base, self.merged)
        written = factors if self.record.ragged else padded(factors)
        named, transposed = self.record.base_id or base.id, _are_transposed(base, factors)
        modules, parameters = split_by_parameter(base, written)
        behind = base.output_layers if whole else {}
        about = agreed_fields(self.adapters)
        write_adapter(folder, modules, prefix, named, whole, parameters, transposed, behind, about)
        return Merge(self.merged, factors, prefix, whole)

    def _reported(self, merge: Merge, proof: Proof, rank: int | None, full: bool) -> Report:
        """The report, with what was written and proven."""
        report = replace(self.report, proofs=[str(proof)], full=full)
        if full:
            return report
        ranks = {name: f.A.shape[0] for name, f in merge.factors.items()}
        top = max(ranks.values())
        return replace(
            report,
            truncation={name: f.error for name, f in merge.factors.items()} if rank is not None else {},
            warnings=report.warnings
            + vllm_limits(top, merge.merged.whole)
            + padding_cost(ranks, 0 if self.record.ragged else padding_bytes(merge.factors)),
            merged_rank=top,
            vllm_max_lora_rank=vllm_rank(top),
            ranks_by_module=ranks,
        )

    def _describe(self, folder: Path, report: Report) -> None:
        """Everything beside the weights that is for people or programs."""
        base = self._base
        report = replace(report, warnings=report.warnings + licence_warnings(base, self.adapters))
        report = self.record.public_names.apply(report)
        data = card_data(base, self.record.base_id, self.adapters, report.full)
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        (folder / CARD).write_text(model_card(report, data), encoding="utf-8")
        if report.coefficients:
            draw_heat_map(folder / "coefficients.png", report)

    def _write_heads(self, folder: Path) -> None:
        """What each task keeps for itself."""
        for task, adapter in self.adapters.items():
            if adapter.saved:
                (folder / HEADS).mkdir(exist_ok=True)
                tensors = {name: tensor.contiguous() for name, tensor in adapter.saved.items()}
                save_file(tensors, folder / HEADS / f"{task}.safetensors")


def _are_transposed(base: Base, layers: Collection[str]) -> bool:
    """Whether the base stores these layers transposed; PEFT asks the layer itself, and warns of another answer."""
    try:
        return {f"{name}.weight" for name in layers} <= transposed_weights(base.model)
    except NSCError:  # a recorded merge is repeated without its base
        return False


def refuse_output(
    out: Path, base: Base, rank: int | None, full: bool, recipe: Recipe | None = None, layers: Sequence[str] = ()
) -> None:
    """Refuse an output that cannot be written, so that it need not be learned first.

    Args:
        out: the new folder.
        base: whose checkpoint is streamed to a full model.
        rank: rank the adapter will be truncated to, if any.
        full: whether the whole model is to be written.
        recipe: recipe of the method; None for the sum by learned coefficients.
        layers: layers of the body that are merged, where they are known.

    Raises:
        NSCError: if ``out`` exists (nothing on disk is ever overwritten), if ``rank`` is no rank, or given with
            ``full``, if ``full`` is and the base has no checkpoint that can be streamed or stores one of the layers as
            codes, or if neither is and the recipe's updates are dense.
    """
    if os.path.lexists(out):
        raise NSCError(f"{out} exists already; choose another folder, or move it away")
    if rank is not None and rank < 1:
        raise NSCError(f"rank must be 1 or more, not {rank}")
    if rank is not None and full:
        raise NSCError("rank truncates an adapter; a full model has no rank: give one of them")
    if recipe is not None and recipe.is_dense and rank is None and not full:
        raise NSCError(f"{recipe.label} works on every entry of the dense updates: {DENSE_REMEDY}")
    if full:
        refuse_unstreamable(base)
        refuse_codes(base, layers)


def _prove(folder: Path, merge: Merge, base: Base, full: bool, in_memory: tuple[Base, Batch] | None) -> Proof:
    model, batch = (in_memory[0].model, in_memory[1]) if in_memory else (None, None)
    if full:
        return prove_full_model(folder, merge, base, model, batch)
    files = prove_files(folder, merge, base)
    return prove_adapter(folder, merge, *in_memory) if in_memory else files


def _share(folder: Path) -> None:
    """Give the files of safetensors, which are the owner's alone, the mode that any other file gets."""
    allowed = os.umask(0)
    os.umask(allowed)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~allowed)


@contextmanager
def _naming_changes(sources: Mapping[Path, tuple[int, ...]]) -> Iterator[None]:
    """Where something fails and base or adapters were changed meanwhile, that is the error, whatever followed."""
    try:
        yield
    except NSCError:
        refuse_changed(sources)
        raise


@contextmanager
def _naming_disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise NSCError(
            f"{out} cannot be written ({one_line(error)}); free space or choose another folder: a checkpoint of what"
            " was learned stays where it is"
        ) from error
