"""Compile every kernel ahead of time, as it would be launched, for GPUs this machine need not have.

    python -m nsc_kernels.aot [sm_80 sm_90 sm_100 gfx942]

prints what the compilers say of each: registers, shared memory, spills, and the widest global load and store.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsc_kernels._op import INTERPRET, Launch
from nsc_kernels._tl import HAS_TRITON, triton
from nsc_kernels.null_space_ratio import plan_backward, plan_forward

TARGETS: dict[str, tuple[str, int | str, int]] = {  # backend, architecture, lanes of a warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),  # from Triton 3.3
    "gfx942": ("hip", "gfx942", 64),  # below Triton 3.3 it takes a ROCm linker
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.int64: "*i64", torch.int32: "*i32"}


class Report(NamedTuple):
    """What a compiled kernel takes of one multiprocessor, in registers a thread and bytes."""

    registers: int
    shared: int
    spills: int
    load_bytes: int
    store_bytes: int


def null_space_ratio_launches(
    n: int, d: int, r: int, dtype: torch.dtype, *, gram: bool, routed: bool
) -> tuple[Launch, Launch]:
    """Forward and backward for meta tensors of these shapes; ``routed``: with adapters, offsets and weights."""

    def meta(*shape: int, like: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    row = meta(n)
    adapter, offsets = (meta(n, like=torch.int64), meta(7, like=torch.int64)) if routed else (None, None)
    given = (meta(r, r) if gram else None, adapter, offsets, row if routed else None)
    z, u = meta(n, d, like=dtype), meta(n, r, like=dtype)
    return plan_forward(z, u, *given)[0], plan_backward(row[0] if routed else row, z, u, *given, row, row, True, True)[
        0
    ]


def launches() -> Iterator[tuple[str, Launch]]:
    """Every kernel in the variants that differ in code: the form, the routing, the dtype, and wide or narrow rows."""
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(65536, 4096, 96, bf16), (65536, 4096, 96, fp32), (128, 16384, 512, bf16), (65536, 64, 16, bf16)]
    for n, d, r, dtype in shapes:
        for gram, routed in [(False, False), (False, True), (True, False), (True, True)]:
            if gram == routed or (d, dtype) == (4096, bf16):
                form = f"{'gram' if gram else 'whitened'}{' routed' if routed else ''}"
                variant = f"{form} {str(dtype).removeprefix('torch.')} n={n} d={d} R={r}"
                for launch in null_space_ratio_launches(n, d, r, dtype, gram=gram, routed=routed):
                    yield variant, launch


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Signature, constants and positions of arguments divisible by 16, as Triton's JIT derives them at the launch.

    Tensors are taken as 16-byte aligned, which torch's allocators guarantee for whole tensors.
    """
    signature, constants, aligned = {}, {}, []
    for position, parameter in enumerate(launch.kernel.params):
        value = (launch.args | launch.settings)[parameter.name]
        fixed = parameter.is_constexpr or value is None
        if fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
            continue
        signature[parameter.name] = POINTERS[value.dtype] if isinstance(value, Tensor) else "i32"
        if isinstance(value, Tensor) or (value % 16 == 0 and not parameter.do_not_specialize):
            aligned.append(position)
    return signature, constants, aligned


def compile_for(launch: Launch, target: str) -> Any:
    """The Triton compiled kernel of ``launch`` for a name in ``TARGETS``. Raises RuntimeError where Triton cannot."""
    if not HAS_TRITON or INTERPRET:
        raise RuntimeError("ahead-of-time compilation needs Triton installed and TRITON_INTERPRET unset")
    from triton.backends.compiler import GPUTarget

    options = {name: launch.settings[name] for name in ("num_warps", "num_stages") if name in launch.settings}
    return triton.compile(_source(launch), target=GPUTarget(*TARGETS[target]), options=options)


def _source(launch: Launch) -> Any:
    from triton.backends import compiler
    from triton.compiler import ASTSource

    signature, constants, aligned = specialise(launch)
    if hasattr(compiler, "AttrsDescriptor"):  # Triton up to 3.2, that of torch 2.6
        variable = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        hints = compiler.AttrsDescriptor.from_hints(dict.fromkeys(aligned, 16))
        return ASTSource(launch.kernel, variable, constants, hints)
    return ASTSource(launch.kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})


def report(kernel: Any) -> Report:
    """Read off a compiled kernel, the very binary that would be launched."""
    if "cubin" in kernel.asm:
        text, (registers, spills) = kernel.asm["ptx"], parse_resource_usage(_resource_usage(kernel.asm["cubin"]))
    else:
        text = kernel.asm["amdgcn"]
        registers, spills = parse_amdgcn(text)
    return Report(registers, kernel.metadata.shared, spills, width(text, "load"), width(text, "store"))


def _resource_usage(cubin: bytes) -> str:
    # not ptxas -v on the PTX: without the flags that Triton gives it, it allocates and spills differently
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_resource_usage(dump: str) -> tuple[int, int]:
    """Registers, and bytes of stack and local memory (these kernels have no arrays: all spills), from cuobjdump."""
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def parse_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers, and registers spilled (vector and scalar), from the metadata of an AMD assembly."""
    spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
    return int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0]), sum(map(int, spills))


def width(assembly: str, access: str) -> int:
    """Bytes a thread moves in the widest global ``access``, "load" or "store", in PTX or AMD assembly; 0 if none."""
    short = {"load": "ld", "store": "st"}[access]
    nvidia = re.findall(rf"\b{short}\.global(?:\.[a-zL][\w:]*)*?(?:\.v(\d))?\.[bf](\d+)", assembly)
    amd = re.findall(rf"\b(?:global|buffer)_{access}_(?:dword(?:x(\d))?|b(\d+))\b", assembly)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in nvidia]
    return max(sizes + [int(bits) // 8 if bits else 4 * int(count or 1) for count, bits in amd], default=0)


def main(targets: Sequence[str]) -> None:
    """Print the table for these targets."""
    print(f"{'kernel':34}{'variant':46}{'target':8}" + "".join(f"{name:>13}" for name in Report._fields))
    for variant, launch in launches():
        for target in targets:
            numbers = "".join(f"{x:13}" for x in report(compile_for(launch, target)))
            print(f"{launch.kernel.__name__:34}{variant:46}{target:8}{numbers}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or list(TARGETS))
