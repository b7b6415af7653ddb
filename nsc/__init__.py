"""Merge LoRA adapters by Null-Space Compression, without labels, and prove what was written.

result = nsc.merge(base, {"mnli": path, ...}, {"mnli": "mnli.jsonl", ...})
result.save("merged")
"""

from nsc.adapters.inspection import format_inspection, inspect
from nsc.adapters.lora import Adapter, read_adapter
from nsc.config import MergeConfig
from nsc.errors import NSCError
from nsc.evaluation.compare import compare
from nsc.export.result import MergeResult
from nsc.merging.from_data import apply, merge
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
