"""``--method auto``: a short list of methods, each at its best scale, and ``match``; the nearest to the experts wins.

All are measured on the same held-out rows, from which ``match`` learns nothing, by their distance from what each task's
expert says. No label is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.data.modalities import feed_of
from nsc.data.sources import Source, read_data
from nsc.errors import NSCError, one_line
from nsc.evaluation.scale_search import Value, grid_of, require_finite, search_scale
from nsc.evaluation.solving import Findings, found_on
from nsc.export.result import MergeResult
from nsc.learning.held_back import hold_back
from nsc.learning.preparation import distance_from_experts
from nsc.merging.from_data import merge_by_learning
from nsc.merging.from_recipe import combine
from nsc.merging.from_rows import settled
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.spec import OF_BASE, read_recipe, with_scale
from nsc.runtime.distributed import join
from nsc.runtime.placement import input_device

TRIED = ("task-arithmetic", "tsv", "ssr", "core-ties")  # exact in factors, so that an adapter holds each of them


def merge_automatically(
    base: Base,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    config: MergeConfig,
    say: Callable[[str], Any],
    **running: Any,
) -> MergeResult:
    """Merge by whichever method comes nearest to what the experts say about held-out rows.

    Args:
        base: the base; its weights need not be loaded.
        adapters: task -> PEFT folder or Hub id.
        data: task -> what the base's feed reads.
        config: settings of ``match``, one of the methods.
        say: prints a line.
        running: how ``match`` runs: checkpoint, resume, progress.

    Returns:
        The merge in memory; its report says how all of them did.

    Raises:
        NSCError: a subclass that says what is wrong and where.
    """
    if not config.whole_base:
        raise NSCError("auto tries several merges on the whole base: leave out weights, device_map and shard")
    matched = merge_by_learning(base, adapters, data, config, "match", **running)
    assert matched.model is not None
    loaded = Base(base.id, matched.model)
    samples = read_data(data, matched.adapters, feed_of(base).read, config.unseen)
    learned, held, _ = hold_back(samples, config.seed)
    team = join(config.device)
    distance = distance_from_experts(loaded, matched.adapters, matched.by_layer, held, config, team)
    with merged_layers(matched.model, *_placed(matched)):
        tried: dict[str, dict[str, Any]] = {"match": {"distance": distance(matched.model)}}
    made = {name: _Trial(name, matched) for name in TRIED}
    for name, trial in made.items():
        tried[name] = trial.tried(loaded, learned, distance, config)
        say(f"{name}: {tried[name].get('refused') or _told(tried[name])}")
    say(f"match: {_told(tried['match'])}")
    best = min((name for name in tried if "distance" in tried[name]), key=lambda name: tried[name]["distance"])
    result = matched if best == "match" else made[best].result(base, adapters, config, tried[best]["scale"], say)
    return replace(result, report=replace(result.report, tried=tried, by_states=matched.report.by_states))


class _Trial:
    """A method on the adapters that were matched, on the same base."""

    def __init__(self, name: str, matched: MergeResult) -> None:
        assert matched.model is not None
        self.name, self.matched, self.model = name, matched, matched.model
        self.combination = Combination(matched.by_layer, read_recipe(name), device=input_device(matched.model))
        self.findings = Findings(self.combination) if self.combination.recipe.method.inputs else None

    def tried(self, base: Base, rows: Mapping[str, Any], distance: Value, config: MergeConfig) -> dict[str, Any]:
        """The best scale of the method and its distance, or why it does not merge these adapters."""
        try:
            if self.findings:
                found = found_on(base, self.findings, rows, config, join(config.device))
                self.combination = self.combination.with_found(found)
            merged = as_one(self.combination.at_scale(1.0))
            require_finite(merged)
            best = search_scale(self.model, merged, distance, grid_of("match"))
        except NSCError as error:
            return {"refused": one_line(error)}
        return {"scale": best.scale, "distance": best.curve[best.scale]}

    def result(
        self, base: Base, adapters: Mapping[str, Any], config: MergeConfig, scale: float, say: Callable[[str], Any]
    ) -> MergeResult:
        """The merge by this method at a scale."""
        own = MergeConfig(**{key: getattr(config, key) for key in OF_BASE})
        recipe = with_scale(self.combination.recipe, scale)
        result = combine(Base(base.id), adapters, recipe, own, None, None, False, say)
        combination = self.combination.at_scale(scale)
        result = replace(result, combination=combination, model=self.model, batch=self.matched.batch)
        return settled(result, self.findings) if self.findings else result


def _told(entry: Mapping[str, Any]) -> str:
    scale = f" at scale {entry['scale']:g}" if "scale" in entry else ""
    return f"distance from the experts {entry['distance']:.4f}{scale}"


def _placed(result: MergeResult) -> tuple[Any, Any]:
    """The merge as ``merged_layers`` takes it, where the model lies."""
    assert result.model is not None
    stack, lam = result.merged.in_model()
    return stack, lam.to(input_device(result.model))
