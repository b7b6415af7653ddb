"""The direction of imports, that the kernels import without triton or a GPU, and the command line without torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "nsc_kernels").rglob("*.py"))
DRIVER = sorted((ROOT / "nsc").rglob("*.py"))
# The modules that may import transformers and peft.
HEAVY = {
    "nsc/bases/base_model.py",
    "nsc/bases/checkpoint_keys.py",
    "nsc/bases/conv1d.py",
    "nsc/bases/experts.py",
    "nsc/bases/heads.py",
    "nsc/bases/task_head.py",
    "nsc/bases/loading.py",
    "nsc/bases/wrappers.py",
    "nsc/export/card.py",
    "nsc/export/served.py",
    "nsc/export/files.py",
    "nsc/export/parameters.py",
    "nsc/export/peft_model.py",
    "nsc/performance/plan.py",
    "nsc/runtime/quantization.py",
    "nsc/tracking.py",
    "nsc/watched_lora.py",
}


def imported(path: Path) -> set[str]:
    """Top-level names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernels_import_torch_triton_and_the_standard_library_only(path):
    assert imported(path) <= {"torch", "triton", "nsc_kernels"} | sys.stdlib_module_names


@pytest.mark.parametrize("path", DRIVER, ids=name)
def test_driver_imports_no_test_example_or_benchmark(path):
    assert not imported(path) & {"tests", "examples", "benchmarks", "pytest"}
    if name(path) not in HEAVY:
        assert not imported(path) & {"transformers", "peft"}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kernels_work_without_triton():
    without = "import sys; sys.modules['triton'] = None; sys.modules['triton.language'] = None\n"
    work = """
import torch, nsc_kernels
z, A = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8)
om = nsc_kernels.null_space_ratio(z, z @ A.T, nsc_kernels.GramCache().inverse(A))
om.sum().backward()
print(om.shape[0], bool(z.grad.any()))
"""
    assert run(without + work).split() == ["5", "True"]


def test_kernels_do_not_pull_in_the_driver():
    heavy = run("import sys, nsc_kernels; print([m for m in ('nsc', 'transformers', 'peft') if m in sys.modules])")
    assert heavy.strip() == "[]"


def test_kernels_load_torch_and_triton_alone():
    """Beyond what these two load by themselves, importing the kernels loads no other package."""
    code = """
import contextlib, sys, torch
with contextlib.suppress(ImportError):
    import triton, triton.language
before = set(sys.modules)
import nsc_kernels
print(*{name.partition(".")[0] for name in set(sys.modules) - before})
"""
    assert set(run(code).split()) <= {"nsc_kernels", "torch", "triton"} | sys.stdlib_module_names


@pytest.mark.parametrize("arguments", [[], ["--help"], ["merge", "--help"]], ids=" ".join)
def test_the_command_line_answers_without_torch(arguments):
    """Neither importing ``nsc.cli`` nor a --help loads what takes seconds."""
    code = f"""
import sys
from nsc.cli import app
if {arguments}:
    app({arguments}, standalone_mode=False)
print("loaded", *{{name.partition(".")[0] for name in sys.modules}})
"""
    shown, _, loaded = run(code).partition("loaded ")
    assert bool(shown) == bool(arguments) and "typer" in loaded.split()
    assert not {"torch", "transformers", "peft", "numpy", "triton"} & set(loaded.split())


def test_both_packages_ship_their_types():
    assert all((ROOT / package / "py.typed").is_file() for package in ("nsc", "nsc_kernels"))
