"""What programs that serve an adapter take of it, and the command that serves it: one table, a row for each program.

The facts are those of the code of the version named in each row. vLLM reads ``rank_pattern`` and ``alpha_pattern``;
llama.cpp and SGLang scale every module by the config's alpha / r. vLLM looks modules up by the names of the class that
the base's config names, and passes over those of another without a word.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM accepts as max_lora_rank


@dataclass(frozen=True)
class Place:
    """Where an adapter or model lies, for a command.

    Attributes:
        out: its folder.
        base: folder or Hub id of the base; None for a whole model.
        rank: largest rank; 0 for a whole model.
    """

    out: Path
    base: str | None = None
    rank: int = 0

    @property
    def name(self) -> str:
        """What the adapter is called there."""
        return self.out.name or "merged"


@dataclass(frozen=True)
class Program:
    """What one program takes.

    Attributes:
        title: its name, with the version whose code the facts are from.
        adapter: command that serves an adapter.
        model: command that serves a whole model.
        most: largest rank; None for any.
        one_rank: whether it scales all modules by one rank and one alpha.
        rslora: whether it knows alpha / sqrt(r).
        saved: modules_to_save that it takes; None for all.
        plain: whether it takes plain LoRA alone.
        by_class: whether modules must have their names in the class that the base's config names.
        together: modules of a block that are adapted together: the first of a pair needs the second.
        language: whether it takes LoRA on language models alone.
    """

    title: str
    adapter: Callable[[Place], str]
    model: Callable[[Place], str]
    most: int | None = None
    one_rank: bool = True
    rslora: bool = False
    saved: tuple[str, ...] | None = ()
    plain: bool = True
    by_class: bool = True
    together: tuple[tuple[str, str], ...] = ()
    language: bool = True


def _peft(place: Place) -> str:
    return f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({str(place.base)!r}), {str(place.out)!r})"


def _transformers(place: Place) -> str:
    return f"AutoModelForCausalLM.from_pretrained({str(place.out)!r})"


def _vllm(place: Place) -> str:
    named = shlex.quote(f"{place.name}={place.out}")
    return (
        f"vllm serve {_quoted(place.base)} --enable-lora --lora-modules {named} --max-lora-rank {vllm_rank(place.rank)}"
    )


def _sglang(place: Place) -> str:
    named = shlex.quote(f"{place.name}={place.out}")
    return (
        f"python -m sglang.launch_server --model-path {_quoted(place.base)} --enable-lora --lora-paths {named}"
        f" --max-lora-rank {place.rank}"
    )


def _llama_cpp(place: Place) -> str:
    base, gguf = "--base" if Path(str(place.base)).is_dir() else "--base-model-id", shlex.quote(f"{place.name}.gguf")
    return (
        f"python convert_lora_to_gguf.py {base} {_quoted(place.base)} --outfile {gguf} {_quoted(place.out)}\n"
        f"llama-server -m BASE.gguf --lora {gguf}\n"
        f"# or for ollama, a Modelfile of these two lines:\nFROM ./BASE.gguf\nADAPTER ./{place.name}.gguf"
    )


def _llama_cpp_model(place: Place) -> str:
    gguf = shlex.quote(f"{place.name}.gguf")
    return (
        f"python convert_hf_to_gguf.py --outfile {gguf} {_quoted(place.out)}\nllama-server -m {gguf}\n"
        f"# or for ollama, a Modelfile of this line:\nFROM ./{place.name}.gguf"
    )


PROGRAMS = {
    "peft": Program(
        "PEFT 0.21",
        _peft,
        _transformers,
        one_rank=False,
        rslora=True,
        saved=None,
        plain=False,
        by_class=False,
        language=False,
    ),
    "vllm": Program(
        "vLLM 0.32",
        _vllm,
        lambda place: f"vllm serve {_quoted(place.out)}",
        most=VLLM_RANKS[-1],
        one_rank=False,
        rslora=True,
        saved=("classifier", "score"),
    ),
    "sglang": Program(
        "SGLang 0.5.23",
        _sglang,
        lambda place: f"python -m sglang.launch_server --model-path {_quoted(place.out)}",
        together=(("q_proj", "v_proj"), ("v_proj", "q_proj"), ("k_proj", "q_proj"), ("up_proj", "gate_proj")),
    ),
    "llama.cpp": Program("llama.cpp (gguf 0.19)", _llama_cpp, _llama_cpp_model),
}


def commands(names: Sequence[str], place: Place) -> str:
    """Return the commands that serve an adapter or a model.

    Args:
        names: of programs.
        place: what is served.

    Returns:
        A paragraph for each program.
    """
    shown = [(PROGRAMS[n].adapter if place.base else PROGRAMS[n].model)(place) for n in names]
    return "\n".join(f"{PROGRAMS[name].title}:\n{command}" for name, command in zip(names, shown, strict=True))


def vllm_rank(rank: int) -> int | None:
    """Return the smallest ``max_lora_rank`` of vLLM that serves a rank.

    Args:
        rank: rank of an adapter.

    Returns:
        One of VLLM_RANKS, or None if the rank is too large.
    """
    return next((allowed for allowed in VLLM_RANKS if allowed >= rank), None)


def _quoted(place: str | Path | None) -> str:
    return shlex.quote(str(place))
