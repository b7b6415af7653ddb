"""``nsc.merge``: which of its ways a merge goes, by method and search."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from nsc.bases.base_model import Base
from nsc.config import AUTO, LEARNED, MergeConfig, learned_settings
from nsc.console import printer
from nsc.data.sources import Source
from nsc.errors import NSCError
from nsc.evaluation.scale_search import default_search
from nsc.export.result import MergeResult
from nsc.merging.automatic import merge_automatically
from nsc.merging.from_data import merge_by_learning
from nsc.merging.from_recipe import Masks, Weights, combine, combine_learned, require_weights_of_tasks
from nsc.merging.from_rows import find_magnitudes, find_updates, refuse_without_rows, settled
from nsc.merging.tuning import Search, at_best_scale, read_search, refuse_base, refuse_search
from nsc.paths import absolute, states_of_sources
from nsc.recipes.spec import Recipe, read_settings
from nsc.runtime.distributed import join
from nsc.runtime.placement import one_device


def merge(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source] | None = None,
    config: MergeConfig | None = None,
    *,
    method: str | Recipe = "nsc",
    search: str | None = None,
    validation: Mapping[str, Source] | None = None,
    scales: tuple[float, float] | None = None,
    over: Mapping[str, Sequence[Any]] | None = None,
    coefficients: Weights = None,
    masks: Masks = None,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    **settings: Any,
) -> MergeResult:
    """Merge LoRA adapters, by default with one coefficient per layer and task, learned from unlabeled data.

    Under torchrun or accelerate launch the processes share each step and all return the same result; only the first one
    prints, keeps the checkpoint and should save.

    Args:
        base: folder or Hub id.
        adapters: task -> PEFT folder or Hub id.
        data: task -> unlabeled rows: what ``read_texts`` takes (JSONL, parquet, text file, ``hub:`` dataset, texts), or
            ``read_images`` (folder, parquet file, ``hub:`` dataset, images) where the base takes images. Methods
            that learn nothing do not read them, but those that fit the experts' updates on rows, and the setting aim.
        config: settings of learning; fields given in ``settings`` override it.
        method: a name that ``nsc methods`` lists; "nsc+NAME" to learn coefficients first and use them as the weights of
            another method; or a recipe from ``read_recipe``.
        search: how to find the scale of another method: "match" by the distance from what the experts say about
            unlabeled rows, "null-space" by the ratios of ``evaluation_samples`` unlabeled rows per task, "labels" by
            the loss on ``validation``, or "none", which takes the setting ``scale``, by default 1. By default "match"
            for regressions with ``data`` and no ``scale``, else "none".
        validation: task -> labelled rows, as ``read_labelled`` takes them.
        scales: lowest and highest scale of the search; 0.1 and 1.5 by default.
        over: one setting of the method -> values that the search tries, each at its best scale.
        coefficients: (M, K), or the folder of an earlier merge, as weights of a method that learns nothing.
        masks: layer -> (K, m, d) bool: which entries a method that drops entries at random keeps.
        checkpoint: file that keeps the state while learning.
        resume: continue from ``checkpoint``.
        progress: print lines and a progress bar.
        settings: settings of the method; by default fields of MergeConfig.

    Returns:
        The merge in memory: ``result.save(folder)`` writes and proves it.

    Raises:
        NSCError: a subclass that says what is wrong and where.
    """
    data, validation, asked = data or {}, validation or {}, search is not None
    scaled = "scale" in settings or (isinstance(method, Recipe) and method.scale != 1)
    label = method.label if isinstance(method, Recipe) else method
    search = default_search(label, scaled, bool(data)) if search is None else search
    searches = search != "none"
    recipe, name, config = _chosen(method, config, settings, searches)
    refuse_search(search, label, scaled, data, validation, scales)
    if asked and searches:
        refuse_base(search, config)
    if recipe and recipe.needs_rows:
        refuse_without_rows(recipe, data, config)
    one_device(config.device)  # which refuses what is not there
    home = Base(absolute(base))
    sources = states_of_sources(home.id, *adapters.values())
    chosen = read_search(search, home, adapters, data, validation, scales, over, not asked)
    say = printer(progress and join(config.device).first)
    if recipe and not recipe.learned:
        if resume:
            raise NSCError(f"method {recipe.label} learns nothing, so there is nothing to resume; leave it out")
        result = combine(home, adapters, recipe, config, coefficients, masks, searches, say)
        return _finished(replace(result, sources=sources), data, chosen, config, say)
    if coefficients is not None or (masks and not recipe):
        what = "coefficients" if coefficients is not None else "masks"
        raise NSCError(
            f"{what} belong to other methods, such as task-arithmetic or dare; {name} learns its coefficients"
        )
    if recipe:
        require_weights_of_tasks(recipe, config.granularity)
    if config.start_from is not None and (recipe or name == AUTO):
        raise NSCError(
            f"{recipe.label if recipe else AUTO} takes no start_from, which belongs to matching alone: leave it out, or"
            " give method match"
        )
    place = Path(checkpoint) if checkpoint else None
    if name == AUTO:
        result = merge_automatically(
            home, adapters, data, config, say, checkpoint=place, resume=resume, progress=progress
        )
    else:
        result = merge_by_learning(home, adapters, data, config, name, place, resume, progress)
    result = combine_learned(result, recipe, config, masks) if recipe else result
    result = replace(result, checkpoint=place)
    return _finished(replace(result, sources=sources), data, chosen, config, say)


def _finished(
    result: MergeResult,
    data: Mapping[str, Source],
    search: Search | None,
    config: MergeConfig,
    say: Callable[[str], None],
) -> MergeResult:
    """The merge with what rows have to tell of its updates and of its scale."""
    findings = None
    if result.recipe and result.recipe.method.inputs:
        result, findings = find_updates(result, data, config, say)
    if result.recipe and result.recipe.aim is not None:
        result = find_magnitudes(result, data, config)
    if search:
        result = at_best_scale(result, search, config, say)
    if findings:
        result = settled(result, findings)
    say(result.report.summary())
    return result


def _chosen(
    method: str | Recipe, config: MergeConfig | None, settings: Mapping[str, Any], searches: bool
) -> tuple[Recipe | None, str, MergeConfig]:
    """What is made of the adapters, the name of what learns, and its settings, over its own defaults."""
    if isinstance(method, Recipe):
        recipe: Recipe | None = method
        ours = read_settings(method.label, settings, searches)[1]
        if others := sorted(set(settings) - {f.name for f in fields(MergeConfig)}):
            raise NSCError(
                f"{others[0]} is given beside a recipe, which already holds all settings; set it in the recipe"
            )
    else:
        recipe, ours = read_settings(method, settings, searches)
    name = (recipe.learned or "") if recipe else str(method)
    if config is None:
        return recipe, name, MergeConfig(**{**(learned_settings(name, ours) if name else {}), **ours})
    meant = LEARNED[name].settings.get("objective") if name else None
    if meant and config.objective != meant:
        raise NSCError(
            f"method {name} needs the objective {meant}, but config has {config.objective}; change one of them"
        )
    return recipe, name, replace(config, **ours)
