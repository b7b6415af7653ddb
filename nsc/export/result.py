"""A merge in memory, before and after it is saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from nsc.adapters.lora import Adapter
from nsc.adapters.stack import Stack
from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.bases.codes import quantization_settings
from nsc.bases.experts import expert_of
from nsc.bases.weights import WEIGHT_FILES, checkpoint_folder
from nsc.batch import Batch
from nsc.data.modalities import example_of
from nsc.errors import NSCError
from nsc.export.output import Output, refuse_output
from nsc.export.proof import Proof, prove_complete
from nsc.export.record import Record
from nsc.export.report import Report
from nsc.export.served import read_programs, refuse_early
from nsc.export.sharing import public_base, require_hub_id
from nsc.recipes.combination import Combination
from nsc.recipes.spec import Recipe
from nsc.recipes.updates import FixedFactors, Merged, WeightedSum
from nsc.runtime.memory import free_memory
from nsc.runtime.placement import input_device, one_device


@dataclass(frozen=True)
class MergeResult:
    """A merge in memory.

    Attributes:
        coefficients: (M, K), rows ``modules``, columns ``tasks``; or of rank rows, as ``Stack.owned`` has them; None
            where the method has none.
        report: what was decided and seen.
        record: what replays the merge.
        adapters: task -> adapter, with the head that its task keeps.
        stack: the adapters side by side.
        model: the base's body in full precision, where it is in memory.
        batch: rows to compare hidden states with, where there are any; without ``model``, ``save`` loads the base for
            them, if memory holds it.
        combination: what another method makes of the adapters; None for the sum by learned coefficients.
        fixed: the merge itself, where its factors were found from rows and are not made again; None else.
        with_base: whether ``save`` loads the base even without rows, and makes some.
        checkpoint: where its learning kept its state, which ``save`` removes where it lies in ``out.partial``.
        sources: files of base and adapters -> their states before anything was read of them; ``save`` finds them so.
    """

    coefficients: Tensor | None
    report: Report
    record: Record
    adapters: dict[str, Adapter]
    stack: Stack
    model: nn.Module | None = None
    batch: Batch | None = None
    combination: Combination | None = None
    fixed: FixedFactors | None = None
    with_base: bool = False
    checkpoint: Path | None = None
    sources: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)

    @property
    def merged(self) -> Merged:
        """What is added to each layer."""
        if self.fixed is not None:
            return self.fixed
        if self.combination is not None:
            return self.combination
        assert self.coefficients is not None  # what has none is a combination
        return WeightedSum(self.stack, self.coefficients)

    @property
    def by_layer(self) -> Stack:
        """The adapters with one coefficient for each layer and task, whatever was learned."""
        modules = {name: replace(module, by_rank=False) for name, module in self.stack.modules.items()}
        return replace(self.stack, modules=modules)

    @property
    def recipe(self) -> Recipe | None:
        """The recipe of the method; None for the sum by learned coefficients."""
        return self.combination.recipe if self.combination else None

    @property
    def modules(self) -> list[str]:
        """All modules that are merged: the rows of the coefficients."""
        return self.stack.names

    @property
    def tasks(self) -> list[str]:
        """The tasks: the columns of the coefficients."""
        return list(self.stack.tasks)

    def save(
        self,
        out: str | Path,
        *,
        rank: int | None = None,
        full: bool = False,
        ragged: bool = False,
        base_id: str | None = None,
        programs: Sequence[str] | None = None,
    ) -> Proof:
        """Write the merge to a new folder and prove it by loading it back.

        Beside the weights lie the record, the report, a model card, a heat map, and each task's own head under
        ``heads/``. Everything is written to ``out.partial`` and moved into place only once proven.

        Args:
            out: folder that does not exist yet.
            rank: truncate the adapter to this rank; None writes its exact factors.
            full: write the whole merged model instead of an adapter.
            ragged: keep each module's own rank, instead of padding all with zeros to the largest.
            base_id: name of the base on the Hub, for what is shared; None for that which the adapters' configs name.
            programs: those that the adapter is for, such as "vllm": what they cannot serve is refused. None for those
                of the merge that is replayed.

        Returns:
            What was compared, and how well it agrees.

        Raises:
            NSCError: as ``refuse_output`` does.
            ProofError: if what was loaded back is not what was merged.
        """
        names = read_programs(self.record.programs if programs is None else programs)
        base, kept = Base(self.record.base), base_id or self.record.base_id
        refuse_output(Path(out), base, rank, full, self.recipe, self.merged.names)
        refuse_early(names, base, rank, full, ragged)
        require_hub_id(base_id)
        known = public_base(base.id, (adapter.base for adapter in self.adapters.values()), kept)
        record = replace(self.record, ragged=ragged and not full, base_id=known, programs=names)
        prove_complete(self.adapters, self.stack)
        output = Output(self.merged, record, self.report, self.adapters, self.checkpoint, self.sources)
        return output.write(Path(out), rank, full, lambda: self._proof_base(full))

    def _proof_base(self, full: bool) -> tuple[Base, Batch] | str:
        """The base in full precision and rows for it; or why there are none.

        One that was not learned on in that form is loaded anew, on the CPU.
        """
        base = Base(self.record.base, self.model)
        if self.model is not None and self.batch is not None:
            return base, self.batch.to(input_device(self.model))
        learned = self.batch is not None
        if not (learned or full or self.with_base):
            return "no base loaded"
        settings, own = self.record.settings, learned or self.with_base
        device = "cpu" if learned else one_device(settings.get("device", "auto") if own else "auto")
        dense = self.recipe is not None and self.recipe.is_dense
        # Experts are copied to carry the merge, and chosen by a router, which few bits would make choose others.
        experts = any(map(expert_of, self.stack.names))
        if not _fits(base, (1 + full + dense + experts) * (1 + experts), device):
            return "no base loaded, for which memory does not suffice"
        dtype = settings.get("dtype", "auto") if own else "auto"
        try:
            base = loading.load(base, "float32" if experts else dtype, device)
        except NSCError:
            if learned or full or not quantization_settings(base.config):
                raise
            return "no base loaded, of whose codes only their own library makes weights"
        batch = self.batch or example_of(base)
        if batch is None:
            return f"no example is known on which {type(base.model).__name__} runs"
        return base, batch.to(input_device(base.model))


def _fits(base: Base, copies: int, device: str) -> bool:
    """Whether the memory that is free holds so many of a base; of a checkpoint that cannot be measured, hoped."""
    try:
        files = [file for file in checkpoint_folder(base).iterdir() if file.suffix in WEIGHT_FILES]
        size = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    except (NSCError, OSError):
        return True
    copies *= 2 if quantization_settings(base.config) else 1  # since codes are loaded as numbers
    return bool(files) and copies * size < (free_memory(torch.device(device)) or 0)
