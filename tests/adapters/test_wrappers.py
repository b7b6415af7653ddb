"""Adapters of PEFT on live models of many families land where they were trained: wrapped or bare, named old or new.

Runs alike on transformers 4 and 5: what PEFT writes here has the names of the one installed, and is rewritten to those
of the other.
"""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

import nsc
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import check_coverage, check_shapes, check_towers
from nsc.adapters.stack import stack_adapters
from nsc.adapters.surgery import merged_layers
from nsc.bases.base_model import Base
from nsc.bases.loading import load_body
from nsc.bases.module_names import resolve
from nsc.bases.roles import choose_targets
from nsc.bases.structure import linear_shapes
from nsc.errors import NameMismatch, NSCError
from tests.tiny import LLAMA, VISION, linears, peft_adapter, random_factors, rewrite, tiny_llava, write_adapter

TEXT_TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
                  bos_token_id=1, eos_token_id=2, pad_token_id=0, projection_size=32)  # fmt: skip
DINO = {key: value for key, value in VISION.items() if key != "intermediate_size"}
BOTH = dict(text_config=TEXT_TOWER, vision_config=VISION)
ATTENTION = (
    r".*vision_model\..*(q_proj|k_proj|v_proj|self_attn\.out_proj)"  # without SigLIP's head, which reads weights
)
QVO = ["q_proj", "v_proj", "o_proj", "query", "value", "dense", "fc1", "fc2"]

