"""All methods on the same adapters, base and labelled rows: one model in memory, every merge put into it in turn.

A method is a name of ``read_recipe``, one that learns (``LEARNED``), or both: nsc+ties gives the coefficients that nsc
learned to ties as weights. What cannot be merged, or is not defined, is a row with its reason.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from nsc.adapters.lora import fingerprint, read_adapters
from nsc.bases.base_model import Base
from nsc.config import AUTO, LEARNED, MergeConfig, learned_settings
from nsc.console import printer
from nsc.data.labelled import read_all_labelled
from nsc.data.modalities import feed_of
from nsc.data.sources import Source, place_of, read_data
from nsc.errors import DataError, NSCError, one_line
from nsc.evaluation.scale_search import SEARCHES, Grid, LabelledLoss, Value, default_search, grid_of
from nsc.evaluation.scoring import Exam, exams_of
from nsc.evaluation.table import ALONE, BARE, JSON, Comparison, Row
from nsc.evaluation.trial import Planned, ScaleSearch, Stage, row_of
from nsc.learning.preparation import stack_on, targets_of
from nsc.paths import absolute, held, move_into_place, partial_folder
from nsc.recipes.spec import read_recipe, split_learned
from nsc.runtime.placement import input_device

RECORD = "compare.yaml"


def compare(
    base: str | Path,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    test: Mapping[str, Source],
    methods: Sequence[str],
    out: str | Path,
    *,
    validation: Mapping[str, Source] | None = None,
    search: str | None = None,
    grid: Grid | None = None,
    metrics: Mapping[str, str] = {},
    config: Mapping[str, Any] = {},
    settings: Mapping[str, Mapping[str, Any]] = {},
    resume: bool = False,
    progress: bool = True,
) -> Comparison:
    """Score merging methods on labelled rows, and write table, figure, JSON and record to a new folder.

    Args:
        base: folder or Hub id.
        adapters: task -> PEFT folder or Hub id.
        data: task -> unlabeled rows, as ``nsc.merge`` takes them; empty where no method needs any.
        test: task -> labelled rows to score, as ``read_labelled`` takes them.
        methods: names that ``nsc methods`` lists, or nsc+NAME.
        out: folder that does not exist yet.
        validation: task -> labelled rows for the search, none of which is in ``test``.
        search: how to find the scale of a method whose ``settings`` give none: "labels" on the validation rows,
            "match" by what the experts say about unlabeled rows, "null-space" on ``config["evaluation_samples"]``
            unlabeled rows per task, or "none", which takes 1. By default "match" for regressions and "none" for all
            others.
        grid: the scales to try; by default those of ``grid_of``.
        metrics: task -> one of METRICS; by default accuracy, pearson or loss, by the head.
        config: fields of MergeConfig, which override what each learning method has by itself.
        settings: method -> its own settings.
        resume: keep the rows that an interrupted comparison left.
        progress: print a line per method.

    Returns:
        The comparison, as it was written.

    Raises:
        NSCError: a subclass, for anything that concerns all methods, or a name or setting that does not exist. A method
            that cannot be merged is a row with its reason.
    """
    out, validation, grid = Path(out), validation or {}, grid or grid_of(search or "match")
    planned = {name: _plan(name, config, settings, search, bool(data)) for name in methods}
    _refuse(out, planned, data, validation, search or "none", settings)
    say = printer(progress)
    with held(out):
        stage, exams = _prepare(Base(absolute(base)), adapters, data, test, config, metrics, say)
        held_out = _held_out(stage, validation, test, metrics)
        scales, planned = _scales(search, stage, held_out, grid, planned, say)
        by = search or ("match" if scales else "none")
        record = _record(stage, data, test, validation, metrics, planned, by, grid)
        of_task, identity = {task: exam.metric for task, exam in exams.items()}, _identity(record)
        done = _begin(out, identity, record["methods"], resume)
        for name in (ALONE, BARE, *methods):
            if name not in done:
                row = row_of(name, stage, exams, planned.get(name), done.get(ALONE), scales)
                done[name] = replace(row, settings=record["methods"].get(name, {}))
            comparison = Comparison(of_task, tuple(done.values()), identity)
            comparison.write(partial_folder(out))
            say(_line(done[name]))
        return _finish(replace(comparison, rows=tuple(done[name] for name in (ALONE, BARE, *methods))), out, record)


def _scales(
    search: str | None,
    stage: Stage,
    held_out: Mapping[str, Exam],
    grid: Grid,
    planned: dict[str, Planned],
    say: Callable[[str], Any],
) -> tuple[ScaleSearch | None, dict[str, Planned]]:
    """How scales are searched, and what is left to search: nothing where nobody asked for it and it cannot be done."""
    if not any(chosen.searched for chosen in planned.values()):
        return None, planned
    try:
        return ScaleSearch(_value(search or "match", stage, held_out), grid), planned
    except NSCError as error:
        if search is not None or isinstance(error, DataError):
            raise
        say(f"scales are 1, for they could not be searched by match: {one_line(error)}")
        return None, {name: chosen._replace(searched=False) for name, chosen in planned.items()}


def _value(search: str, stage: Stage, held_out: Mapping[str, Exam]) -> Value:
    """What a search makes as small as it can."""
    if search == "labels":
        return LabelledLoss(stage.model, held_out)
    return stage.match() if search == "match" else stage.null_space()


def _refuse(
    out: Path,
    planned: Mapping[str, Planned],
    data: Mapping[str, Source],
    validation: Mapping[str, Source],
    search: str,
    settings: Mapping[str, Any],
) -> None:
    """Raise NSCError for what need not be tried."""
    if out.exists():
        raise NSCError(f"{out} exists already; choose another folder, or move it away")
    if search not in SEARCHES:
        raise NSCError(f"search must be one of {', '.join(SEARCHES)}, not {search}")
    if search == "labels" and not validation:
        raise NSCError("a search by labels needs rows that are not test rows: give --validation TASK=FILE")
    learning = [
        name for name, chosen in planned.items() if chosen.config or (chosen.recipe and chosen.recipe.needs_rows)
    ]
    if not data and (learning or search in ("null-space", "match")):
        raise NSCError(f"{learning[0] if learning else 'the search'} needs unlabeled rows: give --data TASK=FILE")
    if strange := sorted(set(settings) - set(planned) - set(LEARNED)):
        raise NSCError(f"settings are given for {', '.join(strange)}, which is not among the methods")


def _prepare(
    base: Base,
    adapters: Mapping[str, str | Path],
    data: Mapping[str, Source],
    test: Mapping[str, Source],
    config: Mapping[str, Any],
    metrics: Mapping[str, str],
    say: Callable[[str], Any],
) -> tuple[Stage, dict[str, Exam]]:
    """data: empty where nothing needs any."""
    read, common = read_adapters(adapters), MergeConfig.from_dict(config)
    if common.keep_modules:
        raise NSCError("layers that each task keeps (keep_modules) cannot be scored in one model")
    samples = read_data(data, read, feed_of(base).read, common.unseen) if data else {}
    rows = read_all_labelled(base, test, read)
    base, matched = stack_on(base, read, common)
    measured = targets_of(base, matched.stack, common.target_modules, common.target_blocks)
    say(f"base {base.id}: {len(matched.stack.names)} layers merged, {len(measured)} measured")
    exams = exams_of(base, matched.adapters, rows, common.max_length, metrics)
    say("test rows: " + ", ".join(f"{task} {len(rows[task].labels)} ({exams[task].metric})" for task in exams))
    return Stage(base, matched, samples, common, say), exams


def _held_out(
    stage: Stage, validation: Mapping[str, Source], test: Mapping[str, Source], metrics: Mapping[str, str]
) -> dict[str, Exam]:
    """The exams of the validation rows. Raises DataError where a row is in the test too."""
    if not validation:
        return {}
    rows, tested = (read_all_labelled(stage.base, sources, stage.matched.adapters) for sources in (validation, test))
    for task in rows:
        if shared := sum(sample in set(tested[task].samples) for sample in rows[task].samples):
            raise DataError(f"task {task}: {shared} validation rows are also test rows; choose others")
    return exams_of(stage.base, stage.matched.adapters, rows, stage.config.max_length, metrics)


def _plan(
    name: str, config: Mapping[str, Any], settings: Mapping[str, Mapping[str, Any]], search: str | None, rows: bool
) -> Planned:
    learner, recipe = split_learned(name)
    if learner == AUTO:
        raise NSCError("auto chooses among methods for nsc merge; a comparison names each of them")
    own = dict(settings.get(name, {}))
    learning = None
    if learner:
        mine = settings.get(learner, {}) if recipe else own
        learning = MergeConfig.from_dict({**learned_settings(learner, {**config, **mine}), **config, **mine})
        if recipe and learning.granularity in ("rank", "factors"):
            raise NSCError(
                f"{name}: the weights of a method belong to layers or tasks, which {learner} does not learn by"
                f" {learning.granularity}; give granularity layer or task"
            )
    chosen = read_recipe(recipe, **own) if recipe else None
    search = default_search(name, "scale" in own, rows) if search is None else search
    return Planned(learning, chosen, chosen is not None and search != "none" and "scale" not in own)


def _identity(record: Mapping[str, Any]) -> str:
    """Of all that every row depends on."""
    told = {key: value for key, value in record.items() if key not in ("made", "methods")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _begin(out: Path, identity: str, methods: Mapping[str, Any], resume: bool) -> dict[str, Row]:
    """The rows that an interrupted comparison left, of the methods and settings of this one, and not refused."""
    folder = partial_folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / JSON).exists():
        return {}
    if not resume:
        raise NSCError(f"there is an interrupted comparison in {folder}: add --resume, or remove that folder")
    left = Comparison.read(folder / JSON)
    if left.identity != identity:
        raise NSCError(
            f"{folder} belongs to other adapters, rows or settings; remove it, or compare with the same ones"
        )
    return {row.method: row for row in left.rows if not row.refused and row.settings == methods.get(row.method, {})}


def _finish(comparison: Comparison, out: Path, record: Mapping[str, Any]) -> Comparison:
    folder = partial_folder(out)
    comparison.write(folder)
    (folder / RECORD).write_text(yaml.safe_dump(dict(record), sort_keys=False, allow_unicode=True), encoding="utf-8")
    if os.path.lexists(out):
        raise NSCError(f"{out} was made meanwhile; move it away, and add --resume")
    move_into_place(folder, out)
    return comparison


def _record(
    stage: Stage,
    data: Mapping[str, Source],
    test: Mapping[str, Source],
    validation: Mapping[str, Source],
    metrics: Mapping[str, str],
    planned: Mapping[str, Planned],
    search: str,
    grid: Grid,
) -> dict[str, Any]:
    """What replays the comparison, in plain values."""
    device = input_device(stage.model)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    place = partial(map, lambda item: (item[0], place_of(item[1])))
    methods = {
        name: {
            **({"recipe": chosen.recipe.to_dict()} if chosen.recipe else {}),
            **({"learned": chosen.config.to_dict()} if chosen.config else {}),
            "searched": chosen.searched,
        }
        for name, chosen in planned.items()
    }
    made = {
        "command": sys.argv,
        "when": time.strftime("%Y-%m-%d %H:%M:%S"),
        "device": f"{device.type} {name}",
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
    }
    read = stage.matched.adapters
    return {
        "base": stage.base.id,
        "adapters": {t: {"path": str(a.path.resolve()), "fingerprint": fingerprint(a)} for t, a in read.items()},
        "data": dict(place(data.items())),
        "test": dict(place(test.items())),
        "validation": dict(place(validation.items())),
        "metrics": dict(metrics),
        "search": search,
        "grid": json.loads(json.dumps(asdict(grid))),
        "config": stage.config.to_dict(),
        "methods": json.loads(json.dumps(methods)),
        "made": made,
    }


def _line(row: Row) -> str:
    if row.refused:
        return f"{row.method}: refused: {row.refused}"
    scale = "" if row.scale is None else f" at scale {row.scale:g}"
    took = {"preparing": row.preparation, "learning": row.optimisation, "searching": row.search}
    seconds = "".join(f", {x:.1f} s {what}" for what, x in took.items() if x)
    return f"{row.method}{scale}: {row.mean:.1f} % of fine-tuned{seconds}"
