"""Merge LoRA adapters by Null-Space Compression, without labels, and prove what was written.

result = nsc.merge(base, {"mnli": path, ...}, {"mnli": "mnli.jsonl", ...})
result.save("merged")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsc.adapters.inspection import format_inspection, inspect
    from nsc.adapters.lora import Adapter, read_adapter
    from nsc.config import MergeConfig
    from nsc.errors import NSCError
    from nsc.evaluation.compare import compare
    from nsc.export.push import push
    from nsc.export.result import MergeResult
    from nsc.merging.api import merge
    from nsc.merging.from_record import apply
    from nsc.recipes.in_memory import merge_factors
    from nsc_kernels import __version__

# Imported when first used: the command line answers --help without torch.
_HOMES = {
    "Adapter": "nsc.adapters.lora",
    "MergeConfig": "nsc.config",
    "MergeResult": "nsc.export.result",
    "NSCError": "nsc.errors",
    "__version__": "nsc_kernels",
    "apply": "nsc.merging.from_record",
    "compare": "nsc.evaluation.compare",
    "format_inspection": "nsc.adapters.inspection",
    "inspect": "nsc.adapters.inspection",
    "merge": "nsc.merging.api",
    "merge_factors": "nsc.recipes.in_memory",
    "push": "nsc.export.push",
    "read_adapter": "nsc.adapters.lora",
}

__all__ = [
    "Adapter",
    "MergeConfig",
    "MergeResult",
    "NSCError",
    "__version__",
    "apply",
    "compare",
    "format_inspection",
    "inspect",
    "merge",
    "merge_factors",
    "push",
    "read_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
