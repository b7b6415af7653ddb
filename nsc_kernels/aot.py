"""Compile every kernel ahead of time, as it would be launched, for GPUs that this machine need not have.

    python -m nsc_kernels.aot [sm_80 sm_90 sm_100 gfx942]

prints what the compilers report of each kernel: registers, shared memory, spills, and the widest global load and store.
"""

import importlib
import itertools
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
from nsc_kernels._skinny import plan_expand, plan_shrink
from nsc_kernels._tl import HAS_TRITON, triton

# the modules, which the package's functions of the same names hide
lora_moments, null_space_ratio, ratio_from_energy = (
    importlib.import_module(f"nsc_kernels.{name}") for name in ("lora_moments", "null_space_ratio", "ratio_from_energy")
)
TARGETS: dict[str, tuple[str, int | str, int]] = {  # backend, architecture, lanes of a warp
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),  # from Triton 3.3
    "gfx942": ("hip", "gfx942", 64),  # below Triton 3.3 it takes a ROCm linker
}
POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
POINTERS |= {torch.float64: "*fp64", torch.int64: "*i64", torch.int32: "*i32"}


class Resources(NamedTuple):
    """What a compiled kernel takes of one multiprocessor.

    Attributes:
        registers: of a thread; vector registers on AMD.
        shared: bytes of shared memory of a program.
        spills: bytes spilled to local memory; registers spilled on AMD.
        load_bytes: bytes that a thread moves in the widest global load.
        store_bytes: bytes that a thread moves in the widest global store.
    """

    registers: int
    shared: int
    spills: int
    load_bytes: int
    store_bytes: int


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a tensor without memory: a plan needs only its shape, strides and dtype.

    Args:
        shape: sizes.
        dtype: any.

    Returns:
        A contiguous tensor on the meta device.
    """
    return torch.empty(shape, dtype=dtype, device="meta")


def ratio_launches(n: int, d: int, r: int, dtype: torch.dtype, *, gram: bool, routed: bool) -> list[Launch]:
    """Return the launches of both ratios, forward and backward.

    Args:
        n: rows.
        d: their width.
        r: ranks of all adapters, added up.
        dtype: of z and u.
        gram: whether there is an inverse Gram.
        routed: whether there are adapters, offsets and weights.

    Returns:
        Four launches on meta tensors.
    """
    row, z, u = meta(n), meta(n, d, dtype=dtype), meta(n, r, dtype=dtype)
    adapter, offsets = (meta(n, dtype=torch.int64), meta(7, dtype=torch.int64)) if routed else (None, None)
    given = (meta(r, r) if gram else None, adapter, offsets, row if routed else None)
    grad = row[0] if routed else row
    return [
        null_space_ratio.plan_forward(z, u, *given)[0],
        null_space_ratio.plan_backward(grad, z, u, *given, row, row, True, True)[0],
        ratio_from_energy.plan_forward(row, u, *given)[0],
        ratio_from_energy.plan_backward(grad, row, u, *given, row)[0],
    ]


def lora_launches(n: int, d: int, m: int, r: int, dtype: torch.dtype) -> dict[str, list[Launch]]:
    """Return the launches of the LoRA ops of one layer.

    Args:
        n: rows.
        d: inputs of the layer.
        m: outputs of the layer.
        r: ranks of all adapters, added up.
        dtype: of rows and factors.

    Returns:
        Op and pass -> its launches, on meta tensors.
    """
    z, y, u, A, B, W = (meta(*shape, dtype=dtype) for shape in [(n, d), (n, m), (n, r), (r, d), (m, r), (m, d)])
    c, e = meta(r), meta(n)
    return {
        "lora_down": plan_shrink(z, A, energy=True)[0],
        "lora_down backward": plan_expand(z, u, A, e=e, z=z)[0],
        "lora_up": plan_expand(y, u, B.T, c)[0],
        "lora_up backward": plan_shrink(y, B.T, u, c)[0],
        "lora_fold": plan_expand(W, B, A, c)[0],
        "lora_fold backward": plan_shrink(W, A, B, c, values=False)[0],
    }


def moment_launches(n: int, r: int, dtype: torch.dtype, *, routed: bool) -> dict[str, list[Launch]]:
    """Return the launches of the second and the cross moments of u.

    Args:
        n: rows.
        r: columns of u.
        dtype: of u, in both runs.
        routed: whether there are several tasks, and weights.

    Returns:
        Kind of moments -> its launches, on meta tensors.
    """
    u = meta(n, r, dtype=dtype)
    given = (meta(n, dtype=torch.int64), meta(n), 6) if routed else (None, None, 1)
    return {name: lora_moments.plan_moments(left, u, *given)[0] for name, left in (("second", None), ("cross", u))}


def launches() -> Iterator[tuple[str, Launch]]:
    """List every kernel in the variants that differ in code: form, routing, dtype, rank, many, few and wide rows.

    Yields:
        The variant in words, and a launch; no two launches compile to the same code.
    """
    seen: list[tuple[Any, ...]] = []
    for variant, launch in _all_launches():
        code = (launch.kernel, launch.settings, specialise(launch))
        if code not in seen:
            seen.append(code)
            yield variant, launch


def _all_launches() -> Iterator[tuple[str, Launch]]:
    bf16, fp32 = torch.bfloat16, torch.float32
    shapes = [(65536, 4096, 96, bf16), (65536, 4096, 96, fp32), (128, 16384, 512, bf16), (65536, 64, 16, bf16)]
    for n, d, r, dtype in shapes:
        for gram, routed in [(False, False), (False, True), (True, False), (True, True)]:
            if gram == routed or (d, dtype) == (4096, bf16):
                form = f"{'gram' if gram else 'whitened'}{' routed' if routed else ''}"
                for launch in ratio_launches(n, d, r, dtype, gram=gram, routed=routed):
                    yield f"{form} {_name(dtype, n=n, d=d, R=r)}", launch
    shapes += [(8, 4096, 96, bf16), (48, 768, 320, bf16), (6304, 768, 200, bf16), (8, 4096, 96, fp32)]
    for n, d, r, dtype in [*shapes, (100, 4096, 48, fp32), (128, 16384, 512, fp32)]:
        for step, planned in lora_launches(n, d, d, r, dtype).items():
            for launch in planned:
                yield f"{step} {_name(dtype, n=n, d=d, R=r)}", launch
    moments = [(65536, 96, bf16), (65536, 512, bf16), (65536, 96, fp32), (6304, 20, bf16), (6304, 200, fp32)]
    for (n, r, dtype), routed in itertools.product([*moments, (8, 96, torch.float16)], (False, True)):
        for kind, planned in moment_launches(n, r, dtype, routed=routed).items():
            for launch in planned:
                yield f"{kind} moments{' routed' if routed else ''} {_name(dtype, n=n, R=r)}", launch


def _name(dtype: torch.dtype, **sizes: int) -> str:
    return " ".join([str(dtype).removeprefix("torch."), *(f"{name}={size}" for name, size in sizes.items())])


def specialise(launch: Launch) -> tuple[dict[str, str], dict[str, Any], list[int]]:
    """Derive from a launch what Triton's JIT derives from it.

    Tensors are taken as 16-byte aligned, which torch's allocators guarantee for whole tensors.

    Args:
        launch: with arguments that may be meta tensors.

    Returns:
        The signature and the constants by parameter, and the positions of arguments divisible by 16.
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
    """Compile a launch for a target.

    Args:
        launch: with arguments that may be meta tensors.
        target: a name in ``TARGETS``.

    Returns:
        Triton's compiled kernel.

    Raises:
        RuntimeError: if Triton is not installed or interprets its kernels.
    """
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


