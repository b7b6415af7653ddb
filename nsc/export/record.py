"""The record of a merge, which replays it without learning: what was done, to which adapters, and what was learned."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsc.adapters.lora import Adapter, fingerprint
from nsc.adapters.matching import Matched
from nsc.adapters.modules_to_save import parameters_of
from nsc.bases.module_names import layout
from nsc.checks import typed
from nsc.config import MergeConfig
from nsc.errors import NSCError, reading
from nsc.export.description import DESCRIPTION, DIGEST, REMEDY, REQUIRED, read_description, write_description
from nsc.export.sharing import PublicNames
from nsc.methods import LowRank
from nsc.recipes.spec import Recipe, read_settings, write_settings

COEFFICIENTS, MASKS = "coefficients.safetensors", "masks.safetensors"
FACTORS, STARTED, MAGNITUDES = "factors.safetensors", "start.safetensors", "magnitudes.safetensors"
UNVERIFIED = "this record is of a version of nsc without digests, so a change since it was written would not be noticed"


@dataclass(frozen=True)
class Record:
    """What ``nsc.apply`` needs to repeat a merge without learning.

    Attributes:
        base: folder or Hub id.
        prefix: prefix of the module names in the written adapter.
        start: initial value of the coefficients.
        coefficients: (M, K), or of rank rows, as ``Stack.owned`` has them, where granularity is "rank"; None where the
            method has none.
        modules: name in the base's body -> (out, in).
        adapters: task -> its path and fingerprint.
        data: task -> where its rows were.
        targets: modules whose inputs were measured.
        settings: settings of the method, as plain values.
        rank: rank the adapter was truncated to; None for exact factors.
        dense: parameters of the base that adapters fine-tuned whole.
        method: the method, as ``nsc.merge`` takes it.
        masks: layer -> mask that the caller gave.
        searched: how the scale in the settings was found, if it was searched.
        factors: layer -> what was found for it from rows, where adapters and coefficients alone do not give it.
        started: which merge was started from, and how it was made, if any was.
        start_factors: layer -> its update in that merge, to which the last coefficients belong.
        magnitudes: layer -> (d,) what was measured of its inputs, where AIM followed the method.
        fitted: what a method that needs rows was made from, as the report has it.
        verified: whether it was verified by digests; False where a version without them wrote it.
        ragged: whether each module of the adapter kept its own rank.
        base_id: name of the base on the Hub, where one is known.
        programs: those that the adapter was written for.
    """

    base: str
    prefix: str
    start: float
    coefficients: Tensor | None
    modules: dict[str, tuple[int, int]]
    adapters: dict[str, dict[str, str]]
    data: dict[str, str]
    targets: list[str]
    settings: dict[str, Any]
    rank: int | None = None
    dense: tuple[str, ...] = ()
    method: str = "nsc"
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    searched: Mapping[str, Any] = field(default_factory=dict)
    factors: Mapping[str, LowRank] = field(default_factory=dict)
    started: Mapping[str, Any] = field(default_factory=dict)
    start_factors: Mapping[str, LowRank] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    fitted: Mapping[str, Any] = field(default_factory=dict)
    verified: bool = True
    ragged: bool = False
    base_id: str | None = None
    programs: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        base: str,
        method: str,
        matched: Matched,
        adapters: Mapping[str, Adapter],
        coefficients: Tensor | None,
        config: MergeConfig,
        recipe: Recipe | None = None,
        **more: Any,
    ) -> Record:
        """Record a merge that was just made.

        Args:
            base: folder or Hub id.
            method: the method, as ``nsc.merge`` takes it.
            matched: the adapters on the base.
            adapters: task -> adapter, as it was read.
            coefficients: coefficients, as in ``Record``.
            config: the settings of learning.
            recipe: recipe of another method; None for the sum by learned coefficients.
            more: other fields.

        Returns:
            The record.
        """
        return cls(
            base=base,
            method=method,
            prefix=prefix_of_merge(matched.matches),
            start=config.start,
            coefficients=coefficients,
            modules={name: matched.shapes[name] for name in matched.stack.names},
            adapters={t: {"path": str(a.path.resolve()), "fingerprint": fingerprint(a)} for t, a in adapters.items()},
            settings=write_settings(recipe, config),
            dense=tuple(parameters_of(matched.stack.dense)),
            **{"data": {}, "targets": [], **more},
        )

    @property
    def recipe(self) -> Recipe | None:
        """What was done with the adapters; None for the sum by learned coefficients. Raises as ``read_settings``."""
        return read_settings(self.method, self.settings)[0]

    @property
    def public_names(self) -> PublicNames:
        """What the places of this machine are called in files that are shared."""
        told = [*(entry["path"] for entry in self.adapters.values()), *map(str, self.data.values())]
        return PublicNames.of(self.base, self.base_id, told)

    def write(self, folder: Path) -> None:
        """Write merge.yaml, and each tensor there is in a .safetensors file: coefficients, masks, factors, magnitudes.

        Places of this machine are in local.yaml alone.

        Args:
            folder: an existing folder.
        """
        of_rows = {"modules": self.modules, "tasks": list(self.adapters)}
        files = {
            MASKS: self.masks,
            FACTORS: _parts(self.factors),
            STARTED: _parts(self.start_factors),
            MAGNITUDES: self.magnitudes,
        }
        files = {name: tensors for name, tensors in files.items() if tensors}
        for name, tensors in files.items():
            save_file({key: x.contiguous() for key, x in tensors.items()}, folder / name)
        if self.coefficients is not None:
            metadata = {key: json.dumps(value) for key, value in of_rows.items()}
            save_file({"coefficients": self.coefficients.contiguous()}, folder / COEFFICIENTS, metadata=metadata)
            files[COEFFICIENTS] = {}
        description = {
            "method": self.method,
            "base": self.base,
            "adapters": self.adapters,
            "data": self.data,
            "prefix": self.prefix,
            "start": self.start,
            "targets": self.targets,
            "settings": self.settings,
            "rank": self.rank,
            **({"ragged": True} if self.ragged else {}),
            "dense": list(self.dense),
            "masks": bool(self.masks),
            **({"factors": True} if self.factors else {}),
            **({"started": dict(self.started)} if self.started else {}),
            **({"magnitudes": True} if self.magnitudes else {}),
            **({"searched": dict(self.searched)} if self.searched else {}),
            **({"fitted": json.dumps(self.fitted)} if self.fitted else {}),
            **({} if self.coefficients is not None else {"layers": json.dumps(of_rows)}),
            **({"base_id": self.base_id} if self.base_id else {}),
            **({"programs": list(self.programs)} if self.programs else {}),
        }
        write_description(folder, description, files, self.public_names)

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a record back.

        Args:
            folder: folder of an earlier merge.

        Returns:
            The record.

        Raises:
            NSCError: naming the file that is missing, damaged or edited.
        """
        remedy = f"a record is {DESCRIPTION} with the .safetensors files beside it: give the folder of a merge"
        with reading(f"{folder} holds no readable record of a merge: it", remedy):
            text = read_description(folder)
            rows, coefficients = _rows(folder, text)
            started = text.get("started", {})
            record = cls(
                coefficients=coefficients,
                modules=typed(rows["modules"], dict[str, tuple[int, int]]),
                adapters={task: text["adapters"][task] for task in typed(rows["tasks"], list[str])},  # by column
                rank=text.get("rank"),
                dense=tuple(text.get("dense", ())),
                masks=load_file(folder / MASKS) if text.get("masks") else {},
                factors=_read_factors(folder / FACTORS) if text.get("factors") else {},
                magnitudes=load_file(folder / MAGNITUDES) if text.get("magnitudes") else {},
                searched=text.get("searched", {}),
                started=started,
                start_factors=_read_factors(folder / STARTED) if started else {},
                fitted=typed(json.loads(text.get("fitted", "{}")), dict[str, Any]),
                verified=DIGEST in text,
                ragged=text.get("ragged", False),
                base_id=text.get("base_id"),
                programs=tuple(text.get("programs", ())),
                **{key: text[key] for key in REQUIRED if key != "adapters"},
            )
            if strange := sorted(set(text["adapters"]) - set(record.adapters)):
                raise NSCError(f"the record in {folder} has no coefficients of adapter {strange[0]}; {REMEDY}")
        record.check()
        return record

    def check(self) -> None:
        """Refuse values that no merge has, and tensors that do not fit the modules and, unless by rank, the tasks.

        Raises:
            NSCError: naming the value, or with both shapes.
        """
        config = self._check_values()
        for name, mask in self.masks.items():
            shape = (len(self.adapters), *self.modules.get(name, ()))
            if mask.dtype != torch.bool or tuple(mask.shape) != shape:
                raise NSCError(
                    f"the recorded mask of {name}, {tuple(mask.shape)}, must be true or false, {shape}; {REMEDY}"
                )
        for name, (B, A) in (*self.factors.items(), *self.start_factors.items()):
            shape = (*B.shape[:-1], *A.shape[1:])
            fits = B.ndim == A.ndim == 2 and B.shape[1] == A.shape[0] and shape == self.modules.get(name)
            if not (fits and B.isfinite().all() and A.isfinite().all()):
                raise NSCError(
                    f"recorded factors of {name}, {tuple(B.shape)} and {tuple(A.shape)}, must be finite and of a layer"
                    f" {self.modules.get(name)}; the record is damaged, merge again"
                )
        for name, x in self.magnitudes.items():
            if x.shape != self.modules.get(name, ())[1:] or not (x.isfinite() & (x >= 0)).all():
                raise NSCError(
                    f"recorded magnitudes of {name}, {tuple(x.shape)}, must be finite, not negative and of a layer"
                    f" {self.modules.get(name)}; the record is damaged, merge again"
                )
        if self.coefficients is None:
            return
        columns = len(self.adapters) + bool(self.started)
        columns = self.coefficients.shape[-1] if self.settings.get("granularity") == "rank" else columns
        shape = (len(self.modules), columns)
        if tuple(self.coefficients.shape) != shape or not torch.isfinite(self.coefficients).all():
            raise NSCError(f"coefficients {tuple(self.coefficients.shape)} must be finite and of shape {shape}")
        reach = config.max_drift if "max_drift" in self.settings else None
        if reach is not None and not self.started and (self.coefficients - self.start).abs().max() > reach + 1e-4:
            raise NSCError(f"a recorded coefficient is farther than max_drift, {reach}, from {self.start}; {REMEDY}")

    def _check_values(self) -> MergeConfig:
        """The settings of learning. Raises NSCError for a value that no merge writes."""
        holds = {
            "base": self.base != "",
            "prefix": self.prefix == "" or self.prefix.endswith("."),
            "start": math.isfinite(self.start),
            "rank": self.rank is None or self.rank >= 1,
            "modules": bool(self.modules) and all(min(shape) >= 1 for shape in self.modules.values()),
            "adapters": all({"path", "fingerprint"} <= entry.keys() for entry in self.adapters.values()),
        }
        if wrong := [key for key, sound in holds.items() if not sound]:
            raise NSCError(f"the record's {wrong[0]} cannot be that of a merge ({getattr(self, wrong[0])!r}); {REMEDY}")
        return MergeConfig(**read_settings(self.method, self.settings)[1])


