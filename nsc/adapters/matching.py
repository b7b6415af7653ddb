"""Adapters on a base: which of its layers each of their tensors changes, and which layers are measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from nsc.adapters.lora import Adapter
from nsc.adapters.modules_to_save import Body, dense_stacks, split_saved
from nsc.adapters.stack import Stack, by_rank, stack_adapters
from nsc.bases import loading
from nsc.bases.llava import refuse_moving_tower
from nsc.bases.module_names import check_coverage, check_shapes, check_towers, resolve
from nsc.bases.roles import choose_targets
from nsc.config import MergeConfig


class Fitted(NamedTuple):
    """Adapters on a base: what each task keeps for itself is still with them, what is merged is in ``stack``.

    matches: task -> adapter's module name -> base's.  shapes: every linear of the base -> (out, in).  targets: what is
    measured, where something is.
    """

    adapters: dict[str, Adapter]
    matches: dict[str, dict[str, str]]
    shapes: dict[str, tuple[int, int]]
    stack: Stack
    targets: list[str]


def fit(base: str, model: nn.Module, adapters: Mapping[str, Adapter], config: MergeConfig) -> Fitted:
    """Put ``adapters`` on the body ``model`` of ``base``, and choose what is measured. Raises as ``put_on`` does."""
    fitted = put_on(base, model, adapters, config)
    names = list(fitted.stack.modules)
    return fitted._replace(targets=choose_targets(model, names, config.target_modules, config.target_blocks))


def put_on(base: str, model: nn.Module, adapters: Mapping[str, Adapter], config: MergeConfig) -> Fitted:
    """Put ``adapters`` on the body ``model`` of ``base``, of which shapes are enough; nothing is measured.

    Raises a subclass of NSCError, naming adapter and module, for anything that has no place there.
    """
    shapes = loading.linear_shapes(model)
    matches = match_adapters(adapters, shapes)
    for task, mapping in matches.items():
        check_towers(task, mapping, str(model.main_input_name))
    kept, whole = split_saved(adapters, matches, body_of(base, model), config.keep_modules)
    stack = stack_adapters(kept, matches, shapes, dense_stacks(base, whole))
    stack = by_rank(stack) if config.granularity == "rank" else stack
    refuse_moving_tower(model, stack.names)
    return Fitted(kept, matches, shapes, stack, [])


def match_adapters(adapters: Mapping[str, Adapter], shapes: Mapping[str, tuple[int, int]]) -> dict[str, dict[str, str]]:
    """Task -> adapter's module name -> base's. Raises NameMismatch for anything that has no place, or another shape."""
    matches = {}
    for task, adapter in adapters.items():
        matches[task] = resolve(task, adapter.factors, shapes)
        check_shapes(adapter, matches[task], shapes)
        check_coverage(adapter, matches[task], shapes)
    return matches


def body_of(base: str, model: nn.Module) -> Body:
    """What ``split_saved`` must know of this base, of which ``model`` is the body."""
    parameters = loading.body_parameters(model)
    shared = Counter(map(id, parameters.values()))
    tied = {name for name, parameter in parameters.items() if shared[id(parameter)] > 1}
    if outputs := loading.tied_outputs(base):
        embeddings = getattr(model, "text", model).get_input_embeddings().weight  # type: ignore[operator]
        tied |= {*outputs, *(name for name, parameter in parameters.items() if parameter is embeddings)}
    return Body(loading.linear_shapes(model), list(parameters), tied)
