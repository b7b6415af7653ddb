"""The acceptance of a merge, dense and in float64, and everything that a merge refuses."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

import nsc
from nsc.adapters.surgery import merged_layers
from nsc.errors import AdapterError, DataError, NameMismatch, NonFiniteError, NSCError, TargetError
from tests.conftest import ADAPTERS, KINDS
from tests.tiny import dense_updates, random_factors, rewrite, save_base, write_adapter

IDS = torch.arange(4, 28).view(2, 12)
SCALES = {"plain": 1.0, "rslora": 4.0, "double": 2.0}  # alpha / r, or alpha / sqrt(r)


def states(model: torch.nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    body = model.get_submodule("model") if hasattr(model, "lm_head") else model
    with torch.no_grad():
        return body.eval()(ids, use_cache=False)[0].double()


def kind(task: str) -> str:
    return KINDS.get(ADAPTERS[task].get("task_type", ""), "AutoModelForCausalLM")


def dense_body(base, updates) -> torch.nn.Module:
    """The base's body in float64 with dense updates (body module -> (m, d)) added."""
    model = AutoModel.from_pretrained(base).double()
    for name, update in updates.items():
        model.get_submodule(name).weight.data += update
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return (found - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize("task", ADAPTERS)
def test_one_adapter_with_coefficient_one_is_merge_and_unload(task, base, adapters, texts, tmp_path):
    result = nsc.merge(base, {task: adapters[task]}, {task: texts[task]}, steps=0, start=1.0, progress=False)
    result.save(tmp_path / "adapter")
    result.save(tmp_path / "full", full=True)

    dense = dense_body(base, dense_updates(adapters[task], kind(task)))
    wrapped = getattr(__import__("transformers"), kind(task)).from_pretrained(base)
    unloaded = peft.PeftModel.from_pretrained(wrapped, adapters[task]).merge_and_unload().model
    assert close(states(unloaded), states(dense)), "the oracle itself"

    with merged_layers(result.model, result.stack, result.coefficients):
        in_memory = states(result.model)
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    written = AutoModel.from_pretrained(tmp_path / "full")
    for found in (in_memory, states(reloaded.get_base_model()), states(written)):
        assert close(found, states(dense))
    for name, parameter in unloaded.named_parameters():
        torch.testing.assert_close(written.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)
    if task in SCALES:
        assert {s for m in result.stack.modules.values() for s in m.scales} == {SCALES[task]}


def test_many_adapters_are_the_dense_float64_sum(base, merged, adapters, tmp_path):
    total: dict[str, torch.Tensor] = {}
    for k, task in enumerate(merged.tasks):
        for name, update in dense_updates(adapters[task], kind(task)).items():
            lam = merged.coefficients[merged.modules.index(name), k].item()
            total[name] = total.get(name, 0) + lam * update
    assert set(total) == set(merged.modules)
    merged.save(tmp_path / "out")
    reloaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    assert close(states(reloaded.get_base_model()), states(dense_body(base, total)))


def test_an_adapter_of_a_classifier_carries_its_head(merged, adapters, tmp_path):
    merged.save(tmp_path / "out")
    assert [p.name for p in (tmp_path / "out/heads").iterdir()] == ["double.safetensors"]
    head = load_file(tmp_path / "out/heads/double.safetensors")
    stored = load_file(adapters["double"] / "adapter_model.safetensors")
    assert head.keys() == {"score.weight"}
    assert torch.equal(head["score.weight"], stored["base_model.model.score.weight"])


def test_the_order_of_adapters_does_not_matter(base, adapters, texts, merged):
    back = dict(reversed(adapters.items()))
    result = nsc.merge(base, back, texts, steps=5, lr=0.05, progress=False)
    assert result.tasks == merged.tasks[::-1] and result.modules == merged.modules
    torch.testing.assert_close(result.coefficients.flip(1), merged.coefficients, rtol=0, atol=1e-3)


def test_learning_moves_what_it_can_and_nothing_else(merged):
    moved = merged.coefficients != 0.4
    untrained = {f"layers.3.{m}" for m in merged.modules}
    for name, row, present in zip(merged.modules, moved, merged.stack.present, strict=True):
        assert torch.equal(row, present) if not name.startswith("layers.3.") else not row.any()
    assert untrained and (merged.coefficients - 0.4).abs().max() <= 0.15 + 1e-6


def merge(base, adapters, texts, **settings):
    return nsc.merge(base, adapters, texts, **({"steps": 2, "progress": False} | settings))


def test_tasks_must_agree(base, adapters, texts):
    with pytest.raises(NSCError, match="no adapter given"):
        merge(base, {}, {})
    some = {task: texts[task] for task in ("plain", "rslora", "double")}
    with pytest.raises(DataError, match="no data for pattern, no adapter for typo"):
        merge(base, adapters, some | {"typo": ["text"]})


@pytest.mark.parametrize("task", ["a/b", "../a", "", "a\\b"])
def test_a_task_name_must_be_a_file_name(base, adapters, texts, task):
    with pytest.raises(NSCError, match="task name"):
        merge(base, {task: adapters["double"]}, {task: texts["double"]})


def test_a_base_of_another_width(tmp_path, adapters, texts):
    base = save_base(tmp_path / "base", hidden_size=48)
    with pytest.raises(NameMismatch, match=r"'plain': the update of .* is \(32, 32\) .* is \(48, 48\)\. Wrong base\?"):
        merge(base, adapters, texts)


@pytest.mark.parametrize(("layers", "said"), [(6, r"targets 'layers\.4\..*deeper"), (2, r"match no linear layer")])
def test_a_base_of_another_depth(tmp_path, adapters, texts, layers, said):
    base = save_base(tmp_path / "base", num_hidden_layers=layers)
    with pytest.raises(NameMismatch, match=said):
        merge(base, adapters, texts)


def test_an_adapter_of_another_architecture(tmp_path, base, texts):
    foreign = write_adapter(tmp_path / "a", random_factors(["transformer.h.0.attn.c_attn"]))
    with pytest.raises(NameMismatch, match=r"(?s)transformer\.h\.0\.attn\.c_attn.*closest in the base: 'layers"):
        merge(base, {"a": foreign}, {"a": texts["plain"]})


def damaged(adapters, tmp_path, change):
    path = shutil.copytree(adapters["plain"], tmp_path / "plain")
    change(path / "adapter_model.safetensors")
    return {"mnli": path}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: rewrite(f, lambda t: [x.zero_() for k, x in t.items() if "lora_B" in k]), "every module is zero"),
        (lambda f: f.write_bytes(f.read_bytes()[:-100]), "truncated or corrupt"),
        (lambda f: f.unlink(), "no adapter_model.safetensors"),
        (lambda f: shutil.rmtree(f.parent), "does not exist"),
    ],
    ids=["zero", "truncated", "no weights", "no folder"],
)
def test_damaged_adapters(base, adapters, texts, tmp_path, change, said):
    with pytest.raises(AdapterError, match=said):
        merge(base, damaged(adapters, tmp_path, change), {"mnli": texts["plain"]})


