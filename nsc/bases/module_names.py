"""Which module of the base an adapter's module name means.

AutoModel, CausalLM and SequenceClassification put a prefix more or less before the name of one and the same layer, and
transformers 5 renamed layers. A spelling is a way to read both; the first that explains every module of an adapter is
taken. Whatever stays unmatched, ambiguous or doubled is an error that shows the names, never a module left out.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from nsc.errors import NameMismatch

Spelling = tuple[Callable[[str], str], Callable[[str], str]]  # of the adapter's names, of the base's names
# Old -> new, one row a family, after transformers 5's conversion_mapping.py.
_DINOV2 = (
    (r"\battention\.attention\.query\b", "attention.q_proj"),
    (r"\battention\.attention\.key\b", "attention.k_proj"),
    (r"\battention\.attention\.value\b", "attention.v_proj"),
    (r"\battention\.output\.dense\b", "attention.o_proj"),
)
_VIT = (
    *_DINOV2,
    (r"\bencoder\.layer\.", "layers."),
    (r"\bintermediate\.dense\b", "mlp.fc1"),
    (r"\boutput\.dense\b", "mlp.fc2"),
)
_CLIP_TOWER = ((r"\bvision_tower\.vision_model\.", "vision_tower."),)
_LLAVA = (
    *_CLIP_TOWER,
    (r"^language_model\.lm_head\b", "lm_head"),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
)
_TEXT_IN_WRAPPER = ((r"^(model\.)?(?=layers\.)", "model.language_model."),)  # trained on the language model by itself
_RESIDUAL = ((r"(?<![^.])module\.", ""),)  # a name of LeViT's own, taken from adapters as one of DDP
RENAMES: tuple[tuple[tuple[str, str], ...], ...] = (_VIT, _DINOV2, _CLIP_TOWER, _LLAVA, _TEXT_IN_WRAPPER, _RESIDUAL)


def resolve(adapter_name: str, names: Iterable[str], available: Mapping[str, tuple[int, int]]) -> dict[str, str]:
    """Match an adapter's module names to those of the base, one to one.

    Args:
        adapter_name: name of the adapter, for errors.
        names: its module names.
        available: linear layers of the base's body -> (out_features, in_features).

    Returns:
        Adapter's module name -> base's.

    Raises:
        NameMismatch: if a name matches no module of the base, several, or one that another name matches too.
    """
    names = list(names)
    spelling = _spelling_for(names, available)
    matches = _match(names, available, spelling)
    if not all(matches.values()):
        raise _unmatched(adapter_name, matches, available)
    if several := next(((name, found) for name, found in matches.items() if len(found) > 1), None):
        meant = ", ".join(f"'{base}'" for base in several[1])
        raise NameMismatch(
            f"adapter '{adapter_name}': module '{several[0]}' could be any of {meant} in the base; "
            "give the base model class that the adapter was trained on"
        )
    mapping = {name: found[0] for name, found in matches.items()}
    _refuse_doubles(adapter_name, mapping)
    return mapping


def resolve_saved(
    adapter_name: str, names: Iterable[str], mapping: Mapping[str, str], parameters: Iterable[str]
) -> dict[str, str | None]:
    """Match an adapter's modules_to_save tensors to parameters of the base's body.

    Args:
        adapter_name: name of the adapter, for errors.
        names: its tensor names.
        mapping: what ``resolve`` returned for its modules.
        parameters: parameter names of the body.

    Returns:
        Tensor name -> parameter of the body, or None for a head, which lies outside of it.

    Raises:
        NameMismatch: if a name lies inside the body (it has the prefix of the LoRA modules), but the body has no such
            parameter.
    """
    prefix, (adapter_side, base_side) = prefix_of(mapping) or "", _spelling_for(mapping, mapping.values())
    spelled = {base_side(parameter): parameter for parameter in parameters}
    resolved = {name: spelled.get(adapter_side(name).removeprefix(prefix)) for name in names}
    for name, parameter in resolved.items():
        if parameter is None and prefix and adapter_side(name).startswith(prefix):
            raise NameMismatch(
                f"adapter '{adapter_name}': saved tensor '{name}' is no parameter of the base; "
                f"{_closest(name, spelled.values())}"
            )
    return resolved


def all_match(names: Iterable[str], available: Iterable[str]) -> bool:
    """Return whether each of an adapter's module names means some module of the base.

    Args:
        names: the adapter's module names.
        available: linear layers of the base's body.

    Returns:
        Whether ``resolve`` finds a place for all of them, though it may be one that they share.
    """
    available = list(available)
    return all(_match(names, available, _spelling_for(names, available)).values())


def prefix_of(mapping: Mapping[str, str]) -> str | None:
    """Return what an adapter's names carry before the names of the base's body: "model." for LLaMA's CausalLM.

    Args:
        mapping: adapter's module name -> base's.

    Returns:
        The prefix, "" for AutoModel or an adapter of a part of the body; None if modules disagree.
    """
    prefixes = list(prefixes_of(mapping))
    return prefixes[0] if len(prefixes) == 1 else None


def prefixes_of(mapping: Mapping[str, str]) -> dict[str, list[str]]:
    """Return all that an adapter's names carry before the names of the base's body.

    Args:
        mapping: adapter's module name -> base's.

    Returns:
        Prefix -> the base's names behind it.
    """
    adapter_side, base_side = _spelling_for(mapping, mapping.values())
    found: dict[str, list[str]] = {}
    for name, base in mapping.items():
        spelled, inside = adapter_side(name), base_side(base)
        found.setdefault(spelled.removesuffix(inside) if spelled.endswith(inside) else "", []).append(base)
    return found


def layout(mappings: Iterable[Mapping[str, str]]) -> str | None:
    """Return the prefix that all adapters share, so that their merge fits the same wrapper.

    Args:
        mappings: of each adapter, its module name -> the base's.

    Returns:
        The prefix, or None if they disagree.
    """
    prefixes = {prefix_of(mapping) for mapping in mappings}
    return prefixes.pop() if len(prefixes) == 1 else None


def match_modules(first: Iterable[str], second: Iterable[str]) -> dict[str, str]:
    """Match the modules that two adapters share, whatever wrappers they were trained in.

    Args:
        first: module names of one adapter.
        second: module names of the other.

    Returns:
        Name in the first -> name in the second.
    """
    return {name: found[0] for name, found in _match(first, second, (str, str)).items() if len(found) == 1}


def _spellings() -> Iterator[Spelling]:
    """As they are; then, family by family, an old adapter on a new base, a new one on an old base, and in between."""
    yield str, str
    for rename in map(_renamer, RENAMES):
        yield rename, str
        yield str, rename
        yield rename, rename


def _renamer(renames: tuple[tuple[str, str], ...]) -> Callable[[str], str]:
    def rename(name: str) -> str:
        for old, new in renames:
            name = re.sub(old, new, name)
        return name

    return rename


def _spelling_for(names: Iterable[str], available: Iterable[str]) -> Spelling:
    """The first spelling that explains every name, or else the first of those that explain most."""
    names, available = list(names), list(available)
    explained: dict[Spelling, int] = {}
    for spelling in _spellings():
        explained[spelling] = sum(map(bool, _match(names, available, spelling).values()))
        if explained[spelling] == len(names):
            return spelling
    return max(explained, key=lambda spelling: explained[spelling])


def _match(names: Iterable[str], available: Iterable[str], spelling: Spelling) -> dict[str, list[str]]:
    """Every name with the base modules it may mean: equal ones, or else those equal but for a prefix on either side."""
    adapter_side, base_side = spelling
    bases = {base_side(base): base for base in available}
    longer: dict[str, list[str]] = {}
    for spelled, base in bases.items():
        for suffix in _suffixes(spelled):
            longer.setdefault(suffix, []).append(base)

    def candidates(name: str) -> list[str]:
        shorter = [bases[suffix] for suffix in _suffixes(name) if suffix in bases]
        return [bases[name]] if name in bases else shorter + longer.get(name, [])

    return {name: candidates(adapter_side(name)) for name in names}


def _suffixes(name: str) -> list[str]:
    """What is left of a dotted name without its first part, its first two parts..."""
    return [name[dot.end() :] for dot in re.finditer(r"\.", name)]


def layer_kind(name: str) -> str:
    """Return a module's name without its block number, such as "layers.*.self_attn.q_proj".

    Args:
        name: name of the module.

    Returns:
        The name for all blocks.
    """
    return re.sub(r"\.\d+\.", ".*.", name)


def _refuse_doubles(adapter_name: str, mapping: Mapping[str, str]) -> None:
    """Raise NameMismatch if two modules of the adapter mean the same module of the base."""
    seen: dict[str, str] = {}
    for name, base in mapping.items():
        if base in seen:
            raise NameMismatch(
                f"adapter '{adapter_name}': modules '{seen[base]}' and '{name}' both match '{base}' of the base; "
                "the base is only a part of the model that the adapter was trained on"
            )
        seen[base] = name


def _unmatched(adapter_name: str, matches: Mapping[str, list[str]], available: Iterable[str]) -> NameMismatch:
    """An error that shows the first unmatched names, each with its closest names in the base."""
    missing = [name for name, found in matches.items() if not found]
    shown = "".join(f"\n  '{name}': {_closest(name, available)}" for name in missing[:3])
    return NameMismatch(
        f"adapter '{adapter_name}': {len(missing)} of {len(matches)} modules match no linear layer of the base. "
        "Is it the model the adapter was trained on? LoRA on a head (lm_head, score) cannot be merged." + shown
    )


def _closest(name: str, available: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(available), n=3, cutoff=0.0)
    return "closest in the base: " + (", ".join(f"'{base}'" for base in close) or "nothing, it has no linear layer")
