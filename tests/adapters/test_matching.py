"""Adapter names onto base names: wrappers, old and new transformers, and every way in which they can fail to meet."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, CLIPVisionModel, Dinov2Config

from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import check_coverage, check_shapes
from nsc.bases.module_names import layout, match_modules, prefix_of, resolve, resolve_saved
from nsc.errors import NameMismatch
from tests.tiny import VISION, linears, peft_adapter, random_factors, tiny_llama, tiny_llava, tiny_vit, write_adapter

LLAMA_BODY = linears(tiny_llama())
LLAVA_BODY = linears(tiny_llava("AutoModel"))
VIT_BODY = linears(tiny_vit())
CLIP_VISION_BODY = linears(CLIPVisionModel(CLIPVisionConfig(**VISION)))
DINO_BODY = linears(AutoModel.from_config(Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)))

OLD_VIT = {  # transformers 4 -> 5
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
}


@pytest.mark.parametrize(
    ("model", "body", "prefix"),
    [
        (tiny_llama(), LLAMA_BODY, ""),
        (tiny_llama("AutoModelForCausalLM"), LLAMA_BODY, "model."),
        (tiny_llama("AutoModelForSequenceClassification"), LLAMA_BODY, "model."),
        (tiny_vit(), VIT_BODY, ""),
        (tiny_vit("AutoModelForImageClassification"), VIT_BODY, "vit."),
        (tiny_llava("AutoModel"), LLAVA_BODY, ""),
        (tiny_llava(), LLAVA_BODY, "model."),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, torch.nn.Module) else "",
)
def test_wrappers_of_real_peft_adapters(tmp_path, model, body, prefix):
    path = peft_adapter(tmp_path / "a", model, r=2, target_modules=["q_proj", "v_proj", "o_proj", "out_proj"])
    adapter = read_adapter(path)
    mapping = resolve("a", adapter.factors, body)
    assert mapping == {f"{prefix}{base}": base for base in mapping.values()}
    assert len(set(mapping.values())) == len(adapter.factors)
    assert prefix_of(mapping) == prefix
    check_shapes(adapter, mapping, body)
    check_coverage(adapter, mapping, body)


@pytest.mark.parametrize("wrapper", ["", "vit."])
def test_old_vit_names(wrapper):
    names = {f"{wrapper}encoder.layer.{i}.{old}": f"layers.{i}.{new}" for i in range(3) for old, new in OLD_VIT.items()}
    assert resolve("a", names, VIT_BODY) == names
    assert prefix_of(names) == wrapper


def test_new_vit_names_on_an_old_base():
    old = {f"encoder.layer.{i}.{name}": (32, 32) for i in range(3) for name in OLD_VIT}
    mapping = resolve("a", [f"vit.layers.{i}.{new}" for i in range(3) for new in OLD_VIT.values()], old)
    assert mapping["vit.layers.2.mlp.fc2"] == "encoder.layer.2.output.dense"
    assert mapping["vit.layers.0.attention.o_proj"] == "encoder.layer.0.attention.output.dense"
    assert set(mapping.values()) == old.keys() and prefix_of(mapping) == "vit."


def test_old_dinov2_names():
    names = {
        f"dinov2.encoder.layer.1.{old}": f"encoder.layer.1.{new}"
        for old, new in OLD_VIT.items()
        if old.startswith("attention")
    }
    assert resolve("a", names, DINO_BODY) == names and prefix_of(names) == "dinov2."


def test_clip_with_and_without_its_tower():
    inner = [name for name in CLIP_VISION_BODY if name.endswith("q_proj")]
    towered = {f"vision_model.{name}": name for name in inner}
    assert resolve("a", towered, CLIP_VISION_BODY) == towered and prefix_of(towered) == "vision_model."
    whole = {f"vision_model.{name}": (32, 32) for name in inner}
    assert resolve("a", inner, whole) == {name: f"vision_model.{name}" for name in inner}


def test_old_llava_names():
    names = {f"language_model.model.layers.{i}.mlp.up_proj": f"language_model.layers.{i}.mlp.up_proj" for i in range(4)}
    tower = "encoder.layers.1.self_attn.out_proj"
    names |= {f"vision_tower.vision_model.{tower}": f"vision_tower.{tower}"}
    names |= {"multi_modal_projector.linear_1": "multi_modal_projector.linear_1"}
    assert resolve("a", names, LLAVA_BODY) == names and prefix_of(names) == "model."
    between = {  # transformers 4.52 to 4.57
        "model.language_model.layers.0.mlp.up_proj": "language_model.layers.0.mlp.up_proj",
        f"model.vision_tower.vision_model.{tower}": f"vision_tower.{tower}",
    }
    assert resolve("a", between, LLAVA_BODY) == between and prefix_of(between) == "model."


def test_order_and_number_are_kept():
    names = [f"model.layers.{i}.self_attn.{kind}" for i in (3, 0) for kind in ("v_proj", "q_proj")]
    assert list(resolve("a", names, LLAMA_BODY)) == names


def test_no_match_shows_both_names():
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.qq_proj"]
    with pytest.raises(NameMismatch) as error:
        resolve("mnli", names, LLAMA_BODY)
    text = str(error.value)
    assert "'mnli': 1 of 2 modules" in text and "'model.layers.0.self_attn.qq_proj'" in text
    assert "'layers.0.self_attn.q_proj'" in text


@pytest.mark.parametrize(
    "names",
    [["lm_head"], ["model.layers.4.self_attn.q_proj"], ["bert.encoder.layer.0.attention.self.query"], ["q"]],
)
def test_wrong_bases_and_heads_match_nothing(names):
    with pytest.raises(NameMismatch, match="match no linear layer"):
        resolve("a", names, LLAMA_BODY)


def test_a_base_without_linear_layers():
    with pytest.raises(NameMismatch, match="no linear layer"):
        resolve("a", ["x"], {})


def test_several_base_modules_are_named():
    with pytest.raises(NameMismatch) as error:
        resolve("a", ["layers.0.self_attn.q_proj"], LLAVA_BODY)
    assert "'language_model.layers.0.self_attn.q_proj'" in str(error.value)
    assert "'vision_tower.encoder.layers.0.self_attn.q_proj'" in str(error.value)


def test_two_towers_on_one_are_refused():
    towers = (f"{tower}_model.encoder.layers.0.self_attn.q_proj" for tower in ("text", "vision"))
    with pytest.raises(NameMismatch, match=r"'text_model\..*'vision_model\..*both match"):
        resolve("a", towers, CLIP_VISION_BODY)


def test_wrong_shape_names_shapes_and_base(tmp_path):
    name = "model.layers.0.self_attn.q_proj"
    adapter = read_adapter(write_adapter(tmp_path / "a", random_factors([name], d=48, m=40)))
    with pytest.raises(NameMismatch) as error:
        check_shapes(adapter, resolve("a", [name], LLAMA_BODY), LLAMA_BODY)
    assert all(text in str(error.value) for text in (name, "(40, 48)", "(32, 32)", "Wrong base", "'tiny'"))


def test_a_deeper_base_is_noticed(tmp_path):
    shallow = tiny_llama("AutoModelForCausalLM", num_hidden_layers=2)
    adapter = read_adapter(peft_adapter(tmp_path / "a", shallow, r=2, target_modules=["q_proj", "v_proj"]))
    mapping = resolve("a", adapter.factors, LLAMA_BODY)
    check_shapes(adapter, mapping, LLAMA_BODY)
    with pytest.raises(NameMismatch, match=r"layers\.2\.self_attn\.q_proj.*deeper"):
        check_coverage(adapter, mapping, LLAMA_BODY)


@pytest.mark.parametrize(
    "lora",
    [
        dict(target_modules=["q_proj"], layers_to_transform=[0, 2]),
        dict(target_modules=["layers.1.self_attn.q_proj"]),
        dict(target_modules=r".*\.[01]\.self_attn\.q_proj"),
        dict(target_modules=["q_proj"], exclude_modules=["layers.3.self_attn.q_proj"]),
    ],
    ids=str,
)
def test_chosen_blocks_are_no_deeper_base(tmp_path, lora):
    adapter = read_adapter(peft_adapter(tmp_path / "a", tiny_llama("AutoModelForCausalLM"), r=2, **lora))
    check_coverage(adapter, resolve("a", adapter.factors, LLAMA_BODY), LLAMA_BODY)


def test_layout():
    bare = resolve("a", ["layers.0.self_attn.q_proj"], LLAMA_BODY)
    causal = resolve("b", ["model.layers.0.self_attn.q_proj"], LLAMA_BODY)
    assert (layout([bare]), layout([causal, causal]), layout([bare, causal])) == ("", "model.", None)


def test_saved_modules_inside_and_outside_of_the_body():
    mapping = resolve("a", ["model.layers.0.self_attn.q_proj"], LLAMA_BODY)
    parameters = list(tiny_llama().state_dict())
    saved = ["score.weight", "model.norm.weight", "classifier.norm.weight", "model.embed_tokens.weight"]
    assert resolve_saved("a", saved, mapping, parameters) == {
        "score.weight": None,
        "model.norm.weight": "norm.weight",
        "classifier.norm.weight": None,
        "model.embed_tokens.weight": "embed_tokens.weight",
    }
    with pytest.raises(NameMismatch, match=r"model\.norms\.weight.*'norm\.weight'"):
        resolve_saved("a", ["model.norms.weight"], mapping, parameters)


def test_saved_modules_of_old_llava():
    mapping = resolve("a", ["language_model.model.layers.0.mlp.up_proj"], LLAVA_BODY)
    saved = ["multi_modal_projector.linear_1.weight", "language_model.lm_head.weight"]
    resolved = resolve_saved("a", saved, mapping, tiny_llava("AutoModel").state_dict())
    assert list(resolved.values()) == ["multi_modal_projector.linear_1.weight", None]


def test_shared_modules_across_wrappers():
    first, second = ["model.layers.0.q_proj", "model.layers.0.v_proj"], ["layers.0.v_proj", "layers.1.v_proj"]
    assert match_modules(first, second) == {"model.layers.0.v_proj": "layers.0.v_proj"}
