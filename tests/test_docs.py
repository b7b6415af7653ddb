"""The documents' own snippets, run."""

import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch

import nsc
from nsc.recipes.catalogue import list_methods
from tests.tiny import tiny_llama

ROOT = Path(__file__).parent.parent


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_kernels_page():
    torch.manual_seed(0)
    blocks = snippets("docs/kernels.md")
    assert len(blocks) == 8
    exec("\n".join(blocks), {})


def test_training_page():
    torch.manual_seed(0)
    blocks = snippets("docs/training.md")
    assert len(blocks) == 4
    exec("\n".join(blocks), {})


def test_options_page(base, adapters, texts):
    """Each option in a merge of two tiny adapters."""
    of = {"mnli": "plain", "qnli": "pattern"}
    names = {"nsc": nsc, "functools": functools, "base": base}
    names |= {"adapters": {task: adapters[name] for task, name in of.items()}}
    names |= {"data": {task: texts[name] for task, name in of.items()}}
    blocks = snippets("docs/options.md")
    assert len(blocks) == 11
    exec("\n".join(blocks), names)


def test_matching_page(base, adapters, texts):
    """Matching two tiny adapters whose tasks are their answers, with all that the page shows."""
    of = {"mnli": "plain", "qnli": "pattern"}
    names = {"nsc": nsc, "functools": functools, "base": base}
    names |= {"adapters": {task: adapters[name] for task, name in of.items()}}
    names |= {"data": {task: texts[name] for task, name in of.items()}}
    blocks = snippets("docs/matching.md")
    assert len(blocks) == 8
    exec("\n".join(blocks), names)
    tried = names["best"].report.searched["tried"]
    assert names["better"].report.started["from"] == "ssr" and names["better"].coefficients.shape[1] == 3
    assert str(names["best"].recipe.settings.density) == min(tried, key=tried.get) and len(tried) == 2
    assert set(names["result"].report.tried) == {"match", "task-arithmetic", "tsv", "ssr", "core-ties"}


def test_methods_page(base, adapters, texts, tmp_path, monkeypatch):
    """Other methods on the same two tiny adapters, and a merge saved."""
    monkeypatch.chdir(tmp_path)
    of = {"mnli": "plain", "qnli": "pattern"}
    names = {"nsc": nsc, "functools": functools, "torch": torch, "base": base, "texts": texts, "of": of}
    names |= {"adapters": {task: adapters[name] for task, name in of.items()}}
    blocks = snippets("docs/methods.md")
    assert len(blocks) == 9
    exec("\n".join(blocks), names)
    assert (tmp_path / "ties/adapter_model.safetensors").exists()


def test_methods_page_names_every_method_and_setting():
    page = (ROOT / "docs/methods.md").read_text()
    rows = [line for line in page.split("## Spaces")[0].splitlines() if line.startswith("| `")]
    for method in list_methods():
        (row,) = [row for row in rows if f"`{method['name']}`" in row.split("|")[1]]
        assert method["source"].rstrip("/") in row
        assert all(f"`{key}`" in page for key in (method["settings"] if not method["learns"] else ()))
        assert all(space in row for space in method["spaces"] if space != "full")


def test_readme_snippet_of_the_op():
    (block,) = [code for code in snippets("README.md") if "null_space_ratio(" in code]
    lora_A = torch.nn.Parameter(torch.randn(4, 16))
    names = {"z": torch.randn(5, 16), "lora_A": lora_A, "loss": torch.zeros(())}
    exec(block, names)
    names["loss"].backward()
    assert lora_A.grad.abs().max() > 0


