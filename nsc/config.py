"""Settings of a merge: frozen, with the paper's defaults, in and out of plain dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from nsc.errors import NSCError

PAPER_REACH = 0.15  # lr x steps of the paper's longest schedule: 3e-4 x 500
# Schedules that travel equally far: AdamW moves a coefficient about lr x steps (docs/results.md, "Fewer steps").
PRESETS: dict[str, dict[str, Any]] = {"paper": {"steps": 500, "lr": 3e-4}, "fast": {"steps": 50, "lr": 3e-3}}

WEIGHTS = ("full", "int8", "fp8", "nf4")


@dataclass(frozen=True)
class MergeConfig:
    """How coefficients are learned.

    steps, lr, weight_decay, betas, eps: AdamW.  start: every coefficient at step 0.  batch_size: samples of each task
    in a step.  max_length: tokens a sample.  tokens_per_pass: a step of more is cut into passes; None for as many as
    memory holds, measured before the first step.  layers: how they carry their adapters, by "factors" or by "weights";
    "auto" takes the cheaper for each.  gradient_checkpointing: keep only the blocks' inputs for the backward, and run
    them again in it: less memory, a forward more.  graphs: on CUDA, record steps and replay them where their shapes
    recur.  max_drift: how far a coefficient may move from ``start``; None for no bound.  target_modules: suffixes of
    the module names whose inputs are measured (default: v_proj, or else o_proj, or else all that carry LoRA).
    target_blocks: block numbers (default: the last quarter).  evaluation_samples: of each task, for the ratios reported
    before and after.  dtype, device: of the frozen base; "auto" takes the checkpoint's, and CUDA if there is one.
    weights: of the base's linears while learning: "full", "int8", "fp8" or "nf4"; what is written and proven is always
    in full.  device_map: "auto", "balanced"... as accelerate takes it, instead of ``device``: a base over all GPUs, and
    the CPU and disk.  shard: the base's linears over the processes.  keep_modules:
    suffixes of modules in modules_to_save that each task keeps under heads/, and that are not merged.
    """

    steps: int = 500
    lr: float = 3e-4
    start: float = 0.4
    batch_size: int = 2
    max_length: int = 512
    tokens_per_pass: int | None = None
    layers: str = "auto"
    gradient_checkpointing: bool = False
    graphs: bool = True
    max_drift: float | None = PAPER_REACH
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    target_modules: tuple[str, ...] | None = None
    target_blocks: tuple[int, ...] | None = None
    evaluation_samples: int = 16
    dtype: str = "auto"
    device: str = "auto"
    weights: str = "full"
    device_map: str | None = None
    shard: bool = False
    keep_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("target_modules", "target_blocks", "betas", "keep_modules"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        _require(self.steps >= 0, f"steps must be 0 or more, not {self.steps}")
        _require(self.lr > 0, f"lr must be positive, not {self.lr}")
        _require(self.max_drift is None or self.max_drift >= 0, f"max_drift must be 0 or more, not {self.max_drift}")
        _require(self.tokens_per_pass is None or self.tokens_per_pass >= 1, "tokens_per_pass must be 1 or more")
        _require(
            self.layers in ("auto", "factors", "weights"), f"layers must be auto, factors or weights, not {self.layers}"
        )
        _require(self.weights in WEIGHTS, f"weights must be one of {', '.join(WEIGHTS)}, not {self.weights}")
        ways = [self.weights != "full", self.device_map is not None, self.shard]
        _require(not self.shard or sum(ways) == 1, "shard goes with full weights and without device_map: give one")
        for name in ("batch_size", "max_length", "evaluation_samples"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")

    @property
    def whole_base(self) -> bool:
        """Whether the base is loaded in full precision, to one device."""
        return self.weights == "full" and self.device_map is None and not self.shard

    @classmethod
    def preset(cls, name: str, **settings: Any) -> MergeConfig:
        """One of PRESETS, with ``settings`` that go before it. Raises NSCError for a name that is none of them."""
        _require(name in PRESETS, f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
        return cls(**{**PRESETS[name], **settings})

    def to_dict(self) -> dict[str, Any]:
        """Plain values only, ready for YAML."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """The inverse of ``to_dict``. Raises NSCError naming a key that is no setting."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}")
        return cls(**values)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise NSCError(message)
