"""Features of samples, computed once, in memory and beyond a budget on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

BUDGET = 2 * 2**30
Sample = TypeVar("Sample")


class FeatureStore(Generic[Sample]):
    """``store(sample)`` is ``compute(sample)`` on the CPU, computed once, to the bit.

    Samples are computed one at a time: which others are drawn with them, by which rank or after which resume, rounds
    nothing differently. budget: bytes kept in memory; the rest goes to a temporary folder that is removed by ``close``,
    at the end of a ``with``, or with the store.
    """

    def __init__(self, compute: Callable[[Sample], Tensor], budget: int = BUDGET) -> None:
        self.compute = compute
        self.budget = budget
        self.in_memory = 0  # bytes
        self._kept: dict[Sample, Tensor] = {}
        self._files: dict[Sample, Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __call__(self, sample: Sample) -> Tensor:
        """The features of one sample, of any shape and dtype. Not to be written to."""
        if sample in self._kept:
            return self._kept[sample]
        if sample in self._files:
            return load_file(self._files[sample])["features"]
        features = self.compute(sample).detach().to("cpu").contiguous()
        if self.in_memory + features.nbytes <= self.budget:
            self.in_memory += features.nbytes
            self._kept[sample] = features
        else:
            self._files[sample] = self._write(features)
        return features

    def close(self) -> None:
        """Forget everything, on disk too."""
        self._kept.clear()
        self._files.clear()
        self.in_memory = 0
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> FeatureStore[Sample]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _write(self, features: Tensor) -> Path:
        self._folder = self._folder or TemporaryDirectory(prefix="nsc-features-")
        file = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"features": features}, file)
        return file
