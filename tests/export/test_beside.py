"""What lies beside the weights: sub-folders of a base, tokenizers and templates of adapters, what auto classes need."""

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

import nsc
from examples import smollm2
from nsc.bases.base_model import rope_misread_by_4
from tests.tiny import dense_updates, peft_adapter, save_tokenizer, tiny_llama

LORA = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])


def adapters(base: Path, folder: Path, **lora) -> dict[str, Path]:
    """Two causal adapters that name their base."""
    made = {}
    for seed, task in enumerate("ab"):
        kind = {"SEQ_CLS": "AutoModelForSequenceClassification"}.get(lora.get("task_type"), "AutoModelForCausalLM")
        made[task] = peft_adapter(folder / task, tiny_llama(kind), seed, **LORA | lora)
        change(made[task], base_model_name_or_path=str(base))
    return made


def change(folder: Path, file: str = "adapter_config.json", **fields) -> None:
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))


def saved(base: Path, tasks: dict[str, Path], out: Path, **how) -> tuple[Path, dict]:
    """A merge on disk, and its report."""
    nsc.merge(base, tasks, method="task-arithmetic", scale=0.5, progress=False).save(out, **how)
    return out, json.loads((out / "report.json").read_text())


def test_sub_folders_of_a_base_are_copied_and_nothing_else(tmp_path, base):
    source = shutil.copytree(base, tmp_path / "base")
    places = {
        "1_Pooling/config.json": "copied",
        "2_Dense/pytorch_model.bin": "copied",
        "additional_chat_templates/tool.jinja": "copied",
        "onnx/model.onnx": "",
        "original/model.safetensors": "",
        ".cache/x.json": "",
        "old_merge/merge.yaml": "",
        "an_adapter/adapter_config.json": "",
    }
    for name in places:
        (source / name).parent.mkdir()
        (source / name).write_text(name)
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense")]
    (source / "modules.json").write_text(json.dumps(modules))
    out, _ = saved(source, adapters(base, tmp_path), source / "deep/out", full=True)
    for name, copied in places.items():
        assert (out / name).exists() == bool(copied) and (not copied or (out / name).read_text() == name)
    assert json.loads((out / "modules.json").read_text()) == modules and not (out / "deep").exists()


@pytest.mark.parametrize("full", [False, True])
def test_tokenizers_and_templates_that_agree_are_copied(tmp_path, base, full):
    tasks = adapters(base, tmp_path)
    for folder in tasks.values():
        save_tokenizer(folder)
        (folder / "chat_template.jinja").write_text("own")
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates/tool.jinja").write_text("tool")
    out, report = saved(base, tasks, tmp_path / "out", full=full)
    assert (out / "chat_template.jinja").read_text() == "own" and not report["warnings"]
    assert (out / "additional_chat_templates/tool.jinja").read_text() == "tool"
    assert (out / "tokenizer.json").read_bytes() == (tasks["a"] / "tokenizer.json").read_bytes()
    (tasks["b"] / "chat_template.jinja").write_text("another")
    out, report = saved(base, tasks, tmp_path / "again", full=full)
    (warning,) = report["warnings"]
    assert (
        "chat_template.jinja beside b is another than beside a" in warning
        and warning in (out / "README.md").read_text()
    )
    assert not (out / "chat_template.jinja").exists() and (out / "tokenizer.json").exists() == full


@pytest.mark.parametrize("how", ["merged", "replayed"])
def test_pefts_auto_class_loads_what_was_merged(tmp_path, base, how):
    tasks = adapters(base, tmp_path, task_type="CAUSAL_LM")
    for folder in tasks.values():
        save_tokenizer(folder)
        (folder / "chat_template.jinja").write_text("own")
    out, _ = saved(base, tasks, tmp_path / "out")
    if how == "replayed":
        nsc.apply(out).save(tmp_path / "again")
        out = tmp_path / "again"
    model, tokenizer = (
        peft.AutoPeftModelForCausalLM.from_pretrained(out),
        transformers.AutoTokenizer.from_pretrained(out),
    )
    assert tokenizer.chat_template == "own" and tokenizer("word3")["input_ids"] == [7]
    ids = torch.arange(4, 28).view(2, 12)
    dense = transformers.AutoModelForCausalLM.from_pretrained(base)
    for name in dense_updates(tasks["a"]):
        update = sum(dense_updates(folder)[name] for folder in tasks.values())
        dense.model.get_submodule(name).weight.data += 0.5 * update.float()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_only_what_all_adapters_say_is_written(tmp_path, base):
    tasks = adapters(base, tmp_path, task_type="CAUSAL_LM")
    change(tasks["b"], task_type="FEATURE_EXTRACTION")
    out, _ = saved(base, tasks, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] is None
    mapping = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    for folder in tasks.values():
        change(folder, task_type=None, auto_mapping=mapping)
    out, _ = saved(base, tasks, tmp_path / "mapped")
    assert json.loads((out / "adapter_config.json").read_text())["auto_mapping"] == mapping
    assert isinstance(peft.AutoPeftModel.from_pretrained(out).get_base_model(), transformers.LlamaForCausalLM)


def test_a_class_that_adds_a_head_is_left_to_the_heads(tmp_path, base):
    tasks = adapters(base, tmp_path, task_type="SEQ_CLS")
    out, _ = saved(base, tasks, tmp_path / "out")
    assert json.loads((out / "adapter_config.json").read_text())["task_type"] is None
    assert load_file(out / "heads/a.safetensors").keys() == {"score.weight"}


@pytest.mark.parametrize("where", ["rope_theta", "rope_scaling", "nowhere"])
def test_a_config_that_transformers_4_would_misread_is_named(tmp_path, base, where):
    """Transformers 4 knows rope_theta and rope_scaling alone, and takes its class's own values for what they lack."""
    source = shutil.copytree(base, tmp_path / "base")
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}
    told = {
        "rope_theta": {"rope_theta": 500.0},
        "rope_scaling": {"rope_theta": 500.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        "nowhere": {},
    }[where]
    change(source, "config.json", rope_parameters=rope, **told)
    lost = {"rope_theta": ["rope_type", "factor"], "rope_scaling": [], "nowhere": ["rope_type", "factor", "rope_theta"]}
    assert sorted(rope_misread_by_4(json.loads((source / "config.json").read_text()))) == sorted(lost[where])
    _, report = saved(source, adapters(source, tmp_path), tmp_path / "out", full=True)
    said = [text for text in report["warnings"] if "transformers before 5" in text]
    assert len(said) == bool(lost[where]) and all(name in said[0] for name in lost[where])
    _, report = saved(base, adapters(base, tmp_path), tmp_path / "usual", full=True)
    assert not report["warnings"]


def test_the_demos_base_says_what_both_read(tmp_path):
    of_5 = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}, "dtype": "float32"}
    of_4 = {"rope_theta": 1e5, "torch_dtype": "float32"}
    config = transformers.LlamaConfig(**(of_4 if transformers.__version__ < "5" else of_5))
    config.save_pretrained(tmp_path)
    smollm2._tell_older_versions(tmp_path / "config.json")
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["rope_theta"] == 1e5 and told["torch_dtype"] == "float32" and not rope_misread_by_4(told)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    assert again.to_dict().get("rope_parameters") == config.to_dict().get("rope_parameters")
