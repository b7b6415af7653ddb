"""YAML as a mapping of plain values: no aliases, by which a small file grows without bound, and no key given twice."""

from __future__ import annotations

from typing import Any

import yaml


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain types."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """The next node, which is no alias."""
        if self.check_event(yaml.AliasEvent):
            raise ValueError("aliases (*name) are not taken: write the value again")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys differ."""
        made = super().construct_mapping(node, deep)
        if len(made) < len(node.value):
            raise ValueError(f"a key is given twice{node.start_mark}: leave out one of the two")
        return made


def parse_yaml(text: str) -> Any:
    """Parse YAML to plain values.

    Args:
        text: one document.

    Returns:
        Mappings, lists, texts, numbers, dates, true, false and null.

    Raises:
        ValueError: for an alias, or a key that a mapping has twice. What YAML does not allow, or nests too deep, raises
            what the parser does: YAMLError, RecursionError, ValueError and others.
    """
    return yaml.load(text, Loader=_PlainLoader)
