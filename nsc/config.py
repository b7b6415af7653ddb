"""Settings of a merge: frozen, with the paper's defaults, in and out of plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from nsc.checks import expected, require_choice, require_fraction, typed
from nsc.errors import NSCError, clipped

PAPER_REACH = 0.15  # lr x steps of the paper's longest schedule: 3e-4 x 500
# The paper's schedules, by family. AdamW moves a coefficient about lr x steps, so fast goes as far as paper does
# (docs/results.md, "Fewer steps").
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"steps": 500, "lr": 3e-4},
    "fast": {"steps": 50, "lr": 3e-3},
    "vit": {"steps": 100, "lr": 1e-3, "start": 0.4, "batch_size": 32},
    "llama": {"steps": 500, "lr": 3e-4, "start": 0.4, "batch_size": 2},
    "llava": {"steps": 500, "lr": 3e-4, "start": 0.4, "batch_size": 1},
}
PLANS = ("factors", "weights")  # how a layer applies its adapters
WEIGHTS = ("full", "int8", "fp8", "nf4")
DTYPES = ("auto", "float16", "bfloat16", "float32", "float64")
CHOICES = {
    "dtype": DTYPES,
    "layers": ("auto", *PLANS),
    "weights": WEIGHTS,
    "positions": ("prompt", "last", "full"),
    "modality": ("both", "text", "image"),
    "granularity": ("layer", "task", "rank", "factors"),
    "link": ("identity", "softplus", "sigmoid", "exp", "clip", "softmax"),
    "optimizer": ("adamw", "adam", "sgd"),
    "schedule": ("constant", "linear", "cosine"),
    "objective": ("null-space", "entropy", "both", "match", "null-space+match"),
    "stop": ("last", "match"),
    "reduction": ("mean", "sum"),
}


class LearnedMethod(NamedTuple):
    """A method that learns coefficients from data.

    Attributes:
        line: what it does, for a list.
        source: where it is from.
        settings: what it sets beside the defaults of MergeConfig.
    """

    line: str
    source: str
    settings: dict[str, Any]


_ADAMERGING: dict[str, Any] = {
    "objective": "entropy",
    "link": "clip",
    "start": 0.3,
    "max_drift": None,
    "optimizer": "adam",
    "lr": 1e-3,
    "batch_size": 16,
    "steps": 500,
}
# Settings of matching by granularity, measured (docs/results.md, "Matching the experts").
MATCHING: dict[str, dict[str, Any]] = {
    "task": {"lr": 3e-2, "steps": 120},
    "layer": {"lr": 3e-2, "steps": 120},
    "rank": {"lr": 6e-2, "steps": 240},
    "factors": {"lr": 1e-3, "steps": 320},
}
FEW_ROWS = 64  # of a task: where it has no more, matching gains by the rows of other tasks
AUTO = "auto"
START = "start"  # the name among the tasks of the merge that ``start_from`` names
DISTILLATION = "https://arxiv.org/abs/1503.02531"
_MATCH: dict[str, Any] = {
    "objective": "match",
    "granularity": "rank",
    "max_drift": None,
    "schedule": "linear",
    "batch_size": 4,
    "stop": "match",
    "borrow_rows": FEW_ROWS,
}
LEARNED = {
    "nsc": LearnedMethod(
        "a coefficient for each layer and task that keeps activations out of each adapter's null space",
        "https://arxiv.org/abs/2603.26317",
        {},
    ),
    "adamerging": LearnedMethod(
        "a coefficient for each layer and task that makes the merged model sure of what it says",
        "https://arxiv.org/abs/2310.02575",
        _ADAMERGING,
    ),
    "adamerging-task": LearnedMethod(
        "the same with one coefficient for each task",
        "https://arxiv.org/abs/2310.02575",
        {**_ADAMERGING, "granularity": "task"},
    ),
    "match": LearnedMethod(
        "a coefficient for each rank row of an adapter, by which the merged model says what each expert says",
        DISTILLATION,
        _MATCH,
    ),
    "match-layer": LearnedMethod(
        "the same with one coefficient for each layer and task",
        DISTILLATION,
        {**_MATCH, "granularity": "layer"},
    ),
    "match-factors": LearnedMethod(
        "one adapter whose own factors are fitted to what the experts say",
        DISTILLATION,
        {**_MATCH, "granularity": "factors"},
    ),
    AUTO: LearnedMethod(
        "match and the best of other methods, each at its best scale; written is the one nearest to the experts",
        DISTILLATION,
        _MATCH,
    ),
}
# The last blocks by a word: how many of a depth.
LAST_BLOCKS: dict[str, Callable[[int], int]] = {
    "all": lambda depth: depth,
    "half": lambda depth: depth // 2,
    "quarter": lambda depth: depth // 4,
    "one": lambda depth: 1,
}


@dataclass(frozen=True)
class MergeConfig:
    """How coefficients are learned; docs/options.md defines every option of what is learned.

    Attributes:
        steps: optimizer steps.
        lr: learning rate.
        start: initial value of every coefficient.
        batch_size: samples per task and step.
        max_length: tokens per sample, at most.
        tokens_per_pass: a step with more tokens is split into several passes; None for as many as free memory allows,
            measured first.
        layers: how a layer applies its adapters: "factors", "weights", or "auto", the cheaper for each layer.
        gradient_checkpointing: keep only the inputs of blocks for the backward, and run the blocks again in it.
        graphs: on CUDA, record steps as graphs and replay them where their shapes recur.
        max_drift: how far a coefficient may move from ``start``; None for no bound.
        weight_decay: weight decay of the optimizer.
        betas: decay rates of Adam's moments.
        eps: Adam's epsilon.
        seed: seed of the sample order.
        target_modules: suffixes of the module names whose inputs are measured; by default the output projection of
            attention where the base takes images, else its values, as in ``nsc.bases.roles.ROLES``.
        target_blocks: numbers, or the last blocks by a word of LAST_BLOCKS; by default "quarter".
        evaluation_samples: rows per task for the ratios reported before and after.
        dtype: dtype of the base; "auto" takes the checkpoint's.
        device: device of the base; "auto" takes CUDA if there is one.
        weights: precision of the base's linear layers while learning: "full", "int8", "fp8" or "nf4". What is written
            and proven is always in full precision.
        device_map: "auto", "balanced"... as accelerate takes it: spread the base over all GPUs, the CPU and disk;
            replaces ``device``.
        shard: split the base's linear layers over the processes.
        keep_modules: suffixes of modules in modules_to_save that each task keeps under heads/, and that are not merged.
        positions: which tokens count: those of the "prompt", the "last" generated one, or the "full" generation.
        max_new_tokens: length of a generation, at most.
        modality: which tokens count where rows hold images and text: "both", "text" or "image".
        granularity: one coefficient per "layer" and task, per "task", or per "rank" row of an adapter; or "factors",
            which fits the merged adapter's own factors.
        factor_rank: rank of the factors that are fitted; None for the adapters' ranks added up.
        link: from the optimised parameter to the coefficient.
        preferences: task -> its weight in the loss; 1 where it is not named.
        optimizer: "adamw", "adam" or "sgd".
        schedule: how ``lr`` changes over the steps: "constant", or "linear" or "cosine" to 0.
        objective: "null-space", "entropy" or both of them added ("both"); "match", the distance from the experts'
            outputs, or "null-space+match".
        stop: which step is kept: the "last", or the one that on held-out rows is nearest to the experts ("match").
        reduction: "mean" or "sum" over the entropies of a sample's generated tokens.
        quantile: quantile over the ratios of a sample's tokens, in place of their mean; from 0 to 1.
        unseen: tasks whose adapters are merged without any data.
        borrow_rows: for matching: of a task with at most so many rows to learn from, every second sample is another
            task's, on which its expert is matched too.
        start_from: folder of a merged adapter, or the name of a method, from whose merge matching starts.
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
    target_blocks: str | tuple[int, ...] | None = None
    evaluation_samples: int = 16
    dtype: str = "auto"
    device: str = "auto"
    weights: str = "full"
    device_map: str | None = None
    shard: bool = False
    keep_modules: tuple[str, ...] = ()
    positions: str = "prompt"
    max_new_tokens: int = 16
    modality: str = "both"
    granularity: str = "layer"
    factor_rank: int | None = None
    link: str = "identity"
    preferences: dict[str, float] | None = None
    optimizer: str = "adamw"
    schedule: str = "constant"
    objective: str = "null-space"
    stop: str = "last"
    reduction: str = "mean"
    quantile: float | None = None
    unseen: tuple[str, ...] = ()
    borrow_rows: int = 0
    start_from: str | None = None

    def __post_init__(self) -> None:
        for name, hint in _hints().items():
            object.__setattr__(self, name, _of_type(name, getattr(self, name), hint))
        self._check_numbers()
        for name, allowed in CHOICES.items():
            require_choice(name, getattr(self, name), allowed)
        ways = [self.weights != "full", self.device_map is not None, self.shard]
        _require(
            not self.shard or sum(ways) == 1, "shard needs full weights and no device_map; give only one of the three"
        )
        self._check_options()

    def _check_numbers(self) -> None:
        for name, value in {
            **vars(self),
            **{f"the preference for {t}": p for t, p in (self.preferences or {}).items()},
        }.items():
            _require(not isinstance(value, float) or math.isfinite(value), f"{name} must be finite, not {value}")
        _require(self.steps >= 0, f"steps must be 0 or more, not {self.steps}")
        _require(self.lr > 0, f"lr must be positive, not {self.lr}")
        _require(self.max_drift is None or self.max_drift >= 0, f"max_drift must be 0 or more, not {self.max_drift}")
        _require(self.tokens_per_pass is None or self.tokens_per_pass >= 1, "tokens_per_pass must be 1 or more")
        for name in ("batch_size", "max_length", "evaluation_samples", "max_new_tokens"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, not {getattr(self, name)}")
        for name in ("weight_decay", "eps", "borrow_rows"):
            _require(getattr(self, name) >= 0, f"{name} must be 0 or more, not {getattr(self, name)}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"betas must be at least 0 and below 1, not {self.betas}")

    def _check_options(self) -> None:
        blocks, start = self.target_blocks, self.start
        _require(
            not isinstance(blocks, str) or blocks in LAST_BLOCKS,
            f"target_blocks must be numbers or one of {', '.join(LAST_BLOCKS)}, not {blocks}",
        )
        inside = {"identity": True, "clip": 0 <= start <= 1, "sigmoid": 0 < start < 1}.get(self.link, start > 0)
        _require(inside, f"link {self.link} cannot give a coefficient of {start}; choose another start or link")
        _require(
            self.link != "softmax" or self.granularity != "rank",
            "softmax runs over tasks, but granularity rank has several coefficients per task; give layer or task",
        )
        if self.quantile is not None:
            require_fraction("quantile", self.quantile)
        _require(
            self.quantile is None or self.measures_ratios,
            f"quantile applies to null-space ratios, which the objective {self.objective} has none of",
        )
        _require(
            self.reduction == "mean" or self.needs_entropy,
            "reduction sum applies to entropies of generated tokens; leave it at mean, or choose the objective entropy",
        )
        _require(
            self.modality == "both" or not (self.needs_entropy or self.needs_outputs),
            f"the objective {self.objective} measures the model's output, not one modality's tokens; leave modality at"
            " both",
        )
        _require(
            self.modality != "image" or self.positions == "prompt",
            f"answers are text, so with positions {self.positions} no image token counts; leave modality at both",
        )
        for task, value in (self.preferences or {}).items():
            _require(value >= 0, f"the preference for {task} must be 0 or more, not {value}")
        self._check_factors()
        self._check_start_from()
        _require(
            not self.borrow_rows or "match" in self.objective,
            f"borrow_rows is for matching, and the objective is {self.objective}: give match or null-space+match, or"
            " leave borrow_rows out",
        )

    def _check_factors(self) -> None:
        fitted = self.granularity == "factors"
        _require(
            not fitted or self.objective == "match",
            f"granularity factors fits the experts' outputs, so the objective must be match, not {self.objective}",
        )
        _require(
            not fitted or (self.link == "identity" and self.max_drift is None),
            "factors have no link and no bound: leave link at identity and max_drift at none",
        )
        _require(
            fitted or self.factor_rank is None,
            "factor_rank is the rank of fitted factors: give granularity factors, or leave it out",
        )
        _require(
            self.factor_rank is None or self.factor_rank >= 1, f"factor_rank must be 1 or more, not {self.factor_rank}"
        )

    def _check_start_from(self) -> None:
        if self.start_from is None:
            return
        _require(
            "match" in self.objective,
            f"start_from names a merge from which matching starts, but the objective is {self.objective}: give match or"
            " null-space+match, or leave start_from out",
        )
        _require(
            self.link == "identity",
            f"coefficients of tasks are 0 where start_from starts, which link {self.link} cannot give: leave link at"
            " identity",
        )
        _require(
            self.start == 0,
            f"coefficients of tasks are 0 where start_from starts, so start must be 0, not {self.start:g}; the methods"
            " that learn set it so if it is left out",
        )

    @property
    def without_rows(self) -> tuple[str, ...]:
        """The tasks that have no rows: those unseen, and the merge that is started from."""
        return (*self.unseen, START) if self.start_from is not None else self.unseen

    @property
    def measures_ratios(self) -> bool:
        """Whether null-space ratios are part of the objective."""
        return self.objective in ("null-space", "both", "null-space+match")

    @property
    def needs_entropy(self) -> bool:
        """Whether the entropy of the merged model is part of the objective."""
        return self.objective in ("entropy", "both")

    @property
    def needs_outputs(self) -> bool:
        """Whether the experts' outputs are needed, for the objective or to choose the step that is kept."""
        return self.objective in ("match", "null-space+match") or self.stop == "match"

    @property
    def whole_base(self) -> bool:
        """Whether the base is loaded in full precision, to one device."""
        return self.weights == "full" and self.device_map is None and not self.shard

    @classmethod
    def preset(cls, name: str, **settings: Any) -> MergeConfig:
        """Return the settings of a preset.

        Args:
            name: one of PRESETS.
            settings: fields that override the preset's.

        Returns:
            The settings.

        Raises:
            NSCError: if there is no such preset.
        """
        return cls(**{**preset_settings(name), **settings})

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, ready for YAML.

        Returns:
            Field -> value, with lists for tuples.
        """
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MergeConfig:
        """Return the settings that ``to_dict`` gave.

        Args:
            values: field -> value.

        Returns:
            The settings.

        Raises:
            NSCError: naming a key that is no setting.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        _require(not unknown, f"unknown setting {', '.join(unknown)}; the settings are {', '.join(sorted(known))}")
        return cls(**values)


def learned_settings(name: str, given: Mapping[str, Any] = {}) -> dict[str, Any]:
    """Return what a learning method sets beside the defaults of MergeConfig.

    Args:
        name: one of LEARNED.
        given: settings that are given, of which the granularity decides the schedule of matching, and a merge to start
            from the start of the coefficients.

    Returns:
        Field of MergeConfig -> value.
    """
    settings = dict(LEARNED[name].settings)
    if settings.get("objective") == "match":
        granularity = given.get("granularity", settings["granularity"])
        settings |= MATCHING.get(granularity, {})
    if "match" not in given.get("objective", settings.get("objective", "")):
        settings.pop("borrow_rows", None)
    if given.get("start_from") is not None:
        settings["start"] = 0.0
    return settings


def preset_settings(name: str | None) -> dict[str, Any]:
    """Return what a preset sets.

    Args:
        name: one of PRESETS; None for no preset.

    Returns:
        Field of MergeConfig -> value; empty without a name.

    Raises:
        NSCError: if there is no such preset.
    """
    _require(name is None or name in PRESETS, f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return dict(PRESETS[name]) if name else {}


@cache
def _hints() -> dict[str, Any]:
    return get_type_hints(MergeConfig)


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """A setting as its field holds it. Raises NSCError naming the type."""
    if isinstance(value, Path):
        value = str(value)
    elif not isinstance(value, (str, Mapping)) and isinstance(value, Iterable):
        value = tuple(value)
    try:
        return typed(value, hint)
    except TypeError:
        raise NSCError(f"{name} must be {expected(hint)}, not {clipped(repr(value))}") from None


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise NSCError(message)