def test_readme_and_makefile_agree():
    targets = set(re.findall(r"^(\w+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {"demo", "test", "check", "interpret", "aot", "bench", "gpu"} <= targets
    named = set(re.findall(r"make (\w+)", (ROOT / "README.md").read_text()))
    assert named <= targets


def test_adding_page(tmp_path):
    """Its files and changes, put into a copy of the project: the checks of style and their own tests pass there."""
    for name in ("nsc", "nsc_kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("golden", "__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    new = put_in(tmp_path, (ROOT / "docs/adding.md").read_text())
    tests = [path for path in new if path.startswith("tests/")]
    assert len(tests) == 6
    check(tmp_path, "ruff", "check", "nsc", "nsc_kernels", *tests)
    check(tmp_path, "ruff", "format", "--check", "nsc", "nsc_kernels", *tests)
    laws = "tests/methods/test_method_laws.py"
    check(tmp_path, "pytest", "-q", "-k", "trimmed or not law", laws, "tests/test_docstrings.py", *tests)
    kernel = next(path for path in tests if path.startswith("tests/kernels/"))
    check(tmp_path, "pytest", "-q", "--noconftest", kernel, TRITON_INTERPRET="1")


def put_in(project: Path, page: str) -> list[str]:
    """Every file of a page written, every change made; the paths of the files."""
    new = []
    for language, path, code in re.findall(r"```(python|diff)\n# (\S+\.py)\n(.*?)```", page, flags=re.DOTALL):
        file = project / path
        if language == "python":
            assert not file.exists(), f"{path} is no new file"
            file.write_text(code)
            new.append(path)
            continue
        text = file.read_text()
        for hunk in code.split("@@\n"):
            old, changed = (
                "".join(line[1:] for line in hunk.splitlines(True) if line[0] in kinds) for kinds in (" -", " +")
            )
            assert text.count(old) == 1, f"{path} holds {text.count(old)} times:\n{old}"
            text = text.replace(old, changed)
        file.write_text(text)
    return new


def check(project: Path, *command: str, **environment: str) -> None:
    """Run a Python module in a project; its output is the error if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1", **environment}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=project, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"


def test_architecture_page_names_every_file():
    sections = re.split(r"^### ", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)[1:]
    named = {
        f"{section.split()[0]}/{name}" for section in sections for name in re.findall(r"^\| `(\w+\.py)`", section, re.M)
    }
    files = [path.relative_to(ROOT) for package in ("nsc", "nsc_kernels") for path in (ROOT / package).rglob("*.py")]
    assert named == {path.as_posix() for path in files}


def test_architecture_page_has_the_table_of_imports():
    allowed = pytest.importorskip("tests.test_arrows").ALLOWED
    rows = re.findall(r"^\| `(\w+)` \| (.*)\|$", (ROOT / "docs/architecture.md").read_text(), flags=re.MULTILINE)
    table = {folder: set(re.findall(r"`(\w+)`", may)) for folder, may in rows}
    assert table.pop("cli") == set()  # all of them
    assert table == {folder: may for folder, may in allowed.items() if folder != "cli"}


def test_pages_about_changes_name_files_that_exist():
    """Of this project, beside the new ones of the worked examples."""
    for page in ("CONTRIBUTING.md", "docs/architecture.md", "docs/adding.md"):
        text = (ROOT / page).read_text()
        prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        for path in re.findall(r"`((?:nsc|nsc_kernels|tests|benchmarks|examples)/[\w/]+(?:\.py|/))`", prose):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_commit_hooks_run_what_make_check_runs():
    makefile = (ROOT / "Makefile").read_text()
    recipe = makefile.split("\ncheck:")[1].split("\n\n")[0].splitlines()[1:]
    hooks = re.findall(r"entry: (.+?), ", (ROOT / ".pre-commit-config.yaml").read_text())
    assert [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe] == hooks


def test_pull_requests_have_the_checklist_of_contributing():
    pages = [(ROOT / page).read_text() for page in ("CONTRIBUTING.md", ".github/PULL_REQUEST_TEMPLATE.md")]
    expected, asked = (re.findall(r"- \[ \] \*\*(.+?)\*\*", page) for page in pages)
    assert len(expected) == 6 and asked == expected


def test_in_memory_page(adapters):
    torch.manual_seed(0)
    of = {"mnli": "plain", "qnli": "pattern"}
    base = functools.partial(tiny_llama, "AutoModelForCausalLM")
    models = {task: peft.PeftModel.from_pretrained(base(), adapters[name]) for task, name in of.items()}
    names = {"nsc": nsc, "models": models, "base": base()}
    exec("\n".join(snippets("docs/in-memory.md")), names)
    loaded = names["model"].state_dict()
    assert all(torch.equal(loaded[k.replace(".weight", ".default.weight")], x) for k, x in names["state"].items())


def test_continuous_integration_runs_what_contributing_says():
    """The targets of ``.ci/run`` are those that CONTRIBUTING names, and the Makefile has them and all that it lists."""
    says = re.search(r"Continuous integration runs (.*?) \(`\.ci/run`\)", (ROOT / "CONTRIBUTING.md").read_text())
    runs = re.findall(r"^make (\w+)$", (ROOT / ".ci/run").read_text(), flags=re.MULTILINE)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    listed = re.findall(r"^make (\w+)  ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
    assert says and re.findall(r"`make (\w+)`", says[1]) == runs
    assert {"test", "interpret"} <= set(runs) <= set(listed) <= set(targets)
