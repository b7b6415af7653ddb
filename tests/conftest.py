"""One tiny base with a tokenizer, adapters of every kind that can be merged, their data, and one merge of them all."""

from pathlib import Path

import pytest
import transformers
from ops import RATIOS
from tiny import WORDS, peft_adapter, save_base, tiny_llama

import nsc

# Ranks, scales, targets and wrappers all differ; every adapter has the v_proj of the last block, the default target.
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["k_proj", "v_proj", "down_proj"]),
    "double": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="SEQ_CLS"),
    "pattern": dict(
        r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank_pattern={"q_proj": 2, r".*\.1\..*v_proj": 6},
        alpha_pattern={r"layers\.3\.self_attn\.v_proj": 2},
    ),
}  # fmt: skip
# The live models of test_names carry the names of transformers 5.
collect_ignore = ["test_names.py"] if transformers.__version__.startswith("4.") else []
KINDS = {"SEQ_CLS": "AutoModelForSequenceClassification"}


@pytest.fixture(scope="session")
def base(tmp_path_factory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="session")
def adapters(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {}
    for seed, (task, lora) in enumerate(ADAPTERS.items()):
        model = tiny_llama(KINDS.get(lora.get("task_type", ""), "AutoModelForCausalLM"))
        made[task] = peft_adapter(folder / task, model, seed=seed, **lora)
    return made


@pytest.fixture(scope="session")
def texts() -> dict[str, list[str]]:
    """Five samples a task, of different lengths and words."""
    return {
        task: [" ".join(WORDS[(7 * k + 3 * i + j) % len(WORDS)] for j in range(3 + i)) for i in range(5)]
        for k, task in enumerate(ADAPTERS)
    }


@pytest.fixture(scope="session")
def merged(base, adapters, texts) -> nsc.MergeResult:
    return nsc.merge(base, adapters, texts, steps=5, lr=0.05, progress=False)


@pytest.fixture(params=list(RATIOS))
def ratio(request):
    """Either ratio op, as a function of z, u and the rest."""
    return RATIOS[request.param]
