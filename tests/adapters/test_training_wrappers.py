"""Names that training wrappers left in an adapter: stripped where they are known, else refused by name."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import nsc
from nsc.adapters.inspection import inspect
from nsc.adapters.lora import read_adapter
from nsc.bases.base_model import Base
from nsc.bases.wrappers import prefixes_of_classes, wrapper_of
from nsc.errors import AdapterError, NameMismatch, ProofError
from tests.tiny import VISION, dense_updates, peft_adapter, random_factors, rewrite, tiny_llama, write_adapter

INNER = "base_model.model."
FORMS = {
    "compiled": lambda key: f"_orig_mod.{key}",
    "compiled inside": lambda key: key.replace(INNER, f"{INNER}_orig_mod."),
    "block compiled": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", key),
    "DDP": lambda key: f"module.{key}",
    "DDP inside": lambda key: key.replace(INNER, f"{INNER}module."),
    "DDP of compiled": lambda key: f"module._orig_mod.{key}",
    "PEFT twice": lambda key: INNER + key,
    "FSDP": lambda key: key.replace("model.layers", "model._fsdp_wrapped_module.layers"),
    "FSDP of blocks": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_fsdp_wrapped_module.", key),
    "checkpointed": lambda key: re.sub(r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module.", key),
    "DeepSpeed": lambda key: f"_forward_module.{key}",
    "Lightning": lambda key: f"model.{key}",
    "bundle": lambda key: f"policy.actor.{key}",
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    model = tiny_llama("AutoModelForCausalLM")
    return peft_adapter(tmp_path_factory.mktemp("plain") / "a", model, r=2, target_modules=["q_proj", "v_proj"])


def renamed(source: Path, out: Path, form) -> Path:
    shutil.copytree(source, out)
    change = lambda t: [t.update({form(key): t.pop(key)}) for key in list(t)]  # noqa: E731
    rewrite(out / "adapter_model.safetensors", change)
    return out


def merged(base, adapters, out: Path) -> Path:
    result = nsc.merge(base, adapters, method="task-arithmetic", scale=0.5, progress=False)
    result.save(out)
    return out


@pytest.mark.parametrize("form", FORMS)
def test_a_training_wrapper_is_stripped(base, plain, tmp_path, form):
    wrapped = renamed(plain, tmp_path / "a", FORMS[form])
    assert read_adapter(wrapped).factors.keys() == read_adapter(plain).factors.keys()
    out = merged(base, {"a": wrapped, "b": plain}, tmp_path / "out")
    assert all(key.startswith(f"{INNER}model.layers.") for key in load_file(out / "adapter_model.safetensors"))
    expected, found = dense_updates(plain), dense_updates(out)  # as PEFT itself reads them, on the class for generation
    assert found.keys() == expected.keys()
    for name, update in found.items():
        torch.testing.assert_close(update, expected[name], rtol=1e-5, atol=1e-7)


def test_a_wrapper_in_the_config_is_stripped_too(plain, tmp_path):
    form = FORMS["block compiled"]
    wrapped = renamed(plain, tmp_path / "a", form)
    config = json.loads((wrapped / "adapter_config.json").read_text())
    full = "_orig_mod.model.layers.0._orig_mod.self_attn.q_proj"
    config |= {"target_modules": r".*\._orig_mod\.self_attn\.(q|v)_proj", "rank_pattern": {full: 2}}
    (wrapped / "adapter_config.json").write_text(json.dumps(config))
    read = read_adapter(wrapped).config
    assert read["rank_pattern"] == {"model.layers.0.self_attn.q_proj": 2}
    assert re.fullmatch(read["target_modules"], "model.layers.0.self_attn.q_proj")


def test_heads_of_wrapped_adapters_are_heads(tmp_path):
    head = torch.randn(3, 32)
    names = random_factors(["model.layers.0.self_attn.q_proj"])
    path = write_adapter(tmp_path / "a", names, saved={"score.weight": head}, task_type="SEQ_CLS")
    wrapped = renamed(path, tmp_path / "b", FORMS["DDP of compiled"])
    assert torch.equal(read_adapter(wrapped).saved["score.weight"], head)


def test_two_adapters_in_one_bundle_are_refused(plain, tmp_path):
    wrapped = renamed(plain, tmp_path / "a", lambda key: f"actor.{key}")
    rewrite(
        wrapped / "adapter_model.safetensors",
        lambda t: t.update({key.replace("actor", "critic"): x.clone() for key, x in t.items()}),
    )
    with pytest.raises(AdapterError, match=r"'actor\..*' and 'critic\..*' both name"):
        read_adapter(wrapped)


@pytest.mark.parametrize("prefix", ["llm.", "policy.actor.", "model.model.", "transformer.h."])
def test_a_prefix_of_no_class_is_refused_by_name(base, plain, tmp_path, prefix):
    wrapped = renamed(plain, tmp_path / "a", lambda key: key.replace(f"{INNER}model.", f"{INNER}{prefix}"))
    with pytest.raises(NameMismatch, match=rf"'a'.*'{re.escape(prefix)}'.*'model\.' in LlamaForCausalLM"):
        nsc.merge(base, {"a": wrapped}, method="task-arithmetic", progress=False)


def test_the_classes_of_a_body(base, tmp_path):
    assert prefixes_of_classes(Base(str(base))).keys() == {"", "model.", "transformer."}  # the last answers questions
    transformers.CLIPConfig(text_config=VISION, vision_config=VISION).save_pretrained(tmp_path)
    towers = Base(str(tmp_path))
    name = next(name for name, _ in towers.model.named_modules() if name.endswith("layers.2.mlp.fc1"))
    assert type(wrapper_of(towers, "vision_model.", [name])).__name__ == "CLIPModel"
    assert wrapper_of(towers, "text_model.", ["head"]) is None


def test_the_proof_without_a_base_in_memory_uses_the_class(base, plain, tmp_path):
    out = merged(base, {"a": plain}, tmp_path / "out")
    again = nsc.apply(out)
    with pytest.raises(ProofError, match=r"'modle\.layers"):
        replace(again, record=replace(again.record, prefix="modle.")).save(tmp_path / "again")
    loaded = PeftModel.from_pretrained(tiny_llama("AutoModelForCausalLM"), out)
    assert sum(bool(x.any()) for name, x in loaded.named_parameters() if "lora_B" in name) == 8


def test_inspect_shows_clean_names(plain, tmp_path):
    wrapped = renamed(plain, tmp_path / "b", FORMS["FSDP of blocks"])
    first, second = inspect({"a": plain, "b": wrapped})
    assert first.overlaps[0].shared == 8 and first.targets == second.targets
