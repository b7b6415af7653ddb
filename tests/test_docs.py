"""The documents' own snippets, run."""

import functools
import re
from pathlib import Path

import torch

import nsc
from nsc.recipes.catalogue import list_methods

ROOT = Path(__file__).parent.parent


def snippets(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_kernels_page():
    torch.manual_seed(0)
    blocks = snippets("docs/kernels.md")
    assert len(blocks) == 7
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


def test_methods_page(base, adapters, texts, tmp_path, monkeypatch):
    """Other methods on the same two tiny adapters, and a merge saved."""
    monkeypatch.chdir(tmp_path)
    of = {"mnli": "plain", "qnli": "pattern"}
    names = {"nsc": nsc, "functools": functools, "torch": torch, "base": base, "texts": texts, "of": of}
    names |= {"adapters": {task: adapters[name] for task, name in of.items()}}
    blocks = snippets("docs/methods.md")
    assert len(blocks) == 7
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
