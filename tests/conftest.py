"""A tiny base with a tokenizer, different adapters, their data and a merge of them all; and a LLaVA with the same."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

import nsc
from tests.ops import RATIOS
from tests.tiny import (
    WORDS,
    llava_prefixes,
    peft_adapter,
    random_factors,
    save_base,
    save_llava_base,
    tiny_llama,
    write_adapter,
)

# Ranks, scales, target modules and task types differ; all have the v_proj of the last block, the default target.
ADAPTERS = {
    "plain": dict(r=4, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "rslora": dict(r=4, lora_alpha=8, use_rslora=True, target_modules=["k_proj", "v_proj", "down_proj"]),
    "double": dict(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "o_proj"], task_type="SEQ_CLS"),
    "pattern": dict(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"],
        rank_pattern={"q_proj": 2, r".*\.1\..*v_proj": 6},
        alpha_pattern={r"layers\.3\.self_attn\.v_proj": 2},
    ),
}
# The live models of test_matching carry the names of transformers 5.
collect_ignore = ["adapters/test_matching.py"] if transformers.__version__.startswith("4.") else []
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
    """Five samples per task, of different lengths and words."""
    return {
        task: [" ".join(WORDS[(7 * k + 3 * i + j) % len(WORDS)] for j in range(3 + i)) for i in range(5)]
        for k, task in enumerate(ADAPTERS)
    }


@pytest.fixture(scope="session")
def merged(base, adapters, texts) -> nsc.MergeResult:
    return nsc.merge(base, adapters, texts, steps=5, lr=0.05, progress=False)


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    return save_llava_base(tmp_path_factory.mktemp("llava") / "base")


@pytest.fixture(scope="session")
def llava_adapters(tmp_path_factory, llava) -> dict[str, Path]:
    """Three adapters with LoRA on q and v, two of which also fine-tuned the projector."""
    made, (text, projector) = {}, llava_prefixes()
    stored = load_file(llava / "model.safetensors")
    for seed, task in enumerate(("count", "color", "plain")):
        generator = torch.Generator().manual_seed(seed)
        saved = {
            f"{projector}.{key.split('multi_modal_projector.')[1]}": tensor
            + 0.2 * torch.randn(tensor.shape, generator=generator)
            for key, tensor in stored.items()
            if "multi_modal_projector" in key and task != "plain"
        }
        names = [f"{text}.{i}.self_attn.{kind}" for i in range(4) for kind in ("q_proj", "v_proj")]
        factors = {n: random_factors([n], m=16 if "v_proj" in n else 32, seed=seed)[n] for n in names}
        path = tmp_path_factory.mktemp("adapters") / task
        made[task] = write_adapter(path, factors, alpha=0.4, saved=saved or None, target_modules=names)
    return made


@pytest.fixture(scope="session")
def questions(tmp_path_factory, llava_adapters) -> dict[str, Path]:
    """Four images per task, of different sizes, with questions of different lengths."""
    pillow, files = pytest.importorskip("PIL.Image"), {}
    for k, task in enumerate(llava_adapters):
        folder = tmp_path_factory.mktemp(task)
        rows = []
        for i in range(4):
            generator = torch.Generator().manual_seed(9 * k + i)
            pixels = torch.randint(256, (9 + i, 12, 3), dtype=torch.uint8, generator=generator)
            pillow.fromarray(pixels.numpy()).save(folder / f"{i}.png")
            words = " ".join(WORDS[5 + (7 * k + i + j) % 50] for j in range(1 + 2 * i))
            rows.append({"image": f"{i}.png", "question": words, "answer": "never read"})
        files[task] = folder / "rows.jsonl"
        files[task].write_text("\n".join(map(json.dumps, rows)))
    return files


@pytest.fixture(params=list(RATIOS))
def ratio(request):
    """Each ratio op in turn, as a function of z, u and the rest."""
    return RATIOS[request.param]


@pytest.fixture
def one_thread():
    """As other processes have, for the same bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
