"""Which layers are measured: of what kind, by the roles of linears in attention, and in which of the last blocks."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from nsc.bases.experts import unwatched
from nsc.bases.structure import block_of
from nsc.config import LAST_BLOCKS
from nsc.errors import TargetError

ROLES = {  # attention's values, or what they are fused in, which reads the same; its output projection
    "v": r"\b(v_proj|value|v|qkv_proj|query_key_value|qkv|Wqkv|c_attn)$",
    "o": r"\b(o_proj|out_proj|o|attention\.(output\.)?dense|self_attn\.dense|attn\.(c_)?proj)$",
}
# The linears of a block by what they read: its input, what attention gives, its middle, what the activation gives.
STAGES = (
    r"\b(q_proj|k_proj|v_proj|qkv_proj|qkv|query|key|value|query_key_value|c_attn)$",
    ROLES["o"],
    r"\b(gate_proj|up_proj|gate_up_proj|fc1|c_fc|intermediate\.dense|dense_h_to_4h)$",
    r"\b(down_proj|fc2|mlp\.c_proj|output\.dense|dense_4h_to_h)$",
)


def choose_targets(
    model: nn.Module,
    names: Sequence[str],  # the modules that carry LoRA
    modules: Sequence[str] | None = None,
    blocks: Sequence[int] | str | None = None,
) -> list[str]:
    """Choose the modules whose inputs are measured.

    By default, as in the paper and by ROLES: for image bodies the output projection of attention, else its values; for
    others the values, else the output projection; else every module with LoRA; in the last quarter of the blocks,
    counted from the model's own depth.

    Args:
        model: the body.
        names: modules that carry LoRA.
        modules: suffixes of names to choose.
        blocks: block numbers, or one of the words of LAST_BLOCKS.

    Returns:
        Names, in the order of ``names``.

    Raises:
        TargetError: if nothing is left, saying what there was.
    """
    unseen = set(unwatched(model, names))
    names = [name for name in names if name not in unseen]
    places = {name: block_of(model, name) for name in names}
    chosen = [name for name, place in places.items() if _in_blocks(place, blocks)]
    targets = [name for name in chosen if _is_kind(name, modules)] if modules else _preferred(model, chosen)
    if not targets:
        depth = max((place[1] for place in places.values() if place), default=0)
        there = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
        word = "quarter" if blocks is None else blocks
        where = "all" if word == "all" else f"the last {word}" if isinstance(word, str) else f"blocks {list(word)}"
        raise TargetError(
            f"no target layer: {f'modules {list(modules)}' if modules else 'any module'} in {where} of {depth} blocks"
            f" match none of the {len(names)} modules with LoRA ({there}); choose others with target_modules and"
            " target_blocks"
        )
    return targets


def _preferred(model: nn.Module, names: Sequence[str]) -> list[str]:
    roles = ("o", "v") if getattr(model, "main_input_name", None) == "pixel_values" else ("v", "o")
    found = ([name for name in names if re.search(ROLES[role], name)] for role in roles)
    return next(filter(None, found), list(names))


def _in_blocks(place: tuple[int, int] | None, blocks: Sequence[int] | str | None) -> bool:
    if place is None:
        return False
    index, depth = place
    if blocks is None or isinstance(blocks, str):
        return index >= depth - max(1, LAST_BLOCKS["quarter" if blocks is None else blocks](depth))
    return index in blocks


def _is_kind(name: str, kinds: Sequence[str]) -> bool:
    return any(name == kind or name.endswith(f".{kind}") for kind in kinds)