def report(kernel: Any) -> Resources:
    """Read registers, memory and widths off a compiled kernel, the very binary that would be launched.

    Args:
        kernel: as ``compile_for`` returns it.

    Returns:
        The report.
    """
    if "cubin" in kernel.asm:
        text, (registers, spills) = kernel.asm["ptx"], parse_resource_usage(_resource_usage(kernel.asm["cubin"]))
    else:
        text = kernel.asm["amdgcn"]
        registers, spills = parse_amdgcn(text)
    return Resources(registers, kernel.metadata.shared, spills, width(text, "load"), width(text, "store"))


def _resource_usage(cubin: bytes) -> str:
    # not ptxas -v on the PTX: without the flags that Triton gives it, it allocates and spills differently
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def parse_resource_usage(dump: str) -> tuple[int, int]:
    """Read registers and spills off the output of ``cuobjdump --dump-resource-usage``.

    Args:
        dump: the output for one kernel.

    Returns:
        Registers of a thread, and bytes of stack and local memory: all spills, since the kernels have no arrays.
    """
    used = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def parse_amdgcn(assembly: str) -> tuple[int, int]:
    """Read registers and spills off the metadata of an AMD assembly.

    Args:
        assembly: of one kernel.

    Returns:
        Vector registers, and the number of registers spilled, vector and scalar.
    """
    spills = re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", assembly)
    return int(re.findall(r"\.vgpr_count:\s*(\d+)", assembly)[0]), sum(map(int, spills))


def width(assembly: str, access: str) -> int:
    """Return how many bytes a thread moves in its widest access to global memory.

    Args:
        assembly: PTX or AMD assembly.
        access: "load" or "store".

    Returns:
        Bytes; 0 if there is no such access.
    """
    short = {"load": "ld", "store": "st"}[access]
    nvidia = re.findall(rf"\b{short}\.global(?:\.[a-zL][\w:]*)*?(?:\.v(\d))?\.[bf](\d+)", assembly)
    amd = re.findall(rf"\b(?:global|buffer)_{access}_(?:dword(?:x(\d))?|b(\d+))\b", assembly)
    sizes = [int(count or 1) * int(bits) // 8 for count, bits in nvidia]
    if access == "load":
        copies = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], *(\w+)", assembly)
        sizes += [int(size, 0) for size in copies]
    return max(sizes + [int(bits) // 8 if bits else 4 * int(count or 1) for count, bits in amd], default=0)


def main(targets: Sequence[str]) -> int:
    """Compile every kernel and print the table.

    Args:
        targets: names in ``TARGETS``.

    Returns:
        How many of the kernels spill.
    """
    print(f"{'kernel':34}{'variant':52}{'target':8}" + "".join(f"{name:>13}" for name in Resources._fields))
    spilled = 0
    for variant, launch in launches():
        for target in targets:
            usage = report(compile_for(launch, target))
            spilled += usage.spills > 0
            print(f"{launch.kernel.__name__:34}{variant:52}{target:8}" + "".join(f"{x:13}" for x in usage), flush=True)
    print(f"{spilled} of them spill")
    return spilled


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(TARGETS)) > 0)
