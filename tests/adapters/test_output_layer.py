"""lm_head in modules_to_save is a layer like others fine-tuned whole; every tensor of an adapter is counted."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import nsc
from nsc.errors import NameMismatch, NSCError, ProofError
from tests.tiny import dense_updates, peft_adapter, rewrite, tiny_llama

IDS = torch.arange(4, 28).view(2, 12)
HEAD = "base_model.model.lm_head.weight"


@pytest.fixture(scope="module")
def tasks(base, tmp_path_factory) -> dict[str, Path]:
    """Adapters on q and v: a and b fine-tuned lm_head as well, c did not."""
    made, stored = {}, load_file(base / "model.safetensors")["lm_head.weight"]
    for seed, task in enumerate("abc"):
        more = {} if task == "c" else {"modules_to_save": ["lm_head"]}
        lora = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        folder = tmp_path_factory.mktemp("tasks") / task
        made[task] = peft_adapter(folder, tiny_llama("AutoModelForCausalLM"), seed, **lora, **more)
        if more:
            noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(seed))
            rewrite(folder / "adapter_model.safetensors", lambda t, x=stored + noise: t.update({HEAD: x}))
    return made


@torch.no_grad()
def expected(base: Path, tasks: dict[str, Path], lam: dict[str, dict[str, float]]) -> torch.Tensor:
    """Logits of the base with every update and every difference of lm_head added, in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base).double()
    stored = model.lm_head.weight.clone()
    for task, folder in tasks.items():
        for name, update in dense_updates(folder).items():
            model.model.get_submodule(name).weight += lam[name][task] * update
        if (head := load_file(folder / "adapter_model.safetensors").get(HEAD)) is not None:
            model.lm_head.weight += lam["lm_head"][task] * (head.double() - stored)
    return model(IDS).logits


@torch.no_grad()
def logits(base: Path, out: Path, full: bool) -> torch.Tensor:
    load = transformers.AutoModelForCausalLM.from_pretrained
    return (load(out) if full else peft.PeftModel.from_pretrained(load(base), out)).double()(IDS).logits


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("how", ["data-free", "learned", "replayed"])
def test_it_is_merged_like_any_other_layer(tmp_path, base, tasks, how, full):
    if how == "data-free":
        result = nsc.merge(base, tasks, method="task-arithmetic", scale=0.5, progress=False)
    else:
        result = nsc.merge(base, tasks, {t: ["word1 word2 word3"] for t in tasks}, steps=3, lr=0.05, progress=False)
        if how == "replayed":
            result.save(tmp_path / "first")
            result = nsc.apply(tmp_path / "first")
    lam = torch.full((9, 3), 0.5) if result.coefficients is None else result.coefficients
    rows = {n: dict(zip(tasks, row, strict=True)) for n, row in zip(result.modules, lam.double().tolist(), strict=True)}
    assert result.modules[-1] == "lm_head" and "lm_head" in result.report.summary()
    result.save(tmp_path / "out", full=full)
    wanted = expected(base, tasks, rows)
    assert (logits(base, tmp_path / "out", full) - wanted).norm() < 1e-5 * wanted.norm()
    assert not (tmp_path / "out/heads").exists()
    assert "differences: lm_head" in (tmp_path / "out/README.md").read_text()
    assert json.loads((tmp_path / "out/report.json").read_text())["whole"] == ["lm_head"]


def test_it_may_be_kept_which_is_said(tmp_path, base, tasks):
    result = nsc.merge(base, tasks, method="task-arithmetic", keep_modules=("lm_head",), progress=False)
    assert "under heads/, each for its own task: a (lm_head.weight); b (lm_head.weight)" in result.report.summary()
    result.save(tmp_path / "out")
    for task in "ab":
        kept = load_file(tmp_path / f"out/heads/{task}.safetensors")["lm_head.weight"]
        assert torch.equal(kept, load_file(tasks[task] / "adapter_model.safetensors")[HEAD])


def test_a_vocabulary_of_another_size_has_no_difference(tmp_path, base, tasks):
    other = shutil.copytree(tasks["a"], tmp_path / "a")
    rewrite(other / "adapter_model.safetensors", lambda t: t.update({HEAD: torch.ones(70, 32)}))
    with pytest.raises(NameMismatch, match=r"lm_head\.weight of shape \(70, 32\), but the base's is \(64, 32\)"):
        nsc.merge(base, {"a": other}, method="task-arithmetic", progress=False)


def test_objectives_that_read_tokens_refuse_it(base, tasks):
    data = {t: ["word1 word2 word3"] * 3 for t in tasks}
    for method, more in {"match": {}, "adamerging": {}, "task-arithmetic": {"aim": 0.5}}.items():
        with pytest.raises(NSCError, match="lm_head"):
            nsc.merge(base, tasks, data, method=method, progress=False, **more)


def test_a_tensor_that_is_neither_merged_nor_kept_fails_the_proof(tmp_path, base, tasks):
    result = nsc.merge(base, tasks, method="task-arithmetic", progress=False)
    without = replace(result.stack, dense={}, order=())
    with pytest.raises(
        ProofError, match=r"adapter a holds .* 1 tensors of modules_to_save, but 8 and 0 are merged and 0"
    ):
        replace(result, stack=without).save(tmp_path / "out")
    modules = dict(list(result.stack.modules.items())[1:])
    with pytest.raises(ProofError, match=r"adapter a holds factors of 8 modules .* but 7 and 1 are merged"):
        replace(result, stack=replace(result.stack, modules=modules)).save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
