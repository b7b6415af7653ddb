"""The model card of a merge: metadata that the Hub reads, then the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

from nsc.adapters.lora import Adapter
from nsc.bases.base_model import Base
from nsc.config import START
from nsc.errors import NSCError
from nsc.export.report import Report
from nsc.export.sharing import hub_id

CARD = "README.md"
OF_TASK = {
    "CAUSAL_LM": "text-generation",
    "FEATURE_EXTRACTION": "feature-extraction",
    "QUESTION_ANS": "question-answering",
    "SEQ_2_SEQ_LM": "text2text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
}


def card_data(base: Base, base_id: str | None, adapters: Mapping[str, Adapter], full: bool) -> ModelCardData:
    """Put together what the Hub reads of a model card.

    Args:
        base: the base that was merged on.
        base_id: its name on the Hub, or None where none is known.
        adapters: task -> adapter.
        full: whether the whole model is written.

    Returns:
        The metadata; a field that is not known is left out.
    """
    relation = ("merge" if len(adapters) > 1 else "finetune") if full else "adapter"
    tags = [*([] if full else ["lora"]), "merge", "nsc"]
    licences = _licences(base, adapters)
    agreed = next(iter(licences)) if len(set(licences.values())) == 1 else None
    return ModelCardData(
        base_model=base_id,
        base_model_relation=relation if base_id else None,
        library_name="transformers" if full else "peft",
        pipeline_tag=_pipeline(base, [] if full else [a.config.get("task_type") for a in adapters.values()]),
        license=licences[agreed] if agreed else None,
        tags=[*tags, f"base_model:{relation}:{base_id}"] if base_id else tags,
    )


def licence_warnings(base: Base, adapters: Mapping[str, Adapter]) -> list[str]:
    """Warn where base and adapters are under different licences, so that none can be written to the card.

    Args:
        base: the base that was merged on.
        adapters: task -> adapter.

    Returns:
        No or one warning.
    """
    licences = _licences(base, adapters)
    if len(set(licences.values())) < 2:
        return []
    told = ", ".join(f"{name} {licence}" for name, licence in licences.items())
    return [f"licences differ ({told}): write into {CARD} under which one this merge may be shared"]


def model_card(report: Report, data: ModelCardData) -> str:
    """Return the model card of a written merge: metadata for the Hub, then the report.

    Args:
        report: complete, with its proof and without paths of this machine.
        data: the metadata.

    Returns:
        Markdown with a YAML header.
    """
    kind = "model" if report.full else "adapter"
    by = "Null-Space Compression (arXiv 2603.26317)"
    if report.method != "nsc":
        by = f"{report.method}: {report.line} ({report.source})"
    title = f"# A merged {kind}: {', '.join(task for task in report.tasks if task != START)}\n\nMerged by {by}."
    heads = "\nThe tasks' own heads, where they have any, are under `heads/`; `merge.yaml` replays this merge."
    picture = "\n![coefficients](coefficients.png)\n" if report.coefficients else ""
    return f"---\n{data.to_yaml()}\n---\n\n{title}{heads}\n\n{report.to_markdown()}\n{picture}"


def _licences(base: Base, adapters: Mapping[str, Adapter]) -> dict[str, str]:
    """Of the base and of each adapter, where a card beside it names one."""
    name = hub_id(base.id)
    cached = try_to_load_from_cache(name, CARD) if name else None
    cards = {"base": Path(cached) if isinstance(cached, str) else Path(base.id) / CARD}
    cards |= {f"adapter {task}": adapter.path / CARD for task, adapter in adapters.items()}
    found = {name: _licence(card) for name, card in cards.items() if card.is_file()}
    return {name: licence for name, licence in found.items() if licence}


def _licence(card: Path) -> str | None:
    with suppress(OSError, ValueError, yaml.YAMLError):
        licence = ModelCard.load(card).data.license
        return licence if isinstance(licence, str) else None
    return None


def _pipeline(base: Base, task_types: Iterable[str | None]) -> str | None:
    """By what the adapters were trained for, where they agree, else by the class that the base's config names."""
    from transformers.modelcard import TASK_MAPPING

    tasks = set(task_types)
    if len(tasks) == 1 and (task := tasks.pop()) in OF_TASK:
        return OF_TASK[str(task)]
    with suppress(NSCError):
        for name in getattr(base.config, "architectures", None) or ():
            for tag, classes in TASK_MAPPING.items():
                if name in _flat(classes.values()):
                    return str(tag)
    return None


def _flat(values: Iterable[str | tuple[str, ...]]) -> set[str]:
    return {name for value in values for name in ([value] if isinstance(value, str) else value)}
