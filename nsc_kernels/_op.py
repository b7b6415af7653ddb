"""One way to define an op: a torch reference that is schema, fake, CPU kernel and oracle, and a Triton launch."""

import functools
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import CustomOpDef, custom_op

from nsc_kernels._tl import HAS_TRITON

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """A kernel with everything it is called with. Running it and compiling it ahead of time read the same fields."""

    kernel: Any
    programs: int
    args: dict[str, Any]
    settings: dict[str, int]

    def run(self) -> None:
        """Launch on the current stream of the device that holds the arguments; nothing for an empty grid."""
        if self.programs == 0:
            return
        device = next(value for value in self.args.values() if isinstance(value, Tensor))
        with torch.cuda.device_of(device):
            self.kernel[(self.programs,)](**self.args, **self.settings)


def without_autocast(function: Callable) -> Callable:
    """``function``, computing in the dtypes it chose: autocast would re-dispatch the matmuls inside an op."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False):
            return function(*args)

    return run


def triton_backed(name: str, reference: Callable, launch: Callable) -> CustomOpDef:
    """Register ``reference`` as the operator ``name`` on every device, and ``launch`` (Triton) where Triton runs.

    Both take the same positional arguments, tensors first, and return fresh contiguous tensors. Triton runs on CUDA and
    ROCm, and on the CPU under ``TRITON_INTERPRET=1``; float64 always takes the reference.
    """
    reference = without_autocast(reference)

    @functools.wraps(reference)
    def run(*args: Any) -> Any:
        exact = any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args)
        return reference(*args) if exact else launch(*args)

    op = custom_op(name, reference, mutates_args=())
    op.register_fake(reference)
    if HAS_TRITON:
        op.register_kernel(["cpu", "cuda"] if INTERPRET else "cuda")(run)
    return op