def prefix_of_merge(matches: Mapping[str, Mapping[str, str]]) -> str:
    """Return what the names in a merged adapter carry before the body's own.

    Args:
        matches: task -> the adapter's module name -> the base's.

    Returns:
        The layout that the adapters share, or else the longest.
    """
    prefix = layout(matches.values())
    return max((layout([match]) or "" for match in matches.values()), key=len) if prefix is None else prefix


def _rows(folder: Path, text: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Modules and tasks, by row and column, and the coefficients that they are of, if there are any."""
    if "layers" in text:
        return json.loads(text["layers"]), None
    with safe_open(folder / COEFFICIENTS, framework="pt") as file:
        rows = {key: json.loads(file.metadata()[key]) for key in ("modules", "tasks")}
        return rows, file.get_tensor("coefficients")


def _parts(factors: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Factors of layers, as one file holds them."""
    return {f"{name}.{key}": x.float() for name, pair in factors.items() for key, x in pair._asdict().items()}


def _read_factors(file: Path) -> dict[str, LowRank]:
    """Layer -> its factors, float64."""
    stored = load_file(file)
    names = [key.removesuffix(".B") for key in stored if key.endswith(".B")]
    return {name: LowRank(stored[f"{name}.B"].double(), stored[f"{name}.A"].double()) for name in names}
