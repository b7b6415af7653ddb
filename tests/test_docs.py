"""The documents' own snippets, run."""

import functools
import re
from pathlib import Path

import torch

import nsc

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