def test_missing_and_unusable_bases(tmp_path, base, adapters, texts):
    with pytest.raises(NSCError, match=r"base '.*nowhere' cannot be loaded"):
        merge(tmp_path / "nowhere", adapters, texts)
    copy = shutil.copytree(base, tmp_path / "no tokenizer")
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(NSCError, match=r"has no tokenizer"):
        merge(copy, adapters, texts)
    copy = shutil.copytree(base, tmp_path / "truncated")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(NSCError, match=r"base '.*truncated' cannot be loaded"):
        merge(copy, adapters, texts)
    with pytest.raises(NSCError, match="float31"):
        merge(base, adapters, texts, dtype="float31")


def test_a_base_that_lacks_weights_is_not_filled_with_random_ones(tmp_path, base, adapters, texts):
    copy = shutil.copytree(base, tmp_path / "base")
    rewrite(copy / "model.safetensors", lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(NSCError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        merge(copy, adapters, texts)


@pytest.mark.parametrize("steps", [0, 2])
def test_nan_in_the_base_is_named_and_nothing_is_written(tmp_path, base, adapters, texts, steps):
    copy = shutil.copytree(base, tmp_path / "base")
    rewrite(copy / "model.safetensors", lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=r"enter layers\.3\.self_attn\.v_proj \(task plain\)"):
        merge(copy, adapters, texts, steps=steps, checkpoint=tmp_path / "partial" / "checkpoint.pt")
    assert not (tmp_path / "partial").exists()


def test_nan_that_only_one_task_meets(tmp_path, base, adapters, texts):
    copy = shutil.copytree(base, tmp_path / "base")
    rewrite(copy / "model.safetensors", lambda t: t["model.embed_tokens.weight"][60].fill_(float("inf")))
    with pytest.raises(NonFiniteError, match=r"v_proj \(task rslora\);"):
        merge(copy, adapters, {task: ["word56" if task == "rslora" else "word1"] for task in adapters})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            dict(target_modules=["fc9"]),
            r"modules \['fc9'\] in the last quarter of 4 blocks.*\(down_proj, k_proj, o_proj",
        ),
        (dict(target_blocks=[7]), r"blocks \[7\] of 4 blocks"),
        (dict(target_modules=["q_proj"]), r"adapter rslora touches none of the target layers"),
        (dict(steps=-1), "steps must be 0 or more"),
        (dict(lr=0.0), "lr must be positive"),
        (dict(max_drift=-0.1), "max_drift must be 0 or more"),
        (dict(batch_size=0), "batch_size must be 1 or more"),
    ],
    ids=str,
)
def test_targets_and_settings(base, adapters, texts, settings, said):
    with pytest.raises(NSCError, match=said) as error:
        merge(base, adapters, texts, **settings)
    assert isinstance(error.value, TargetError) == ("target" in str(settings))


def test_a_sample_without_tokens_is_named(base, adapters, texts, tmp_path):
    copy = shutil.copytree(base, tmp_path / "base")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "!"}, "content": ""}
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(DataError, match="sample 2 of task plain has no token"):
        merge(copy, adapters, texts | {"plain": ["word1", "!!"]})


def test_adapters_of_another_base_are_named(base, adapters, texts, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(adapters["plain"], strange)
    config = json.loads((strange / "adapter_config.json").read_text())
    (strange / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other-model"}))
    result = nsc.merge(base, {"plain": strange}, {"plain": texts["plain"]}, steps=0, progress=False)
    assert result.report.warnings == [f"not trained on {base.name} by their own configs: plain on other-model"]
