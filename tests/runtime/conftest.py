"""A model with three adapters and their batches, what one process learns from them, and a merge by command."""

import json

import pytest

from nsc.data.text import TextBatches
from tests.runtime.ranks import LENGTHS, run
from tests.stacks import random_stack, random_tokens
from tests.tiny import linears, tiny_llama


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """(model, stack, batches) in float64: three adapters on every q_proj and v_proj, tasks of 3, 5 and 1 samples."""
    model = tiny_llama("AutoModel").double().requires_grad_(False).eval()
    names = [name for name in linears(model) if name.endswith(("q_proj", "v_proj"))]
    stack = random_stack(model, names, LENGTHS, tmp_path_factory.mktemp("adapters"))
    return model, stack, TextBatches(random_tokens(LENGTHS), batch_size=2, pad_id=0)


@pytest.fixture(scope="module")
def alone(setting):
    return run(setting)


@pytest.fixture(scope="module")
def command(base, adapters, texts, tmp_path_factory):
    """``nsc merge`` of two adapters with its options, without ``--out``."""
    folder = tmp_path_factory.mktemp("data")
    words = ["merge", "--base", str(base), "--steps", "40", "--dtype", "float64"]
    for task in ("plain", "rslora"):
        (folder / f"{task}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[task]))
        words += ["--adapter", f"{task}={adapters[task]}", "--data", f"{task}={folder / task}.jsonl"]
    return words
