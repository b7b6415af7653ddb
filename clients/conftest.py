"""A tiny LLaMA, adapters that differ in targets, ranks and scales, their merge in every form, and the logits it has."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import nsc
from tests.tiny import dense_updates, peft_adapter, save_base, tiny_llama

# vLLM's attention on the CPU wants heads of 32 or more.
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "narrow": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
    "wide": dict(r=8, lora_alpha=4, target_modules=LINEARS),
    "rslora": dict(r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "v_proj", "down_proj"]),
}
FORMS = {
    "one-rank": {},
    "ragged": {"ragged": True},
    "truncated": {"rank": 3},
    "full": {"full": True},
}
PROMPTS = [[1, 5, 9, 14, 23, 42, 7, 8], [1, 33, 12, 60, 4, 19, 19, 50, 6, 11, 27]]


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("clients") / "base", **SIZES)


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        task: peft_adapter(folder / task, tiny_llama("AutoModelForCausalLM", **SIZES), seed=seed, **lora)
        for seed, (task, lora) in enumerate(ADAPTERS.items())
    }


@pytest.fixture(scope="session")
def forms(tmp_path_factory, base, adapters) -> dict[str, Path]:
    """The merge as it is written in each form."""
    result, home = nsc.merge(base, adapters, method="task-arithmetic", scale=0.5, progress=False), {}
    for name, form in FORMS.items():
        home[name] = tmp_path_factory.mktemp(name) / "out"
        result.save(home[name], **form)
    return home


@pytest.fixture(scope="session")
def expected(base, adapters, forms) -> dict[str, list[Tensor]]:
    """Form -> log probabilities of each prompt, by transformers with each update added to the base in float64.

    That of the truncated adapter is the sum of its own factors, which the proof compares with the merge.
    """
    exact: dict[str, Tensor] = {}
    for path in adapters.values():
        for name, update in dense_updates(path, **SIZES).items():
            exact[name] = exact.get(name, 0) + 0.5 * update
    updates = {"exact": exact, "truncated": dense_updates(forms["truncated"], **SIZES), "bare": {}}
    return {name: log_probabilities(base, update) for name, update in updates.items()}


def log_probabilities(base: Path, update: dict[str, Tensor]) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for name, delta in update.items():
        weight = model.model.get_submodule(name).weight
        weight.data = (weight.double() + delta).float()
    with torch.no_grad():
        return [model(torch.tensor([prompt])).logits[0].double().log_softmax(-1) for prompt in PROMPTS]


def distance(found: list[Tensor], wanted: list[Tensor]) -> float:
    """Largest difference of two sets of log probabilities."""
    return max((a.double() - b).abs().max().item() for a, b in zip(found, wanted, strict=True))
