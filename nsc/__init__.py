"""Merge LoRA adapters by Null-Space Compression, without labels, and prove what was written.

result = nsc.merge(base, {"mnli": path, ...}, {"mnli": "mnli.jsonl", ...})
result.save("merged")
"""

from nsc.adapters import Adapter, read_adapter
from nsc.comparing import compare
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.inspection import format_inspection, inspect
from nsc.merging import apply, merge
from nsc.result import MergeResult
from nsc_kernels import __version__

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
    "read_adapter",
]
