"""The merge from which matching starts: an adapter that was written before, or a method's merge, made first.

It is one more adapter of the merge, without rows: its coefficients start at 1, and all others at 0. Rows that are held
back to choose a step take no part in making it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import Matched, beside, match_adapters
from nsc.adapters.peft_folder import CONFIG
from nsc.adapters.stack import stack_adapters
from nsc.bases.base_model import Base
from nsc.config import LEARNED, START, MergeConfig
from nsc.errors import NSCError
from nsc.evaluation.scale_search import grid_of, require_finite, search_scale
from nsc.evaluation.solving import completed_on
from nsc.learning.held_back import hold_back
from nsc.learning.preparation import distance_from_experts
from nsc.methods import LowRank
from nsc.paths import absolute
from nsc.recipes.combination import Combination
from nsc.recipes.merged_factors import exact_or_nearest
from nsc.recipes.spec import names, read_recipe
from nsc.recipes.updates import WeightedSum, as_lora, as_stack
from nsc.runtime.placement import input_device


class Started(NamedTuple):
    """Adapters beside the merge that is started from, if any.

    Attributes:
        matched: all of them on the base.
        samples: task -> rows, none for that merge.
        told: which merge it is and how it was made, for the report; empty without any.
    """

    matched: Matched
    samples: dict[str, Sequence[Any]]
    told: dict[str, Any]

    @property
    def factors(self) -> dict[str, LowRank]:
        """Layer -> its update in the merge that is started from, for the record; empty without any."""
        adapter = self.matched.adapters.get(START) if self.told else None
        return {name: LowRank(f.B, f.A) for name, f in adapter.factors.items()} if adapter else {}


def find_start(config: MergeConfig) -> MergeConfig:
    """Find what ``start_from`` names, before anything is read.

    Args:
        config: all settings of learning.

    Returns:
        The same, with the absolute path of a folder.

    Raises:
        NSCError: if it is neither a folder with an adapter nor a method whose merge can be made first.
    """
    start = config.start_from
    if start is None:
        return config
    if start in names():
        if not config.whole_base:
            raise NSCError(
                f"start_from {start} makes that merge first, on the whole base: leave out weights, device_map and"
                " shard, or make it in a run of its own and give its folder"
            )
        return config
    folder = Path(start).expanduser()
    if (folder / "config.json").is_file() and not (folder / CONFIG).exists():
        raise NSCError(f"start_from {start} holds a whole model (--full): save that merge as an adapter, and give that")
    if folder.is_dir():
        return replace(config, start_from=absolute(folder))
    if start.partition("+")[0] in LEARNED:
        raise NSCError(
            f"start_from {start} names a method that learns: make that merge in a run of its own and give its folder"
        )
    raise NSCError(
        f"start_from {start} is neither the folder of a merged adapter nor a method: `nsc methods` lists the names"
    )


def started(
    base: Base,
    matched: Matched,
    samples: Mapping[str, Sequence[Any]],
    config: MergeConfig,
    say: Callable[[str], Any] = lambda text: None,
) -> Started:
    """Put the merge that is started from beside the adapters.

    Args:
        base: with weights.
        matched: the adapters on it.
        samples: task -> what its feed read.
        config: all settings of learning, as ``find_start`` returned them.
        say: prints a line.

    Returns:
        The adapters with that merge as the last; as they were where none is to be started from.

    Raises:
        NSCError: a subclass, for a merge that does not go with these adapters, or cannot be made.
    """
    start = config.start_from
    if start is None:
        return Started(matched, dict(samples), {})
    if matched.stack.dense:
        raise NSCError(
            f"adapters fine-tuned {', '.join(matched.stack.dense)} whole, and start_from is for layers with LoRA alone:"
            " keep those layers for their own tasks with keep_modules"
        )
    updates, told = (_by_method if start in names() else _of_folder)(base, matched, samples, config)
    say(f"starting from {start}" + (f" at scale {told['scale']:g}" if "scale" in told else ""))
    return Started(beside(matched, START, as_lora(updates)), {**samples, START: []}, {"from": start, **told})


def _of_folder(base: Base, matched: Matched, samples: Any, config: MergeConfig) -> tuple[dict[str, LowRank], Any]:
    """The update of each layer in an adapter."""
    adapter = read_adapter(str(config.start_from), "start_from")
    if adapter.saved:
        raise NSCError(
            f"start_from {config.start_from} also holds {min(adapter.saved)} (modules_to_save), and a start is LoRA"
            " alone: give an adapter without heads"
        )
    one = {START: adapter}
    stack = stack_adapters(one, match_adapters(one, matched.shapes), matched.shapes)
    merged = WeightedSum(stack, torch.ones(stack.owned.shape))
    return {name: _low_rank(merged.update(name)) for name in merged.names}, {}


def _by_method(
    base: Base, matched: Matched, samples: Mapping[str, Sequence[Any]], config: MergeConfig
) -> tuple[dict[str, LowRank], dict[str, Any]]:
    """The update of each layer by a method with its default settings, at the scale nearest to the experts."""
    rows = hold_back(samples, config.seed)[0] if config.stop == "match" else samples
    made = Combination(matched.stack, read_recipe(str(config.start_from)), device=input_device(base.model))
    if made.recipe.needs_rows and config.unseen:
        raise NSCError(
            f"start_from {config.start_from} is made from rows of every task, and {config.unseen[0]} has none:"
            " name a method that reads none"
        )
    made = completed_on(base, made, rows, config)
    ranks = {name: sum(module.ranks) for name, module in matched.stack.modules.items()}
    factors = exact_or_nearest(made, ranks)
    stack = as_stack({name: LowRank(f.B, f.A) for name, f in factors.items()})
    require_finite(stack)
    distance = distance_from_experts(base, matched.adapters, matched.stack, rows, config)
    best = search_scale(base.model, stack, distance, grid_of("match"))
    told = {"scale": best.scale, "distance": best.curve[best.scale], "error": max(f.error for f in factors.values())}
    return {name: LowRank(f.B * best.scale, f.A) for name, f in factors.items()}, told


def _low_rank(update: Any) -> LowRank:
    assert isinstance(update, LowRank)  # of a layer with LoRA
    return update
