"""The report of a merge, put together from what was merged, decided and learned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from nsc.adapters.lora import Adapter
from nsc.adapters.stack import Stack
from nsc.config import LEARNED, PAPER_REACH, MergeConfig
from nsc.export.programs import vllm_rank
from nsc.export.report import Report
from nsc.learning.coefficients import starts
from nsc.learning.loop import Learned
from nsc.recipes.spec import Recipe, method_of, split_learned


def describe_stack(base: str, stack: Stack, coefficients: Tensor | None, start: float, method: str = "nsc") -> Report:
    """Report what is known without learning: ranks, scales, condition numbers, and coefficients where there are any.

    Args:
        base: id of the base.
        stack: the adapters on it.
        coefficients: coefficients of the stack, or None.
        start: initial value of the coefficients.
        method: the method, as ``nsc.merge`` takes it.

    Returns:
        The report.
    """
    rank = max(sum(module.ranks) for module in stack.modules.values())
    return Report(
        base=base,
        tasks=list(stack.tasks),
        modules=stack.names,
        coefficients=[] if coefficients is None else stack.by_task(coefficients, torch.mean, start).tolist(),
        granularity="rank" if stack.by_rank else "layer",
        start=start,
        ranks={task: _span([m.ranks[k] for m in stack.modules.values() if m.ranks[k]]) for k, task in _tasks(stack)},
        scales={task: _span([m.scales[k] for m in stack.modules.values() if m.ranks[k]]) for k, task in _tasks(stack)},
        conditions={task: _worst_condition(stack, k) for k, task in _tasks(stack)},
        conditions_by_module={n: [g.condition if g else None for g in m.grams] for n, m in stack.modules.items()},
        absent=_named(~stack.present, stack),
        whole=list(stack.dense),
        merged_rank=rank,
        vllm_max_lora_rank=vllm_rank(rank),
        warnings=_gram_warnings(stack) if split_learned(method)[0] else [],
        method=method,
        **_about(method),
    )


def kept_by_tasks(adapters: Mapping[str, Adapter]) -> dict[str, list[str]]:
    """Name the tensors that tasks keep for themselves.

    Args:
        adapters: task -> adapter.

    Returns:
        Task -> names of its tensors, of tasks that keep any.
    """
    return {task: sorted(adapter.saved) for task, adapter in adapters.items() if adapter.saved}


def describe_recipe(report: Report, recipe: Recipe) -> Report:
    """Add a recipe to the report of the adapters, or coefficients, that it works on.

    Args:
        report: report of the adapters.
        recipe: what is made of them.

    Returns:
        The report, without the rank of an adapter that is not made yet.
    """
    settings = {key: value for key, value in recipe.to_dict().items() if key != "method"}
    about = _about(recipe.full_name)
    if recipe.learned:
        about["line"] += f", weighted by the coefficients of {recipe.learned}"
    unknown: dict[str, Any] = {"merged_rank": None, "vllm_max_lora_rank": None}  # before it is made
    return replace(report, method=recipe.label, space=recipe.space, settings=settings, **about, **unknown)


def describe_merge(
    base: str,
    stack: Stack,
    targets: list[str],
    learned: Learned,
    coefficients: Tensor | None,
    before: Tensor,
    after: Tensor,
    config: MergeConfig,
    method: str = "nsc",
) -> Report:
    """Report a learned merge.

    Args:
        base: id of the base.
        stack: the adapters on it.
        targets: modules whose inputs were measured.
        learned: losses, seconds, distances on held-out rows.
        coefficients: what was learned, as ``Record`` has them; None for fitted factors.
        before: (T, K) null-space ratios at the start, NaN where an adapter is absent.
        after: (T, K) null-space ratios at the end.
        config: the settings of learning.
        method: one of LEARNED.

    Returns:
        The report.
    """
    known = describe_stack(base, stack, coefficients, config.start, method)
    frozen = bounded = torch.zeros_like(stack.present)
    drift = 0.0
    if coefficients is not None:
        frozen, bounded = (
            stack.by_task(learned.frozen, torch.all, True),
            stack.by_task(learned.bounded, torch.any, False),
        )
        drift = (coefficients - starts(stack, config)).abs().max().item()
    return Report(
        **{
            **asdict(known),
            "targets": targets,
            "ratio_before": before.nanmean(0).tolist(),
            "ratio_after": after.nanmean(0).tolist(),
            "ratios_by_target": dict(zip(targets, after.tolist(), strict=True)),
            "granularity": config.granularity,
            "unseen": list(config.without_rows),
            "untrained": _named(frozen & stack.present, stack),
            "bounded": _named(bounded, stack),
            "max_drift": drift,
            "drift_bound": config.max_drift,
            "steps": config.steps,
            "losses": learned.losses,
            "seconds_per_step": learned.seconds,
            "peak_memory_gib": learned.peak_memory / 2**30,
            "distances": {str(step): values for step, values in sorted(learned.curve.items())},
            "kept": learned.kept,
            "warnings": known.warnings + _drift_warnings(learned, drift, config),
        }
    )


def _about(method: str) -> dict[str, Any]:
    """Line and source."""
    learned, name = split_learned(method)
    entry = method_of(name) if name else LEARNED[learned or "nsc"]
    return {"line": entry.line, "source": entry.source}


def _drift_warnings(learned: Learned, drift: float, config: MergeConfig) -> list[str]:
    warnings = []
    if learned.bounded.any():
        warnings.append(
            f"{int(learned.bounded.sum())} coefficients were stopped by max_drift={config.max_drift:g}; going further"
            " lowers the objective, but need not make a better merge"
        )
    if drift > PAPER_REACH + 1e-6 and not config.needs_outputs:
        warnings.append(
            f"a coefficient drifted {drift:.3f} from its start, past {PAPER_REACH:g}, the reach of the paper's"
            " schedules; check the merge on real tasks: the objective alone cannot tell that it broke"
        )
    return warnings


def _gram_warnings(stack: Stack) -> list[str]:
    warnings = []
    for k, task in _tasks(stack):
        deficient = [n for n, m in stack.modules.items() if (g := m.grams[k]) is not None and g.rank < m.ranks[k]]
        if deficient:
            warnings.append(
                f"adapter {task}: lora_A is rank-deficient in {len(deficient)} modules, first {deficient[0]}; its"
                " true row space is used"
            )
    return warnings


def _worst_condition(stack: Stack, k: int) -> str:
    grams = [m.grams[k] for m in stack.modules.values()]
    known = [g for g in grams if g is not None]
    worst = max((g.condition for g in known if g.rank), default=float("inf"))
    deficient = sum(g.rank < g.inverse.shape[0] for g in known)
    return f"{worst:.3g}" + (f", {deficient} rank-deficient" if deficient else "")


def _named(mask: Tensor, stack: Stack) -> list[str]:
    return [f"{stack.names[m]} ({stack.tasks[k]})" for m, k in mask.nonzero().tolist()]


def _tasks(stack: Stack) -> list[tuple[int, str]]:
    return list(enumerate(stack.tasks))


def _span(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"
