"""The scale of one merge by another method, found on its own base: without labels, or by labelled rows held out.

The base is loaded once, the merge made once, at scale 1, and put into the base once; each scale tried is then one
number in each layer and one forward of the rows. What is found is the recipe's scale, as if it had been given.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from nsc.bases import loading
from nsc.bases.base_model import Base
from nsc.config import MergeConfig
from nsc.data.labelled import Labelled, read_all_labelled
from nsc.data.modalities import example_of, feed_of
from nsc.data.sources import Source, place_of, read_data
from nsc.errors import DataError, NSCError, one_line
from nsc.evaluation.scale_search import (
    MEASURES,
    SEARCHES,
    Grid,
    LabelledLoss,
    SearchResult,
    Value,
    grid_of,
    require_finite,
    search_scale,
)
from nsc.evaluation.scoring import exams_of
from nsc.export.result import MergeResult
from nsc.learning.held_back import HeldBack
from nsc.learning.preparation import distance_from_experts, evaluation_ratio
from nsc.merging.report_builder import describe_recipe
from nsc.recipes.combination import Combination, as_one
from nsc.recipes.spec import OF_SEARCH, read_recipe, split_learned, write_settings
from nsc.runtime.distributed import join


class Search(NamedTuple):
    """A search of the scale of one merge.

    Attributes:
        by: one of MEASURES.
        sources: task -> where its rows are.
        labelled: task -> the rows that were read, for a search by labels.
        grid: the scales to try.
        over: one setting of the method, and the values of it to try, each at its best scale; None for none.
        by_default: whether nobody asked for it, so that the scale stays 1 where it cannot be searched.
    """

    by: str
    sources: Mapping[str, Source]
    labelled: dict[str, Labelled]
    grid: Grid
    over: tuple[str, Sequence[Any]] | None = None
    by_default: bool = False


def refuse_search(
    search: str,
    method: str,
    scaled: bool,
    data: Mapping[str, Any],
    validation: Mapping[str, Any],
    scales: tuple[float, float] | None,
) -> None:
    """Refuse arguments that are no search, or not one for this method.

    Args:
        search: one of SEARCHES.
        method: name of a method.
        scaled: whether a scale is given.
        data: task -> unlabeled rows.
        validation: task -> labelled rows.
        scales: lowest and highest scale, if given.

    Raises:
        NSCError: naming the argument and the remedy.
    """
    if search not in SEARCHES:
        raise NSCError(f"search must be one of {', '.join(SEARCHES)}, not {search}")
    if validation and search != "labels":
        raise NSCError("validation rows are only used by a search by labels: give --search labels, or leave them out")
    if search == "none":
        if scales:
            raise NSCError(
                "scales are the range of a search: give --search match, labels or null-space, or leave the range out"
            )
        return
    learned, recipe = split_learned(method)
    if recipe is None:
        raise NSCError(
            f"method {method} has no scale to search, since it learns its coefficients; search the scale of"
            f" another method, such as ties or {learned}+ties"
        )
    if scaled:
        raise NSCError("a scale is given, so there is none to search: leave out the scale or the search")
    if search == "labels" and not validation:
        raise NSCError("a search by labels needs labelled rows: give --validation TASK=FILE for each task")
    if search in ("null-space", "match") and not data:
        by = "null-space ratios" if search == "null-space" else "the experts' outputs"
        raise NSCError(f"a search by {by} needs unlabeled rows: give --data TASK=FILE for each task")


def refuse_base(search: str, config: MergeConfig) -> None:
    """Refuse a search on a base that is not in one place, or by the outputs of one that is in no single model.

    Args:
        search: one of SEARCHES but "none".
        config: settings of the base and of learning.

    Raises:
        NSCError: naming the argument and the remedy.
    """
    if not config.whole_base:
        raise NSCError("a search needs the whole base on one device: leave out weights, device_map and shard")
    if search != "null-space" and config.keep_modules:
        raise NSCError(
            "layers that each task keeps (keep_modules) are in no single model on which outputs could be tried"
            " on: search by null-space ratios, or give a scale"
        )


def read_search(
    search: str,
    base: Base,
    adapters: Collection[str],
    data: Mapping[str, Source],
    validation: Mapping[str, Source],
    scales: tuple[float, float] | None,
    over: Mapping[str, Sequence[Any]] | None = None,
    by_default: bool = False,
) -> Search | None:
    """Read what a search needs; arguments are those of ``nsc.merge``, which ``refuse_search`` has checked.

    Args:
        search: one of SEARCHES.
        base: what it takes decides how rows are read.
        adapters: names of the tasks.
        data: task -> unlabeled rows.
        validation: task -> labelled rows.
        scales: lowest and highest scale, if given.
        over: a setting of the method -> values to try, if given.
        by_default: whether nobody asked for it.

    Returns:
        The search; None for "none".

    Raises:
        NSCError: for more than one setting, or one without values.
        DataError: for labelled rows that cannot be read, or of other tasks.
    """
    if over and (search == "none" or len(over) > 1 or not next(iter(over.values()))):
        raise NSCError("over takes one setting and its values, such as density=0.1,0.2, beside a search of the scale")
    if search == "none":
        return None
    labelled = read_all_labelled(base, validation, adapters) if search == "labels" else {}
    return Search(
        search,
        validation if labelled else data,
        labelled,
        grid_of(search, scales),
        next(iter(over.items())) if over else None,
        by_default,
    )


def at_best_scale(result: MergeResult, search: Search, config: MergeConfig, say: Callable[[str], None]) -> MergeResult:
    """Find the scale of a merge, or leave it at 1, with a warning, where nobody asked for that and it cannot be found.

    Args:
        result: a merge by another method, whose base may or may not be in memory.
        search: how, and on which rows.
        config: settings of the base and of the rows.
        say: prints a line.

    Returns:
        The merge at that scale, with the base that it was found on in memory.

    Raises:
        NSCError: a subclass, for unreadable rows; and if the search was asked for, for a base that is not in one place,
            a merge that is not finite, or if no scale has a finite loss.
    """
    try:
        refuse_base(search.by, config)
        return _find_scale(result, search, config, say)
    except NSCError as error:
        if not search.by_default or isinstance(error, DataError):
            raise
        why = f"the scale is 1, for it could not be searched by {search.by}: {one_line(error)}"
        return replace(result, report=replace(result.report, warnings=[*result.report.warnings, why]))


def _find_scale(result: MergeResult, search: Search, config: MergeConfig, say: Callable[[str], None]) -> MergeResult:
    assert result.combination is not None
    base = Base(result.record.base, result.model)
    base = base if result.model else loading.load(base, config.dtype, config.device)
    targets, value = _value(result, base, search, config)
    found = []
    for combination in _candidates(result.combination, search):
        merged = as_one(combination)
        require_finite(merged)
        said = f" of {search.over[0]} {_setting(combination, search)}" if search.over else ""
        say(f"searching the scale{said} from {search.grid.low:g} to {search.grid.high:g} by {search.by}")
        found.append((combination, search_scale(base.model, merged, value, search.grid)))
    combination, best = min(found, key=lambda pair: pair[1].curve[pair[1].scale])
    tried = {_setting(c, search): s.curve[s.scale] for c, s in found} if search.over else {}
    if isinstance(value, HeldBack):
        by_states = value.agreement.by_states(result.stack.tasks)
        result = replace(result, report=replace(result.report, by_states=by_states))
    combination = combination.at_scale(best.scale)
    return _described(replace(result, model=base.model, combination=combination), best, search, targets, config, tried)


def _candidates(combination: Combination, search: Search) -> Iterator[Combination]:
    """The merge at scale 1, with each value of the setting that is searched; what was learned is the same for all."""
    if search.over is None:
        yield combination.at_scale(1.0)
        return
    key, values = search.over
    if combination.recipe.method.inputs:
        raise NSCError(f"{combination.recipe.label} is found from rows, at one value of {key}: search its scale alone")
    if key == "aim" and not combination.magnitudes:
        raise NSCError("aim is measured on rows before it is searched: give a first value too, such as --set aim=0.4")
    for value in values:
        recipe = combination.recipe
        told = {k: v for k, v in recipe.to_dict().items() if k != "method"} | {key: value, "scale": 1.0}
        other = replace(read_recipe(recipe.full_name, **told), learned=recipe.learned)
        yield combination.with_recipe(other)


def _setting(combination: Combination, search: Search) -> str:
    """The value of the setting that is searched, as text."""
    return str(combination.recipe.to_dict()[search.over[0]]) if search.over else ""


def _value(result: MergeResult, base: Base, search: Search, config: MergeConfig) -> tuple[list[str], Value]:
    """The modules that are measured, for the record, and the value of a model that is searched for."""
    adapters = result.adapters
    if search.by == "labels":
        exams = exams_of(base, adapters, search.labelled, config.max_length, dict.fromkeys(adapters, "loss"))
        return result.record.targets, LabelledLoss(base.model, exams)
    samples = read_data(search.sources, adapters, feed_of(base).read, config.unseen)
    if search.by == "match":
        team = join(config.device)
        return result.record.targets, distance_from_experts(base, adapters, result.by_layer, samples, config, team)
    ratio = evaluation_ratio(base, result.stack, samples, config)
    return ratio.targets, ratio


def _described(
    result: MergeResult,
    best: SearchResult,
    search: Search,
    targets: list[str],
    config: MergeConfig,
    tried: Mapping[str, float],
) -> MergeResult:
    assert result.combination is not None and result.model is not None
    recipe, facts = result.combination.recipe, _search_facts(best, search, config, tried)
    report = replace(describe_recipe(result.report, recipe), searched=facts)
    report = replace(report, warnings=report.warnings + best.warnings)
    record = replace(result.record, settings=write_settings(recipe, config), targets=targets, searched=facts)
    if search.by != "labels":
        record = replace(record, data=facts["rows"])
    base = Base(result.record.base, result.model)
    batch = result.batch or example_of(base)
    return replace(result, report=report, record=record, batch=batch)


def _search_facts(
    best: SearchResult, search: Search, config: MergeConfig, tried: Mapping[str, float]
) -> dict[str, Any]:
    """How the scale was found, in plain values."""
    settings = config.to_dict()
    return {
        "search": search.by,
        "measure": MEASURES[search.by],
        "scales": [search.grid.low, search.grid.high],
        "steps": list(search.grid.steps),
        "rows": {task: place_of(source) for task, source in search.sources.items()},
        **{key: settings[key] for key in OF_SEARCH},
        "best": best.scale,
        "seconds": best.seconds,
        "curve": best.curve,
        **({"over": search.over[0], "tried": dict(tried)} if search.over else {}),
    }
