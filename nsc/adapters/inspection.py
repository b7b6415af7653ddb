"""What adapters are, before anything is merged: no base model, seconds on a CPU.

    overlap of i and j in a module = |Q_i Q_j'|_F^2 / min(r_i, r_j),    Q: (r, d) orthonormal basis of A's rows

0 says that two adapters read disjoint directions of the layer's input, 1 that one reads a part of what the other reads.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from nsc.adapters.factors import LoraFactors, read_factors, read_saved
from nsc.adapters.peft_folder import WEIGHTS, Checkpoint, load_checkpoint
from nsc.adapters.unsupported import unsupported
from nsc.bases.experts import expert_of
from nsc.bases.module_names import match_modules
from nsc.errors import AdapterError
from nsc_kernels.gram import GramCache, GramFactor


@dataclass(frozen=True)
class Target:
    """The modules of one kind, such as all q_proj.

    Attributes:
        kind: last part of their names, ``experts.`` before that of experts.
        blocks: how many there are.
        ranks: smallest and largest.
        scales: distinct scales.
    """

    kind: str
    blocks: int
    ranks: tuple[int, int]  # smallest, largest
    scales: tuple[float, ...]  # the distinct ones


@dataclass(frozen=True)
class Overlap:
    """Overlap of row spaces with one other adapter, over the modules that both have.

    Attributes:
        other: name of the other adapter.
        shared: number of modules that both have.
        mean: mean overlap.
        worst: largest overlap.
        worst_module: where it is largest.
        chance: mean overlap of random row spaces of these shapes.
    """

    other: str
    shared: int
    mean: float
    worst: float
    worst_module: str
    chance: float  # what random row spaces of these shapes would have


@dataclass(frozen=True)
class AdapterReport:
    """What there is to know about one adapter.

    Attributes:
        name: name of the adapter.
        path: its folder.
        base: base model that its config names.
        problems: unsupported features and damage; empty if it can be merged.
        dtypes: dtypes of its tensors.
        size: bytes on disk.
        targets: its modules, by kind.
        saved: names of its modules_to_save tensors.
        worst_condition: largest condition number of an A on its own row space.
        worst_module: where it is largest.
        deficient: modules whose A has less than full row rank.
        zero: modules whose update is zero.
        overlaps: with the adapters further down the list.
    """

    name: str
    path: Path
    base: str | None
    problems: tuple[str, ...]
    dtypes: tuple[str, ...]
    size: int  # bytes on disk
    targets: tuple[Target, ...] = ()
    saved: tuple[str, ...] = ()
    worst_condition: float = math.nan  # of any A on its own row space
    worst_module: str = ""
    deficient: tuple[str, ...] = ()  # modules whose A has less than full row rank
    zero: tuple[str, ...] = ()  # modules whose update is zero
    overlaps: tuple[Overlap, ...] = ()  # with the adapters further down the list


def inspect(paths: Iterable[str | Path] | Mapping[str, str | Path]) -> list[AdapterReport]:
    """Report on adapters without any base model.

    Args:
        paths: PEFT folders or Hub ids, or name -> folder or Hub id.

    Returns:
        One report per adapter; adapters that cannot be merged are reported with their problems.

    Raises:
        AdapterError: only if there is no adapter to read at all: missing folder or file, invalid JSON, truncated
            safetensors.
    """
    named = paths.items() if isinstance(paths, Mapping) else ((None, path) for path in paths)
    checkpoints = [load_checkpoint(path, name) for name, path in named]
    examined = [_examine(checkpoint) for checkpoint in checkpoints]
    reports, spaces = [report for report, _ in examined], [space for _, space in examined]
    overlaps: list[list[Overlap]] = [[] for _ in reports]
    for i, j in combinations(range(len(reports)), 2):
        if overlap := _overlap(spaces[i], spaces[j], reports[j].name):
            overlaps[i].append(overlap)
    return [replace(report, overlaps=tuple(found)) for report, found in zip(reports, overlaps, strict=True)]


def format_inspection(reports: Sequence[AdapterReport]) -> str:
    """Format reports as text, with the overlaps of all pairs at the end.

    Args:
        reports: what ``inspect`` returned.

    Returns:
        Plain text.
    """
    lines = [line for report in reports for line in _format_adapter(report)]
    pairs = [(report.name, overlap) for report in reports for overlap in report.overlaps]
    if pairs:
        lines += ["row-space overlap (0: disjoint, 1: contained; far above chance: from one seed, hardly told apart)"]
    for name, o in pairs:
        worst = f"worst {o.worst:.3f} at {o.worst_module}"
        lines += [f"  {name} x {o.other}: mean {o.mean:.3f} (chance {o.chance:.3f}), {worst}, {o.shared} modules"]
    return "\n".join(lines)


def _examine(checkpoint: Checkpoint) -> tuple[AdapterReport, dict[str, Tensor]]:
    """The report on one adapter without overlaps, and an orthonormal row basis a module: (rank, d) float32."""
    problems = unsupported(checkpoint.config, checkpoint.tensors)
    report = AdapterReport(
        name=checkpoint.name,
        path=checkpoint.path,
        base=checkpoint.config.get("base_model_name_or_path"),
        problems=tuple(problems),
        dtypes=tuple(sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.tensors.values()})),
        size=(checkpoint.path / WEIGHTS).stat().st_size,
    )
    try:
        factors, saved = read_factors(checkpoint), tuple(read_saved(checkpoint))
    except AdapterError as error:
        return replace(report, problems=(*problems, str(error))), {}
    own = [name for name, f in factors.items() if not f.wide]
    grams = dict(zip(own, GramCache().factor([factors[name].A for name in own]), strict=True))
    spaces = {name: (gram.whiten @ factors[name].A.double())[: gram.rank].float() for name, gram in grams.items()}
    numerics = _numerics(factors, grams)
    if len(numerics["zero"]) == len(factors):
        problems.append("the update of every module is zero: untrained")
    return replace(report, problems=tuple(problems), targets=_targets(factors), saved=saved, **numerics), spaces


def _targets(factors: Mapping[str, LoraFactors]) -> tuple[Target, ...]:
    kinds: dict[str, list[LoraFactors]] = {}
    for name, f in factors.items():
        kinds.setdefault(_kind(name), []).append(f)
    return tuple(
        Target(kind, len(fs), (min(f.rank for f in fs), max(f.rank for f in fs)), tuple(sorted({f.scale for f in fs})))
        for kind, fs in kinds.items()
    )


def _kind(name: str) -> str:
    """The last part of a name; of experts, all of a block together."""
    parameter, _ = expert_of(name) or (name, 0)
    holder, _, last = parameter.rpartition(".")
    return f"experts.{last}" if "experts" in holder.split(".") or parameter != name else last


def _numerics(factors: Mapping[str, LoraFactors], grams: Mapping[str, GramFactor]) -> dict:
    """Conditions and ranks, as fields of AdapterReport; without those of which only the base tells the width of A."""
    zero = tuple(name for name, f in factors.items() if f.is_zero)
    if not grams:
        return {"zero": zero}
    worst = max(grams, key=lambda name: grams[name].condition)
    return {
        "worst_condition": grams[worst].condition,
        "worst_module": worst,
        "deficient": tuple(name for name, gram in grams.items() if gram.rank < factors[name].rank),
        "zero": zero,
    }


def _overlap(first: Mapping[str, Tensor], second: Mapping[str, Tensor], other: str) -> Overlap | None:
    """Overlap over the modules of equal width that both have; None without any."""
    shares: dict[str, float] = {}
    chances: list[float] = []
    groups: dict[tuple, list[tuple[str, str]]] = {}
    for name, match in match_modules(first, second).items():
        a, b = first[name], second[match]
        if a.shape[1] == b.shape[1] and min(len(a), len(b)):
            groups.setdefault((a.shape, b.shape), []).append((name, match))
    for (a_shape, b_shape), pairs in groups.items():
        a, b = torch.stack([first[n] for n, _ in pairs]), torch.stack([second[m] for _, m in pairs])
        share = (a @ b.mT).square().sum((1, 2)) / min(a_shape[0], b_shape[0])
        shares |= dict(zip((n for n, _ in pairs), share.tolist(), strict=True))
        chances += [max(a_shape[0], b_shape[0]) / a_shape[1]] * len(pairs)
    if not shares:
        return None
    worst = max(shares, key=lambda name: shares[name])
    return Overlap(other, len(shares), mean(shares.values()), shares[worst], worst, mean(chances))


def _format_adapter(report: AdapterReport) -> list[str]:
    title = f"{report.name}  {report.path}"
    size = f"{report.size / 2**20:.1f} MiB, {' + '.join(report.dtypes)}"
    lines = [title, f"  base {report.base or 'not named'}; {size}"]
    for t in report.targets:
        rank = str(t.ranks[0]) if t.ranks[0] == t.ranks[1] else f"{t.ranks[0]}..{t.ranks[1]}"
        lines += [f"  {t.kind} x {t.blocks}: rank {rank}, scale {', '.join(f'{scale:g}' for scale in t.scales)}"]
    if report.saved:
        lines += [f"  saved whole: {', '.join(report.saved)}"]
    if report.worst_module:
        lines += [f"  worst condition {report.worst_condition:.3g} at {report.worst_module}"]
    elif report.targets:
        lines += ["  VeRA: conditions and overlaps are those of the part of A that each layer of a base takes"]
    for label, modules in (("rank-deficient A", report.deficient), ("zero update", report.zero)):
        if modules:
            lines += [f"  {label}: {modules[0]}" + f" and {len(modules) - 1} more" * (len(modules) > 1)]
    return lines + [f"  CANNOT BE MERGED: {problem}" for problem in report.problems] + [""]
