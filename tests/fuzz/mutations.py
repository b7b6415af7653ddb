"""What is done to sound files, and the values that no file should hold: strategies of hypothesis."""

from typing import Any

from hypothesis import strategies as st

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([10**400, -(2**63), 2**31, 0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")]),
)
WORDS = st.one_of(
    st.sampled_from(
        [
            "", "q_proj", "v_proj", "self_attn.q_proj", r".*\.q_proj", "(", "(a|aa)*$", r"layers\.0.*", "all-linear",
            "none", "all", "default", "LORA", "VERA", "CAUSAL_LM", "SEQ_CLS", "gaussian", "pissa", "1e-3", "nan",
            "../x", "/x", "\0",
        ]
    ),
    st.text(max_size=8),
)  # fmt: skip
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
KINDS = ("flip", "set", "insert", "drop", "cut", "double")
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4
)


def edited(content: bytes, edits: list[tuple[str, int, int]]) -> bytes:
    """Content after edits, each at a place and with a byte."""
    for kind, place, byte in edits:
        i = place % (len(content) + 1)
        if kind == "flip":
            content = content[:i] + bytes(b ^ (1 << byte % 8) for b in content[i : i + 1]) + content[i + 1 :]
        elif kind == "set":
            content = content[:i] + bytes([byte]) + content[i + 1 :]
        elif kind == "insert":
            content = content[:i] + bytes([byte]) + content[i:]
        elif kind == "drop":
            content = content[:i] + content[i + 1 + byte % 16 :]
        elif kind == "cut":
            content = content[:i]
        else:
            content = content[:i] + content[i : i + byte] + content[i:]
    return content


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in nested mappings and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, inner in items for place in places(inner, (*path, key)))]


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The nested value with another one at a path."""
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = with_value(value[path[0]], path[1:], new)
    return copy
