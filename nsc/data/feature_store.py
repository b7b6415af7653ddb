"""Features of samples, computed once, in memory and beyond a budget on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

from safetensors.torch import load_file, save_file
from torch import Tensor

BUDGET = 2 * 2**30
Key = TypeVar("Key")


class FeatureStore(Generic[Key]):
    """Features of samples, each computed once: ``store(sample)`` equals ``compute(sample)`` to the bit.

    Samples are computed one at a time, so nothing rounds differently by which others are drawn with them, by which
    rank, or after which resume.

    Args:
        compute: sample -> features.
        budget: bytes kept in memory; the rest goes to a temporary folder, which is removed by ``close``, at the end of
            a ``with``, or with the store.
    """

    def __init__(self, compute: Callable[[Key], Tensor], budget: int = BUDGET) -> None:
        self.compute = compute
        self.budget = budget
        self.in_memory = 0  # bytes
        self._kept: dict[Key, Tensor] = {}
        self._files: dict[Key, Path] = {}
        self._folder: TemporaryDirectory[str] | None = None

    def __call__(self, sample: Key) -> Tensor:
        """Return the features of one sample, which must not be written to.

        Args:
            sample: hashable.

        Returns:
            Features of any shape and dtype, on the CPU.
        """
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

    def __enter__(self) -> FeatureStore[Key]:
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def _write(self, features: Tensor) -> Path:
        self._folder = self._folder or TemporaryDirectory(prefix="nsc-features-")
        file = Path(self._folder.name) / f"{len(self._files)}.safetensors"
        save_file({"features": features}, file)
        return file
