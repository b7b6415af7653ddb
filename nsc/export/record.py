"""The record of a merge, which replays it without learning: what was done, to which adapters, and what was learned."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nsc.adapters.lora import Adapter, fingerprint
from nsc.adapters.matching import Matched
from nsc.adapters.modules_to_save import parameters_of
from nsc.bases.module_names import layout
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.export.sharing import LOCAL, PublicNames, difference, overlaid
from nsc.methods import LowRank
from nsc.recipes.spec import Recipe, read_settings, write_settings
from nsc_kernels import __version__

COEFFICIENTS, MASKS, DESCRIPTION = "coefficients.safetensors", "masks.safetensors", "merge.yaml"
FACTORS, STARTED, MAGNITUDES = "factors.safetensors", "start.safetensors", "magnitudes.safetensors"


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
        ragged: whether each module of the adapter kept its own rank.
        base_id: name of the base on the Hub, where one is known.
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
    ragged: bool = False
    base_id: str | None = None

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
        prefix = layout(matched.matches.values())
        if prefix is None:
            prefix = max((layout([match]) or "" for match in matched.matches.values()), key=len)
        return cls(
            base=base,
            method=method,
            prefix=prefix,
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
        if self.coefficients is not None:
            metadata = {key: json.dumps(value) for key, value in of_rows.items()}
            save_file({"coefficients": self.coefficients.contiguous()}, folder / COEFFICIENTS, metadata=metadata)
        if self.masks:
            save_file({name: mask.contiguous() for name, mask in self.masks.items()}, folder / MASKS)
        _write_factors(self.factors, folder / FACTORS)
        _write_factors(self.start_factors, folder / STARTED)
        if self.magnitudes:
            save_file({name: x.contiguous() for name, x in self.magnitudes.items()}, folder / MAGNITUDES)
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
            "made": {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), **_versions()},
        }
        public = self.public_names.apply(description)
        for file, told in (DESCRIPTION, public), (LOCAL, difference(description, public)):
            if told:
                text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
                (folder / file).write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Read a record back.

        Args:
            folder: folder of an earlier merge.

        Returns:
            The record.

        Raises:
            NSCError: naming the file that is missing or damaged.
        """
        try:
            text = read_description(folder / DESCRIPTION)
            rows, coefficients = _rows(folder, text)
            modules = {name: (shape[0], shape[1]) for name, shape in rows["modules"].items()}
            adapters = {task: text["adapters"][task] for task in rows["tasks"]}  # by column
            keys = ("base", "prefix", "start", "data", "targets", "settings")
            rest = {key: text[key] for key in keys}
            record = cls(coefficients=coefficients, modules=modules, adapters=adapters, rank=text.get("rank"), **rest)
            masks = load_file(folder / MASKS) if text.get("masks") else {}
            factors = _read_factors(folder / FACTORS) if text.get("factors") else {}
            started = text.get("started", {})
            begun = _read_factors(folder / STARTED) if started else {}
            dense, method = tuple(text.get("dense", ())), text["method"]
            record = replace(record, dense=dense, method=method, masks=masks, searched=text.get("searched", {}))
            magnitudes = load_file(folder / MAGNITUDES) if text.get("magnitudes") else {}
            record = replace(record, factors=factors, magnitudes=magnitudes, started=started, start_factors=begun)
            record = replace(record, fitted=json.loads(text.get("fitted", "{}")), ragged=text.get("ragged", False))
            record = replace(record, base_id=text.get("base_id"))
        except (OSError, SafetensorError, yaml.YAMLError, KeyError, TypeError, ValueError) as error:
            raise NSCError(
                f"{folder} holds no readable record of a merge ({DESCRIPTION} and {COEFFICIENTS}): {error}"
            ) from error
        record.check()
        return record

    def check(self) -> None:
        """Refuse tensors that are not finite or do not fit the modules and, unless by rank, the tasks.

        Raises:
            NSCError: with both shapes.
        """
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


def read_description(file: Path) -> Any:
    """Read a YAML file and lay over it what a record keeps in the local.yaml beside it.

    Args:
        file: merge.yaml, or another YAML file.

    Returns:
        What it says.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is not UTF-8.
        yaml.YAMLError: if it is not YAML.
    """
    told = yaml.safe_load(file.read_text(encoding="utf-8"))
    local = file.parent / LOCAL
    if isinstance(told, dict) and "made" in told and local.exists():
        return overlaid(told, yaml.safe_load(local.read_text(encoding="utf-8")))
    return told


def _rows(folder: Path, text: Mapping[str, Any]) -> tuple[dict[str, Any], Tensor | None]:
    """Modules and tasks, by row and column, and the coefficients that they are of, if there are any."""
    if "layers" in text:
        return json.loads(text["layers"]), None
    with safe_open(folder / COEFFICIENTS, framework="pt") as file:
        rows = {key: json.loads(file.metadata()[key]) for key in ("modules", "tasks")}
        return rows, file.get_tensor("coefficients")


def _write_factors(factors: Mapping[str, LowRank], file: Path) -> None:
    if factors:
        parts = {f"{n}.{key}": x for n, f in factors.items() for key, x in f._asdict().items()}
        save_file({name: x.float().contiguous() for name, x in parts.items()}, file)


def _read_factors(file: Path) -> dict[str, LowRank]:
    """Layer -> its factors, float64."""
    stored = load_file(file)
    names = [key.removesuffix(".B") for key in stored if key.endswith(".B")]
    return {name: LowRank(stored[f"{name}.B"].double(), stored[f"{name}.A"].double()) for name in names}


def _versions() -> dict[str, str]:
    versions = {"nsc": __version__, "python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return versions
