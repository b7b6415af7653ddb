"""Whether a program can serve an adapter; what it cannot is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from nsc.adapters.peft_folder import load_checkpoint
from nsc.adapters.unsupported import LORA_KEY
from nsc.bases.base_model import Base, quiet_loading
from nsc.errors import NSCError
from nsc.export.programs import PROGRAMS, Place, Program, commands

NOT_PLAIN = ("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")


@dataclass(frozen=True)
class Contents:
    """What a program finds in an adapter's folder.

    Attributes:
        config: adapter_config.json.
        ranks: module, without PEFT's prefix -> rows of its A.
    """

    config: Mapping[str, Any]
    ranks: Mapping[str, int]

    @classmethod
    def of(cls, folder: Path) -> Contents:
        """Read the config and the shapes of an adapter.

        Args:
            folder: with the files that PEFT writes.

        Returns:
            Its contents.
        """
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 (not a mapping)
        return cls.from_shapes(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")), shapes)

    @classmethod
    def from_shapes(cls, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> Contents:
        """Find the ranks of an adapter.

        Args:
            config: adapter_config.json.
            shapes: key in the file -> shape.

        Returns:
            Its contents.
        """
        matches = [(match, shape) for key, shape in shapes.items() if (match := LORA_KEY.fullmatch(key))]
        return cls(config, {match["module"]: shape[0] for match, shape in matches if match["side"] == "A"})

    @property
    def rank(self) -> int:
        """The largest rank."""
        return max(self.ranks.values(), default=0)

    @property
    def saved(self) -> list[str]:
        """Layers that are stored whole."""
        return sorted(self.config.get("modules_to_save") or ())

    @property
    def is_ragged(self) -> bool:
        """Whether modules differ in rank or scale."""
        patterns = self.config.get("rank_pattern") or self.config.get("alpha_pattern")
        return bool(patterns) or len(set(self.ranks.values())) > 1


def read_programs(names: Sequence[str]) -> tuple[str, ...]:
    """Check names of programs.

    Args:
        names: as a user gives them, each perhaps several with commas between.

    Returns:
        Names in PROGRAMS, each once.

    Raises:
        NSCError: for a name that is not there.
    """
    found = [name.strip() for several in names for name in several.split(",") if name.strip()]
    if unknown := [name for name in found if name not in PROGRAMS]:
        raise NSCError(f"--for {unknown[0]}: nsc knows what {', '.join(PROGRAMS)} take; give one of these")
    return tuple(dict.fromkeys(found))


def refuse_early(names: Sequence[str], base: Base, rank: int | None, full: bool, ragged: bool) -> None:
    """Refuse what a program cannot take whatever comes out, so that it need not be learned first.

    Args:
        names: of programs, as ``read_programs`` gives them.
        base: the base.
        rank: rank that the adapter is truncated to, if any.
        full: whether the whole model is written.
        ragged: whether modules keep their own ranks.

    Raises:
        NSCError: naming the program and the remedy.
    """
    for program in () if full else map(PROGRAMS.__getitem__, names):
        if program.most is not None and (rank or 0) > program.most:
            raise NSCError(f"{program.title} takes ranks to {program.most}, not {rank}: give a smaller --rank")
        if program.one_rank and ragged:
            raise NSCError(f"{program.title} reads one rank and one alpha for all modules: leave out --ragged")
        if program.language and "input_ids" not in base.takes:
            raise NSCError(
                f"{program.title} takes LoRA on language models, and {base.id} is a model of images alone: write the"
                " whole model with --full, or serve the adapter with PEFT"
            )


def problems(program: Program, contents: Contents) -> list[str]:
    """List what a program would refuse in an adapter, or silently compute otherwise.

    Args:
        program: one of PROGRAMS.
        contents: the adapter.

    Returns:
        A sentence for each, with its remedy.
    """
    title, config, found = program.title, contents.config, []
    experts = [name for name in config.get("target_parameters") or () if not name.endswith(".weight")]
    if program.plain and experts:
        found.append(f"{title} takes no LoRA on the experts of {experts[0]}: write the whole model with --full")
        return found
    if program.most is not None and contents.rank > program.most:
        found.append(f"{title} takes ranks to {program.most}, and this adapter has {contents.rank}: write it by --rank")
    if program.one_rank and contents.is_ragged:
        found.append(
            f"{title} reads one rank and one alpha for all modules, and here they differ: write it without --ragged"
        )
    if config.get("use_rslora") and not program.rslora:
        found.append(f"{title} scales by alpha / r, and this adapter by alpha / sqrt(r): merge it, alone if need be")
    taken = contents.saved if program.saved is None else program.saved
    if strange := [name for name in contents.saved if name not in taken]:
        found.append(f"{title} takes no {strange[0]} from modules_to_save: write the whole model with --full")
    if program.plain and (set_there := [field for field in NOT_PLAIN if config.get(field)]):
        found.append(f"{title} takes plain LoRA, and here {set_there[0]} is set: retrain without it")
    return found + [_apart(title, *pair, contents) for pair in program.together if _lacking(*pair, contents)]


def require_served(names: Sequence[str], folder: Path) -> None:
    """Refuse an adapter that one of the programs cannot serve.

    Args:
        names: of programs.
        folder: the adapter.

    Raises:
        NSCError: with the first problem.
    """
    for name in names:
        if found := problems(PROGRAMS[name], Contents.of(folder)):
            raise NSCError(found[0])


def serving(name: str, folder: Path) -> dict[str, Any]:
    """Say what a program makes of an adapter, merged or not.

    Args:
        name: of the program.
        folder: the adapter.

    Returns:
        Its "problems", and the "command" that serves it, which is None where there are any.

    Raises:
        AdapterError: if it cannot be read.
    """
    checkpoint = load_checkpoint(folder)
    shapes = {key: tensor.shape for key, tensor in checkpoint.tensors.items()}
    contents = Contents.from_shapes(checkpoint.config, shapes)
    found, base = problems(PROGRAMS[name], contents), contents.config.get("base_model_name_or_path") or "BASE"
    return {"problems": found, "command": None if found else commands([name], Place(folder, base, contents.rank))}


def served_prefix(names: Sequence[str], base: Base, layers: Sequence[str], prefix: str) -> str:
    """Return what names of layers carry in the class that is served, where a program looks them up by that.

    Args:
        names: of programs.
        base: the base.
        layers: layers of its body.
        prefix: prefix that the adapters have.

    Returns:
        ``prefix`` itself, or that of the class that the base's config names.

    Raises:
        NSCError: if there is no such class, or it lacks a layer.
    """
    import transformers

    program = next((PROGRAMS[name] for name in names if PROGRAMS[name].by_class), None)
    if program is None or not layers:
        return prefix
    architecture = (getattr(base.config, "architectures", None) or ["none"])[0]
    kind = getattr(transformers, architecture, None)
    if kind is None:
        raise NSCError(
            f"{program.title} serves the class that config.json of {base.id} names in architectures, {architecture},"
            " which transformers does not have; name it there"
        )
    with quiet_loading(), torch.device("meta"):
        model = kind(deepcopy(base.config))
    there = {name for name, _ in model.named_modules()}
    ends = (name.removesuffix(layers[0]) for name in there if f".{name}".endswith(f".{layers[0]}"))
    found = [start for start in sorted(ends, key=len) if all(start + layer in there for layer in layers)]
    if not found:
        raise NSCError(f"{program.title} serves {architecture}, which has no layer {layers[0]}: use --full, or PEFT")
    if program.language and (outside := [layer for layer in layers if found[0] + layer not in _language_layers(model)]):
        raise NSCError(
            f"{program.title} takes LoRA on the language model of {architecture} alone, and {outside[0]} is outside of"
            " it: write the whole model with --full, or serve the adapter with PEFT"
        )
    return found[0]


def _language_layers(model: Any) -> set[str]:
    """All modules, but for those beside the language model where the model has one within it."""
    text, names = model.config.get_text_config(), {name: module for name, module in model.named_modules()}
    inside = [name for name, module in names.items() if type(getattr(module, "config", None)) is type(text)]
    outermost = min(inside, key=len, default="")
    return {name for name in names if not outermost or name.startswith(f"{outermost}.")}


def _lacking(kind: str, needed: str, contents: Contents) -> list[str]:
    """Modules of one kind without the one beside them."""
    beside = {name: f"{name.rpartition('.')[0]}.{needed}" for name in contents.ranks if re.search(rf"\.{kind}$", name)}
    return [name for name, other in beside.items() if other not in contents.ranks]


def _apart(title: str, kind: str, needed: str, contents: Contents) -> str:
    first = _lacking(kind, needed, contents)[0]
    return f"{title} takes LoRA on {kind} only beside LoRA on {needed}, which {first} lacks: use --full"
