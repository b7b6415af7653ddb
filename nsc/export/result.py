"""A merge in memory, and how it gets to disk: written aside, proven by reload, then moved into place."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.stack import Stack
from nsc.bases import loading
from nsc.bases.weights import WEIGHT_FILES, checkpoint_folder, refuse_unstreamable
from nsc.batch import Batch
from nsc.data.modalities import feed_of
from nsc.errors import NSCError
from nsc.export.files import merged_layers_whole, write_adapter, write_full_model
from nsc.export.merged_factors import DENSE_REMEDY, merged_factors
from nsc.export.proof import Merge, Proof, prove_adapter, prove_files, prove_full_model
from nsc.export.record import Record
from nsc.export.report import Report, draw_heat_map, model_card, vllm_limits, vllm_rank
from nsc.paths import CHECKPOINT, STAGING, partial_folder
from nsc.recipes.combination import Combination
from nsc.recipes.spec import Recipe
from nsc.recipes.updates import Merged, WeightedSum
from nsc.runtime.memory import free_memory
from nsc.runtime.placement import input_device


@dataclass(frozen=True)
class MergeResult:
    """A merge in memory.

    coefficients: (M, K), rows ``modules``, columns ``tasks``; or of rank rows, as ``Stack.owned`` has them; None where
    the method has none.  report: what was decided and seen.  record: what replays it.  adapters, stack: what was
    merged.  model, batch: the base and rows to compare outputs with, where there is one; without the model but with
    rows, ``save`` loads it in full precision, if memory holds it.  combination: what another method makes of the
    adapters.  with_base: whether ``save`` loads the base likewise without rows, and makes some.
    """

    coefficients: Tensor | None
    report: Report
    record: Record
    adapters: dict[str, Adapter]
    stack: Stack
    model: nn.Module | None = None
    batch: Batch | None = None
    combination: Combination | None = None
    with_base: bool = False

    @property
    def merged(self) -> Merged:
        """What is added to each layer."""
        if self.combination is not None:
            return self.combination
        assert self.coefficients is not None  # what has none is a combination
        return WeightedSum(self.stack, self.coefficients)

    @property
    def recipe(self) -> Recipe | None:
        """Of the method; None for the sum by learned coefficients."""
        return self.combination.recipe if self.combination else None

    @property
    def modules(self) -> list[str]:
        """All that are merged, the rows of the coefficients."""
        return self.stack.names

    @property
    def tasks(self) -> list[str]:
        """Columns of the coefficients."""
        return list(self.stack.tasks)

    def save(self, out: str | Path, *, rank: int | None = None, full: bool = False) -> Proof:
        """Write the merge to a new folder ``out`` and prove it by loading it back.

        An adapter by its exact factors, or truncated to ``rank``; or, with ``full``, the whole merged model. Beside it:
        the record, the report, a model card, a heat map, and each task's own head under ``heads/``. Everything is
        written to ``out.partial`` and moved into place only once proven. Raises NSCError as ``refuse_output`` does,
        ProofError if what was reloaded is not what was merged.
        """
        out = Path(out)
        refuse_output(out, self.record.base, rank, full, self.recipe)
        partial = partial_folder(out)
        staging = partial / STAGING
        shutil.rmtree(staging, ignore_errors=True)  # of a save that failed
        staging.mkdir(parents=True)
        merged = self.merged
        factors = {} if full else merged_factors(merged, rank)
        whole = {} if full else merged_layers_whole(self.record.base, merged)
        merge = Merge(merged, factors, self.record.prefix, whole)
        if full:
            write_full_model(staging, self.record.base, merged)
        else:
            write_adapter(staging, factors, self.record.prefix, self.record.base, whole)
        lost = max((f.error for f in factors.values()), default=0.0)
        proof = replace(self._prove(staging, merge, full), lost=lost)
        self._describe(staging, self._reported(merge, proof, rank, full))
        replace(self.record, rank=rank).write(staging)
        _share(staging)
        os.replace(staging, out)
        (partial / CHECKPOINT).unlink(missing_ok=True)
        with suppress(OSError):  # somebody else's files lie there
            partial.rmdir()
        return proof

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
            warnings=report.warnings + vllm_limits(top, merge.merged.whole),
            merged_rank=top,
            vllm_max_lora_rank=vllm_rank(top),
            ranks_by_module=ranks,
        )

    def _prove(self, folder: Path, merge: Merge, full: bool) -> Proof:
        loaded = self._with_base(full)
        if full:
            return prove_full_model(folder, merge, self.record.base, *(loaded or (None, None)))
        files = prove_files(folder, merge)
        return prove_adapter(folder, merge, *loaded) if loaded else files

    def _with_base(self, full: bool) -> tuple[nn.Module, Batch] | None:
        """The base in full precision and rows for it; None where none is at hand, or memory does not hold it.

        One that was not learned on in that form is loaded anew, on the CPU.
        """
        if self.model is not None and self.batch is not None:
            return self.model, self.batch.to(input_device(self.model))
        learned = self.batch is not None
        if not (learned or full or self.with_base):
            return None
        settings, own = self.record.settings, learned or self.with_base
        device = "cpu" if learned else loading.one_device(settings.get("device", "auto") if own else "auto")
        dense = self.recipe is not None and self.recipe.is_dense
        if not _fits(self.record.base, 1 + full + dense, device):
            return None
        model = loading.load_body(self.record.base, settings.get("dtype", "auto") if own else "auto", device)
        batch = self.batch or feed_of(self.record.base).example(self.record.base, model)
        return model, batch.to(input_device(model))

    def _describe(self, folder: Path, report: Report) -> None:
        (folder / "report.json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
        (folder / "README.md").write_text(model_card(report), encoding="utf-8")
        if report.coefficients:
            draw_heat_map(folder / "coefficients.png", report)
        for task, adapter in self.adapters.items():
            if adapter.saved:
                (folder / "heads").mkdir(exist_ok=True)
                save_file({k: v.contiguous() for k, v in adapter.saved.items()}, folder / f"heads/{task}.safetensors")


def _share(folder: Path) -> None:
    """safetensors makes its files the owner's alone; give them the mode that any other file gets."""
    allowed = os.umask(0)
    os.umask(allowed)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~allowed)


def refuse_output(out: Path, base: str, rank: int | None, full: bool, recipe: Recipe | None = None) -> None:
    """Raise NSCError for an output that cannot be written, so that it need not be learned first.

    ``out`` exists (nothing on disk is ever overwritten), ``rank`` and ``full`` are both given, or ``full`` is and the
    base has no checkpoint that can be streamed, or neither is and the recipe's updates are dense.
    """
    if out.exists():
        raise NSCError(f"{out} exists already; choose another folder, or move it away")
    if rank is not None and full:
        raise NSCError("rank truncates an adapter; a full model has no rank: give one of them")
    if recipe is not None and recipe.is_dense and rank is None and not full:
        raise NSCError(f"{recipe.label} works on every entry of the dense updates: {DENSE_REMEDY}")
    if full:
        refuse_unstreamable(base)


def _fits(base: str, copies: int, device: str) -> bool:
    """Whether the memory that is free holds so many of a base; of a checkpoint that cannot be measured, hoped."""
    try:
        files = [file for file in checkpoint_folder(base).iterdir() if file.suffix in WEIGHT_FILES]
        size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    except (NSCError, OSError):
        return True
    return bool(files) and copies * size < (free_memory(torch.device(device)) or 0)
