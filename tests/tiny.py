"""Tiny models and adapters, made in milliseconds; transformers and peft are imported only where they are used."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load, save_file
from torch import Tensor, nn

Factors = Mapping[str, tuple[Tensor, Tensor]]  # module -> A (r, d), B (m, r)

LLAMA = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
WORDS = [f"word{i}" for i in range(LLAMA["vocab_size"] - 4)]
CHAT = (  # the user's words around the image, as LLaVA's template puts them
    "{% for message in messages %}word1 {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}word2{% endif %}"
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=8, patch_size=4
)


def random_factors(names: Iterable[str], r: int = 4, d: int = 32, m: int = 32, seed: int = 0) -> Factors:
    """Random A (r, d) and B (m, r) for every module name."""
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(r, d, generator=generator), torch.randn(m, r, generator=generator)) for name in names}


def write_adapter(
    path: Path,
    factors: Factors,
    r: int = 4,
    alpha: float = 8,
    saved: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,  # stored under exactly these keys
    **config: Any,
) -> Path:
    """A PEFT adapter folder written by hand; ``config`` overrides or adds fields, ``saved`` are modules_to_save."""
    tensors = {}
    for name, (A, B) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A
        tensors[f"base_model.model.{name}.lora_B.weight"] = B
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in (saved or {}).items()} | dict(extra or {})
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "tiny",
        "r": r,
        "lora_alpha": alpha,
        "use_rslora": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in factors}),
        "task_type": None,
        "modules_to_save": sorted({name.rsplit(".", 1)[0] for name in saved}) if saved else None,
    }
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(settings | config))
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path / "adapter_model.safetensors")
    return path


def peft_adapter(path: Path, model: nn.Module, seed: int = 0, **lora: Any) -> Path:
    """An adapter made and saved by PEFT itself, with random B; ``model`` carries the LoRA layers afterwards."""
    import peft

    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**lora))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    wrapped.save_pretrained(path)
    return path


def tiny_llama(kind: str = "AutoModel", seed: int = 0, **config: Any) -> nn.Module:
    """A random LLaMA; ``kind`` is AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification..."""
    import transformers

    return _from_config(getattr(transformers, kind), transformers.LlamaConfig(**(LLAMA | config)), seed)


def tiny_vit(kind: str = "AutoModel", seed: int = 0, **config: Any) -> nn.Module:
    """A random ViT; ``kind`` is AutoModel or AutoModelForImageClassification."""
    import transformers

    return _from_config(getattr(transformers, kind), transformers.ViTConfig(**(VISION | config)), seed)


def tiny_llava(kind: str = "AutoModelForImageTextToText", seed: int = 0, **config: Any) -> nn.Module:
    """A random LLaVA with a LLaMA text model and a CLIP image tower; ``config`` overrides fields of LlavaConfig."""
    import transformers

    text, vision = transformers.LlamaConfig(**LLAMA), transformers.CLIPVisionConfig(**VISION)
    return _from_config(
        getattr(transformers, kind), transformers.LlavaConfig(text_config=text, vision_config=vision, **config), seed
    )


def linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Linear modules of a model -> (out_features, in_features)."""
    return {n: (m.out_features, m.in_features) for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def save_base(
    path: Path,
    kind: str = "AutoModelForCausalLM",
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "1GB",
    **config: Any,
) -> Path:
    """A random LLaMA with a tokenizer over WORDS, as a folder that the Auto classes load."""
    model = tiny_llama(kind, **({"initializer_range": 0.2} | config)).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    save_tokenizer(path)
    return path


def save_image_base(path: Path, **config: Any) -> Path:
    """A random ViT with an image processor, as a folder that the Auto classes load."""
    import transformers

    size = config.get("image_size", VISION["image_size"])
    tiny_vit(**({"initializer_range": 0.2} | config)).save_pretrained(path)
    transformers.ViTImageProcessor(size={"height": size, "width": size}).save_pretrained(path)
    return path


def save_llava_base(path: Path, chat_template: str | None = CHAT, **text: Any) -> Path:
    """A random LLaVA with a processor, as a folder that the Auto classes load; ``text`` configures its LLaMA."""
    import transformers

    size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**(LLAMA | {"vocab_size": 65, "initializer_range": 0.2} | text)),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=64,
        initializer_range=0.2,
    )
    model = _from_config(transformers.AutoModelForImageTextToText, config, 0)
    for name, parameter in model.named_parameters():
        if "multi_modal_projector" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size=size, crop_size=size),
        tokenizer=word_tokenizer("<image>"),
        patch_size=VISION["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=chat_template,
    ).save_pretrained(path)
    return path


def llava_prefixes() -> tuple[str, str]:
    """The prefixes of the language model's layers and of the projector in the installed transformers' LLaVA."""
    import transformers

    if transformers.__version__.startswith("4."):
        return "language_model.model.layers", "multi_modal_projector"
    return "model.language_model.layers", "model.multi_modal_projector"


def save_tokenizer(path: Path) -> None:
    """Save ``word_tokenizer`` to a folder."""
    word_tokenizer().save_pretrained(path)


def word_tokenizer(*more: str) -> Any:
    """A word-level tokenizer over WORDS and ``more`` special tokens, without special tokens in its output."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS, *more])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=list(more), **special)


def rewrite(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    """Apply ``change`` to the tensors of a safetensors file on disk, keeping its metadata."""
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load(file.read_bytes())  # from memory: the file is about to be written over
    change(tensors)
    save_file(tensors, file, metadata=metadata)
    return file


def dense_updates(adapter: Path, kind: str = "AutoModelForCausalLM", **config: Any) -> dict[str, Tensor]:
    """Body module -> scale * B @ A in float64, with factors and scale as PEFT itself loads them."""
    import peft

    return updates_of(peft.PeftModel.from_pretrained(tiny_llama(kind, **config), adapter))


def updates_of(model: Any) -> dict[str, Tensor]:
    """Body module -> scale * B @ A in float64, of a model that PEFT loaded an adapter onto."""
    import peft

    updates = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            A, B = (side["default"].weight.detach().double() for side in (layer.lora_A, layer.lora_B))
            updates[name.removeprefix("model.")] = layer.scaling["default"] * B @ A
    return updates


def _from_config(auto: Any, config: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return auto.from_config(config).eval()
