"""Every kernel compiles for every target without a GPU, spills nothing, and moves 16 bytes a thread."""

import re
from pathlib import Path

import pytest
import torch

from nsc_kernels import aot
from nsc_kernels._launch import row_blocks, shrink_blocks
from nsc_kernels._op import INTERPRET

triton = pytest.importorskip("triton")
OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 3)
TARGETS = ["sm_80", "sm_90"] if OLD else list(aot.TARGETS)
COMPILED = [
    pytest.param(launch, target, id=f"{launch.kernel.__name__} {variant} {target}")
    for target in TARGETS
    for variant, launch in list(aot.launches())[:: 1 if target in ("sm_90", "gfx942") else 3]
]
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program may use
WIDE = {"shrink_kernel", "expand_kernel", "null_space_ratio_kernel", "null_space_ratio_backward_kernel"}
compiles = pytest.mark.skipif(INTERPRET, reason="interpreted kernels have no assembly")


@compiles
@pytest.mark.parametrize(("launch", "target"), COMPILED)
def test_compiles_without_spills(launch, target):
    """And streams what is as wide as a row 16 bytes a thread, unless its rows are not so aligned.

    All of it for two targets, a third for the other two; ``make aot`` does the whole and fails on any spill.
    """
    report = aot.report(aot.compile_for(launch, target))
    assert report.spills == 0 < report.registers
    assert report.shared <= SHARED[target]
    name, aligned = launch.kernel.__name__, launch.args["R"] % 16 == 0
    if name in WIDE:
        assert report.load_bytes == 16 or not aligned
    if name in ("expand_kernel", "null_space_ratio_backward_kernel"):
        assert report.store_bytes >= (8 if target == "gfx942" else 16)


@compiles
@pytest.mark.parametrize("target", [target for target in ("sm_90", "gfx942") if target in TARGETS])
def test_spills_are_seen(target):
    """A tile far too large for one warp does spill, and the report says so."""
    forward, *_ = aot.ratio_launches(65536, 4096, 96, torch.float32, gram=True, routed=True)
    oversized = forward._replace(settings={"BLOCK_N": 16, "BLOCK_D": 1024, "BLOCK_R": 32, "num_warps": 1})
    assert aot.report(aot.compile_for(oversized, target)).spills > 0


def test_launches_are_what_runs():
    """What is compiled carries the settings of the launch; every kernel of the package, in every form, once."""
    forward, backward, *_ = aot.ratio_launches(1024, 768, 96, torch.bfloat16, gram=True, routed=True)
    assert forward.settings == backward.settings == row_blocks(1024, 768, 96)._asdict()
    down = aot.lora_launches(1024, 768, 768, 96, torch.bfloat16)["lora_down"][0]
    blocks, splits, span = shrink_blocks(1024, 768, 96, 2)
    assert down.settings == blocks._asdict() and down.grid[1] == splits and down.args["SPAN"] == span
    named = list(aot.launches())
    assert len(named) == len({(variant, launch.kernel.__name__) for variant, launch in named})
    compiled = {launch.kernel.__name__ for _, launch in named}
    source = "".join(path.read_text() for path in Path(aot.__file__).parent.glob("*.py"))
    assert compiled == set(re.findall(r"^def (\w+_kernel)\(", source, flags=re.MULTILINE))
    ratios = [launch for _, launch in named if "gram_inverse_ptr" in launch.args]
    assert {launch.args["gram_inverse_ptr"] is None for launch in ratios} == {True, False}


@compiles
def test_specialise():
    """Constants are those that Triton folds: constexpr, None, and 1 where the argument may be specialised."""
    forward, backward, *_ = aot.ratio_launches(1, 4096, 96, torch.bfloat16, gram=False, routed=True)
    signature, constants, aligned = aot.specialise(forward)
    assert signature["z_ptr"] == "*bf16" and signature["adapter_ptr"] == "*i64" and signature["N"] == "i32"
    assert constants["gram_inverse_ptr"] is None and constants["BLOCK_D"] == forward.settings["BLOCK_D"]
    names = list(signature)
    assert names.index("z_ptr") in aligned and names.index("D") in aligned and names.index("N") not in aligned
    assert "K" not in constants and names.index("K") not in aligned
    assert names.index("z_stride") in aligned
    assert aot.specialise(backward)[0]["grad_stride"] == "i32"


def test_parsers():
    spilled = "Function f:\n  REG:168 STACK:2064 SHARED:64 LOCAL:8 CONSTANT[0]:448 TEXTURE:0 SURFACE:0 SAMPLER:0"
    assert aot.parse_resource_usage(spilled) == (168, 2072)
    assert aot.parse_resource_usage("REG:40 STACK:0 SHARED:0 LOCAL:0") == (40, 0)
    amd = ".sgpr_count: 106\n .sgpr_spill_count: {}\n .vgpr_count:     117\n .vgpr_spill_count: {}"
    assert aot.parse_amdgcn(amd.format(21, 4)) == (117, 25)
    assert aot.parse_amdgcn(amd.format(0, 0)) == (117, 0)


def test_width():
    ptx = "ld.param.b32 %r1;\n@%p1 ld.global.v4.b32 { %r1 };\n ld.global.L1::evict_last.b32\n st.global.v2.b16 [x];"
    assert (aot.width(ptx, "load"), aot.width(ptx, "store")) == (16, 4)
    assert aot.width("ld.global.b16 x; ld.shared.v4.b32 y;", "load") == 2
    asynchronous = "cp.async.cg.shared.global [ %r19 + 0 ], [ %rd17 + 0 ], 0x10, %r20;"
    assert (aot.width(asynchronous, "load"), aot.width(asynchronous, "store")) == (16, 0)
    amd = "global_load_dwordx2 v[0:1]\n buffer_load_dwordx4 v[0:3]\n global_store_short v1\n ds_read_b128 v"
    assert (aot.width(amd, "load"), aot.width(amd, "store")) == (16, 0)
    assert aot.width("global_store_b128 v1\nglobal_store_dword v2", "store") == 16