# Trained class, its config, where the body lies in it, what carries LoRA.
IMAGES = {
    "ViT": ("ViTModel", "ViTConfig", VISION, "", QVO),
    "ViT, classifier": ("ViTForImageClassification", "ViTConfig", VISION, "vit", QVO),
    "CLIP": ("CLIPVisionModel", "CLIPVisionConfig", VISION, "", ["q_proj", "out_proj", "fc1"]),
    "CLIP, projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        VISION,
        "vision_model",
        ["k_proj", "fc2"],
    ),
    "CLIP, both towers": ("CLIPModel", "CLIPConfig", BOTH, "vision_model", ATTENTION),
    "CLIP, classifier": ("CLIPForImageClassification", "CLIPConfig", BOTH, "vision_model", ["q_proj", "out_proj"]),
    "SigLIP": ("SiglipVisionModel", "SiglipVisionConfig", VISION, "", ["q_proj", "v_proj"]),
    "SigLIP, both towers": ("SiglipModel", "SiglipConfig", BOTH, "vision_model", ATTENTION),
    "SigLIP, classifier": ("SiglipForImageClassification", "SiglipConfig", BOTH, "vision_model", ["q_proj", "v_proj"]),
    "DINOv2": ("Dinov2Model", "Dinov2Config", DINO, "", QVO),
    "DINOv2, classifier": ("Dinov2ForImageClassification", "Dinov2Config", DINO, "dinov2", QVO),
    "DINOv2, registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, "", QVO),
}
TEXTS = {
    "LLaMA": "LlamaConfig", "Mistral": "MistralConfig", "Qwen2": "Qwen2Config", "Qwen3": "Qwen3Config",
    "Gemma": "GemmaConfig", "Gemma 2": "Gemma2Config", "Gemma 3": "Gemma3TextConfig", "SmolLM3": "SmolLM3Config",
    "Phi-3": "Phi3Config", "OLMo": "OlmoConfig", "OLMo 2": "Olmo2Config",
    "GPT-NeoX": "GPTNeoXConfig",
}  # fmt: skip
AUTO = ("AutoModel", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
LINEARS = ["q_proj", "v_proj", "o_proj", "qkv_proj", "query_key_value", "attention.dense", "down_proj"]

# Old -> new module names of a body (transformers 4 -> 5), block by block, apart from nsc.bases.module_names.
DINO_KINDS = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
VIT_KINDS = DINO_KINDS | {"intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}
CLIP_KINDS = {k: k for k in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1")}
NAMES = {
    "ViT": ("encoder.layer.", "layers.", VIT_KINDS),
    "DINOv2": ("encoder.layer.", "encoder.layer.", DINO_KINDS),
    "CLIP": ("vision_model.encoder.layers.", "encoder.layers.", CLIP_KINDS),
    "SigLIP": ("vision_model.encoder.layers.", "encoder.layers.", CLIP_KINDS),
}


def made(kind: str, config: str, settings: dict) -> nn.Module:
    torch.manual_seed(0)
    cls, description = getattr(transformers, kind), getattr(transformers, config)(**settings)
    model = (cls.from_config(description) if kind.startswith("Auto") else cls(description)).eval()
    for name, parameter in model.named_parameters():  # CLIP's own start is too small for any difference to be seen
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    return model


def text_model(config: str, kind: str) -> nn.Module:
    if not hasattr(transformers, config):
        pytest.skip(f"transformers {transformers.__version__} has no {config}")
    try:
        return made(kind, config, LLAMA | {"head_dim": 8} if "Gemma" in config or "Qwen3" in config else LLAMA)
    except ValueError as error:
        pytest.skip(f"transformers {transformers.__version__}: {str(error)[:80]}")


def trained(folder: Path, model: nn.Module, lora: list[str] | str) -> tuple[Path, Path]:
    """The model's own checkpoint, and an adapter that PEFT made on it and that it carries from now on."""
    model.save_pretrained(folder / "base")
    if isinstance(lora, list):
        body = [n for n in linears(model) if "head" not in n and "pooler" not in n]
        lora = [n for n in body if any(f".{n}".endswith(f".{kind}") for kind in lora)]
    return folder / "base", peft_adapter(folder / "adapter", model, r=3, lora_alpha=5, target_modules=lora)


def landed(path: Path, body: nn.Module):
    """The stack of one adapter, after every check that a merge makes."""
    adapter, shapes = read_adapter(path, "a"), linear_shapes(body)
    mapping = resolve("a", adapter.factors, shapes)
    check_shapes(adapter, mapping, shapes)
    check_coverage(adapter, mapping, shapes)
    check_towers("a", mapping, body.main_input_name)
    return stack_adapters({"a": adapter}, {"a": mapping}, shapes)


def updates(model: nn.Module, body: nn.Module) -> dict[str, torch.Tensor]:
    """Module of the body -> the update of PEFT's own layer in ``model``, whose name ends in the body's."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            (place,) = [base for base in linears(body) if f".{name}".endswith(f".{base}")]
            A, B = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
            found[place] = layer.scaling["default"] * B @ A
    return found


def require_same_updates(stack, expected: dict[str, torch.Tensor]) -> None:
    assert set(stack.names) == expected.keys() and expected
    for name, update in expected.items():
        torch.testing.assert_close(stack.modules[name].delta(torch.ones(1)), update, rtol=0, atol=1e-12)


@torch.no_grad()
def require_same_outputs(model: nn.Module, part: str, body: nn.Module, stack) -> None:
    """The body with all of the adapter computes what PEFT's model does in that part, and not what the base does."""
    if body.main_input_name == "pixel_values":
        inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
    else:
        inputs = {"input_ids": torch.randint(3, 64, (2, 7))}
    expected = model.get_submodule(part)(**inputs)[0]
    with merged_layers(body, stack, torch.ones(len(stack.names), 1)):
        torch.testing.assert_close(body(**inputs)[0], expected, rtol=1e-4, atol=1e-4)
    assert (body(**inputs)[0] - expected).abs().max() > 1e-2


@pytest.mark.parametrize("family", IMAGES)
def test_image_models(family, tmp_path):
    kind, config, settings, part, lora = IMAGES[family]
    model = made(kind, config, settings)
    base, adapter = trained(tmp_path, model, lora)
    assert Base(str(base)).takes == "pixel_values"
    body = load_body(Base(str(base)), device="cpu")
    stack = landed(adapter, body)
    require_same_updates(stack, updates(model, body))
    require_same_outputs(model, part, body, stack)


@pytest.mark.parametrize("kind", AUTO)
@pytest.mark.parametrize("family", TEXTS)
def test_text_models(family, kind, tmp_path):
    model = text_model(TEXTS[family], kind)
    base, adapter = trained(tmp_path, model, LINEARS)
    if (
        kind != "AutoModel" and model.base_model_prefix == "language_model"
    ):  # Gemma 3 of 4.50: its AutoModel cannot read its own CausalLM
        with pytest.raises(NSCError, match="has no weights for"):
            load_body(Base(str(base)), device="cpu")
        return
    body = load_body(Base(str(base)), device="cpu")
    stack = landed(adapter, body)
    require_same_updates(stack, updates(model, body))
    part = "" if kind == "AutoModel" else {"GPT-NeoX": "gpt_neox"}.get(family, "model")
    require_same_outputs(model, part, body, stack)
    targets = choose_targets(body, stack.names)
    fused = {"Phi-3": "qkv_proj", "GPT-NeoX": "query_key_value"}
    assert [target.rsplit(".", 1)[-1] for target in targets] == [fused.get(family, "v_proj")]


def rewritten(adapter: Path, out: Path, names: dict[str, str]) -> Path:
    """The adapter with its modules called by other names, in the config's targets too."""
    out.mkdir()
    tensors, found = {}, set()
    for key, tensor in load_file(adapter / "adapter_model.safetensors").items():
        module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        (part,) = [name for name in names if f".{module}".endswith(f".{name}")]
        tensors[f"base_model.model.{module.removesuffix(part)}{names[part]}.lora_{rest}"] = tensor
        found.add(names[part].rsplit(".", 1)[-1])
    save_file(tensors, out / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps(config | {"target_modules": sorted(found)}))
    return out


@pytest.mark.parametrize("family", ["ViT", "ViT, classifier", "DINOv2", "DINOv2, classifier", "CLIP", "SigLIP"])
def test_the_names_of_the_other_transformers(family, tmp_path):
    kind, config, settings, part, lora = IMAGES[family]
    model = made(kind, config, settings)
    base, adapter = trained(tmp_path, model, lora)
    old, new, kinds = NAMES[family.split(",")[0]]
    table = {f"{old}{i}.{k}": f"{new}{i}.{v}" for i in range(VISION["num_hidden_layers"]) for k, v in kinds.items()}
    body = load_body(Base(str(base)), device="cpu")
    here = next(iter(linears(body))).startswith(old) and (old != new or any("query" in n for n in linears(body)))
    other = rewritten(adapter, tmp_path / "other", table if here else {v: k for k, v in table.items()})
    assert (
        load_file(other / "adapter_model.safetensors").keys() != load_file(adapter / "adapter_model.safetensors").keys()
    )
    stack = landed(other, body)
    require_same_updates(stack, updates(model, body))
    require_same_outputs(model, part, body, stack)


def test_another_transformers_does_not_hide_a_deeper_base(tmp_path):
    shallow = made("ViTModel", "ViTConfig", VISION | {"num_hidden_layers": 2})
    _, adapter = trained(tmp_path, shallow, QVO)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for targets in (["query", "value", "dense"], ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))
        with pytest.raises(NameMismatch, match=r"layers?\.2\..*deeper"):
            landed(adapter, made("ViTModel", "ViTConfig", VISION))


LLAVA_NAMES = {  # of LlavaForConditionalGeneration: until 4.51, until 4.57, from 5 on
    "text": ("language_model.model.layers.{}.", "model.language_model.layers.{}.", "model.language_model.layers.{}."),
    "tower": (
        "vision_tower.vision_model.encoder.layers.{}.", "model.vision_tower.vision_model.encoder.layers.{}.",
        "model.vision_tower.encoder.layers.{}.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("era", [0, 1, 2])
def test_llava_of_every_era(era, tmp_path):
    """On what loads it here: LlavaModel of transformers 5, or the whole of transformers 4.50."""
    here = 0 if transformers.__version__.startswith("4.50") else 2
    model = tiny_llava()
    body = model if here == 0 else model.model
    names = [n for n in linears(model) if "layers" in n and n.endswith(("q_proj", "v_proj"))]
    assert len(names) == 2 * (LLAMA["num_hidden_layers"] + VISION["num_hidden_layers"])
    spelled = {}
    for name in names:
        home = LLAVA_NAMES["tower" if "vision_tower" in name else "text"]
        block, kind = name.split("layers.")[1].split(".", 1)
        assert name == home[here].format(block) + kind
        spelled[home[era].format(block) + kind] = name if here == 0 else name.removeprefix("model.")
    shapes = linears(body)
    factors = {}
    for seed, (name, place) in enumerate(spelled.items()):
        m, d = shapes[place]
        factors |= random_factors([name], r=2, d=d, m=m, seed=seed)
    stack = landed(write_adapter(tmp_path / "a", factors, r=2, alpha=6), body)
    expected = {spelled[name]: 3 * B.double() @ A.double() for name, (A, B) in factors.items()}
    require_same_updates(stack, expected)
    assert {t.split(".")[-1] for t in choose_targets(body, stack.names)} == {"v_proj"}


@pytest.mark.parametrize("kind", AUTO)
def test_an_adapter_of_one_wrapper_merges_on_the_base_of_another(kind, tmp_path):
    base, _ = trained(tmp_path / "there", text_model("MistralConfig", "AutoModelForSequenceClassification"), LINEARS)
    model = text_model("MistralConfig", kind)
    _, adapter = trained(tmp_path / "here", model, LINEARS)
    body = load_body(Base(str(base)), device="cpu")
    require_same_updates(landed(adapter, body), updates(model, body))


@pytest.mark.parametrize("family", ["CLIP, both towers", "SigLIP, both towers"])
def test_a_base_of_two_towers_from_images_to_proof(family, tmp_path):
    kind, config, settings, _, lora = IMAGES[family]
    base, adapter = trained(tmp_path, made(kind, config, settings), lora)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(base)
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = nsc.merge(base, {"a": adapter}, {"a": list(images)}, steps=2, lr=0.02, progress=False)
    assert len(result.record.targets) == 1 and result.record.targets[0].endswith("layers.2.self_attn.out_proj")
    proof = result.save(tmp_path / "out")
    assert proof.outputs < 1e-4 < proof.effect
    assert result.save(tmp_path / "full", full=True).outputs < 1e-4
    import peft

    loaded = peft.PeftModel.from_pretrained(getattr(transformers, kind).from_pretrained(base), tmp_path / "out")
    body = loaded.get_base_model().vision_model
    whole = getattr(transformers, kind).from_pretrained(tmp_path / "full").vision_model
    pixels = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(body(pixels)[0], whole(pixels)[0], rtol=1e-4, atol=1e-4)


def test_the_head_of_siglip_reads_weights_and_runs_no_layer(tmp_path):
    """PEFT puts LoRA there with out_proj; it never trains, and changes nothing here either."""
    model = made("SiglipVisionModel", "SiglipVisionConfig", VISION)
    model.save_pretrained(tmp_path / "base")
    adapter = peft_adapter(tmp_path / "a", model, r=3, target_modules=["q_proj", "out_proj"])
    rewrite(
        adapter / "adapter_model.safetensors", lambda t: [v.zero_() for k, v in t.items() if "head" in k and "_B" in k]
    )
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "base")
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    result = nsc.merge(tmp_path / "base", {"a": adapter}, {"a": list(images)}, steps=2, lr=0.02, progress=False)
    assert [name for name in result.modules if "head" in name] and "head" not in result.record.targets[-1]
    pixels = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), merged_layers(result.model, result.stack, torch.ones(len(result.modules), 1)):
        torch.testing.assert_close(result.model(pixels)[1], model(pixels)[1], rtol=1e-4, atol=1e-4)
    assert result.save(tmp_path / "out").outputs < 1e-4


@pytest.mark.parametrize("family", ["CLIP", "SigLIP"])
def test_an_adapter_of_the_text_tower_never_lands_among_images(family, tmp_path):
    model = made(f"{family.replace('SigLIP', 'Siglip')}Model", f"{family.replace('SigLIP', 'Siglip')}Config", BOTH)
    base, adapter = trained(tmp_path, model, r".*text_model\..*(q_proj|v_proj)")
    with pytest.raises(NameMismatch, match=r"text_model|match no linear layer"):
        landed(adapter, load_body(Base(str(base)), device="cpu"))
    base, adapter = trained(
        tmp_path / "both", made(type(model).__name__, type(model.config).__name__, BOTH), ["q_proj"]
    )
    with pytest.raises(NameMismatch, match=r"both match|match no linear layer"):
        landed(adapter, load_body(Base(str(base)), device="cpu"))


def test_two_towers_that_cannot_be_parted_are_refused(tmp_path):
    transformers.CLIPSegConfig(text_config=TEXT_TOWER, vision_config=VISION).save_pretrained(tmp_path)
    with pytest.raises(NSCError, match="AutoModel: it has none for clipseg_vision_model"):
        _ = Base(str(tmp_path)).takes


@pytest.mark.parametrize("family", ["ViT", "CLIP", "DINOv2"])
def test_images_are_measured_at_the_output_projection_or_else_the_values(family):
    kind, config, settings, *_ = IMAGES[family]
    body = made(kind, config, settings)
    names = [name for name in linears(body) if ".2." in name]
    (output,) = [name for name in names if name.endswith(("o_proj", "out_proj", "attention.output.dense"))]
    (values,) = [name for name in names if name.endswith(("v_proj", "value"))]
    (first,) = [name for name in names if name.endswith(("fc1", "intermediate.dense"))]
    assert choose_targets(body, names) == [output]
    assert choose_targets(body, [values, first]) == [values]
    assert choose_targets(body, [first]) == [first]
