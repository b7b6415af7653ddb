"""Tiny random models of many architectures, as a table: how each is built, what its adapters target, what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

OLD = transformers.__version__.startswith("4.")
# Not built on the meta device, run in float64, loaded as AutoModel, or made from plain dicts by transformers 4.
NOT_IN_4 = {"SwinForImageClassification", "SegformerForImageClassification", "CLIPModel", "Gemma3ForCausalLM"}
NOT_IN_4 |= {"Qwen2_5_VLForConditionalGeneration", "MllamaForConditionalGeneration"}
Settings = Mapping[str, Any]
Generator = torch.Generator


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        model: name of the class in transformers that the adapters are trained on.
        config: name of the class of its config.
        settings: arguments of the config; a function where they hold other configs.
        targets: regular expression for PEFT.
        inputs: keys of INPUTS, joined by +: what its forward takes.
        output: name of the output that is compared.
    """

    model: str
    config: str
    settings: Settings | Callable[[], Settings]
    targets: str
    inputs: str = "text"
    output: str = "logits"

    def save(self, folder: Path, tasks: Iterable[str], **lora: Any) -> dict[str, Path]:
        """Write a base, and for each task an adapter that PEFT made on it; return task -> its folder."""
        self.build().save_pretrained(folder / "base")
        adapters = {}
        for seed, task in enumerate(tasks):
            model = get_peft_model(self.build(), LoraConfig(**{"r": 2, "target_modules": self.targets, **lora}))
            generator = torch.Generator().manual_seed(seed)
            for name, parameter in model.named_parameters():
                if ".lora_" in name:
                    parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            adapters[task] = folder / task
            model.save_pretrained(adapters[task])
        return adapters

    def build(self) -> Any:
        """Return the model with random weights, in eval mode; skip what the installed transformers does not have."""
        if not hasattr(transformers, self.model) or (OLD and self.model in NOT_IN_4):
            pytest.skip(f"no {self.model} in transformers {transformers.__version__}")
        settings = self.settings() if callable(self.settings) else self.settings
        torch.manual_seed(0)
        return getattr(transformers, self.model)(getattr(transformers, self.config)(**settings)).eval()

    def arguments(self) -> dict[str, Tensor]:
        """Return the arguments of a forward of two rows."""
        generator, made = torch.Generator().manual_seed(1), {}
        for kind in self.inputs.split("+"):
            made |= INPUTS[kind](generator)
        return made


def _tokens(generator: Generator) -> Tensor:
    return torch.randint(3, 36, (2, 6), generator=generator)


INPUTS: dict[str, Callable[[Generator], dict[str, Tensor]]] = {
    "text": lambda g: {"input_ids": _tokens(g)},
    "decoder": lambda g: {"decoder_input_ids": _tokens(g)},
    "image": lambda g: {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)},
    "large image": lambda g: {"pixel_values": torch.randn(2, 3, 32, 32, generator=g)},
    "spectrum": lambda g: {"input_features": torch.randn(2, 8, 16, generator=g)},
    "wave": lambda g: {"input_values": torch.randn(2, 400, generator=g)},
}

SPECIAL = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SPECIAL, **SIZES, "max_position_embeddings": 32}
GROUPED = {**TEXT, "num_key_value_heads": 1}
HEADS = {**GROUPED, "head_dim": 8}
GPT2 = {**SPECIAL, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
BLOOM = {**SPECIAL, "hidden_size": 16, "n_layer": 2, "n_head": 2}
MAMBA = {**SPECIAL, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2}
T5 = {**SPECIAL, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
PAIR = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 24}
PAIR |= {**SPECIAL, "d_model": 16, **{name.replace("encoder", "decoder"): value for name, value in PAIR.items()}}
WHISPER = {**PAIR, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 16}
DISTIL = {**SPECIAL, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 32}
TOWER = {**SIZES, "image_size": 8, "patch_size": 4}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
SEGFORMER = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32]}
SEGFORMER |= {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
WAVES = {"conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_conv_pos_embeddings": 4}
WAVES |= {**TEXT, "num_conv_pos_embedding_groups": 2}
QWEN_TOWER = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4}
QWEN_TOWER |= {"out_hidden_size": 16}
QWEN_TOKENS = {"image_token_id": 39, "video_token_id": 38, "vision_start_token_id": 37, "vision_end_token_id": 36}
MROPE = {"rope_type": "default", "mrope_section": [1, 1, 2]}

QV = r".*\.(q_proj|v_proj)"
LLAMA = r".*\.(q_proj|v_proj|down_proj)"
LANGUAGE = r".*language_model.*\.(q_proj|v_proj|down_proj)"
BERT = r".*\.(query|value|output\.dense)"
NEOX = r".*\.(query_key_value|dense_4h_to_h)"
IMAGE = r".*attention.*\.(q_proj|v_proj|query|value)"


def _llava_like(vision: Any, text: Any, **more: Any) -> dict[str, Any]:
    return {"vision_config": vision, "text_config": text, "image_token_index": 39, **more}


def _gemma3() -> Settings:
    tower = transformers.SiglipVisionConfig(**TOWER)
    return _llava_like(tower, transformers.Gemma3TextConfig(**HEADS), mm_tokens_per_image=4)


def _llava() -> Settings:
    return _llava_like(transformers.CLIPVisionConfig(**TOWER), transformers.LlamaConfig(**GROUPED))


def _mistral3() -> Settings:
    tower = transformers.PixtralVisionConfig(**TOWER, head_dim=8)
    return _llava_like(tower, transformers.MistralConfig(**HEADS), spatial_merge_size=2)


def _paligemma() -> Settings:
    tower = {**TOWER, "model_type": "siglip_vision_model", "projection_dim": 16}
    return _llava_like(tower, {**HEADS, "model_type": "gemma"}, projection_dim=16, hidden_size=16)


def _qwen2_5_vl() -> Settings:
    tower = {**QWEN_TOWER, "fullatt_block_indexes": [0], "window_size": 8}
    return {"text_config": {**GROUPED, "rope_scaling": MROPE}, "vision_config": tower, **QWEN_TOKENS}


def _qwen3_vl() -> Settings:
    tower = {**QWEN_TOWER, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    return {"text_config": {**HEADS, "rope_scaling": MROPE}, "vision_config": tower, **QWEN_TOKENS}


def _mllama() -> Settings:
    depth = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
    text = MllamaTextConfig(**{**GROUPED, **depth}, rope_scaling={"rope_type": "default"})
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_global_layers": 1}
    sizes |= {"attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_output_dim": 32, "max_num_tiles": 1}
    tower = MllamaVisionConfig(**sizes, intermediate_layers_indices=[0], supported_aspect_ratios=[[1, 1]])
    return _llava_like(tower, text)


def _clip() -> Settings:
    towers = {"vision_config": {**TOWER, "projection_dim": 8}, "text_config": {**TEXT, "projection_dim": 8}}
    return {**towers, "projection_dim": 8}


ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", GROUPED, LLAMA),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", GROUPED, LLAMA),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", GROUPED, LLAMA),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", HEADS, LLAMA),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", HEADS, LLAMA),
    "gemma3 text": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS, LLAMA),
    "gemma3": Architecture("Gemma3ForConditionalGeneration", "Gemma3Config", _gemma3, LANGUAGE),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", GROUPED, r".*\.(qkv_proj|gate_up_proj|o_proj)"),
    "olmo2": Architecture("Olmo2ForCausalLM", "Olmo2Config", GROUPED, LLAMA),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT2, r".*\.(c_attn|c_proj|c_fc)"),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, NEOX),
    "bloom": Architecture("BloomForCausalLM", "BloomConfig", BLOOM, NEOX),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", {**TEXT, "ffn_dim": 24, "word_embed_proj_dim": 16}, QV),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", TEXT, r".*\.(query_key_value|dense)"),
    "mamba": Architecture("MambaForCausalLM", "MambaConfig", MAMBA, r".*\.(in_proj|x_proj)"),
    "t5": Architecture("T5ForConditionalGeneration", "T5Config", T5, r".*\.(q|v|wo)", "text+decoder"),
    "mt5": Architecture("MT5ForConditionalGeneration", "MT5Config", T5, r".*\.(q|v|wo)", "text+decoder"),
    "bart": Architecture("BartForConditionalGeneration", "BartConfig", PAIR, QV, "text+decoder"),
    "bert": Architecture("BertForSequenceClassification", "BertConfig", TEXT, BERT),
    "roberta": Architecture("RobertaForSequenceClassification", "RobertaConfig", TEXT, BERT),
    "deberta-v2": Architecture(
        "DebertaV2ForSequenceClassification", "DebertaV2Config", TEXT, r".*\.(query|value)_proj"
    ),
    "distilbert": Architecture(
        "DistilBertForSequenceClassification", "DistilBertConfig", DISTIL, r".*\.(q_lin|v_lin|lin2)"
    ),
    "modernbert": Architecture(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2},
        r".*\.(Wqkv|Wo)",
    ),
    "vit": Architecture("ViTForImageClassification", "ViTConfig", TOWER, IMAGE, "image"),
    "dinov2": Architecture("Dinov2ForImageClassification", "Dinov2Config", TOWER, IMAGE, "image"),
    "clip tower": Architecture(
        "CLIPModel", "CLIPConfig", _clip, r".*vision_model.*\.(q_proj|v_proj)", "text+image", "logits_per_image"
    ),
    "swin": Architecture("SwinForImageClassification", "SwinConfig", SWIN, IMAGE, "large image"),
    "segformer": Architecture("SegformerForImageClassification", "SegformerConfig", SEGFORMER, IMAGE, "large image"),
    "whisper": Architecture("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, QV, "spectrum+decoder"),
    "wav2vec2": Architecture("Wav2Vec2ForCTC", "Wav2Vec2Config", WAVES, QV, "wave"),
    "llava": Architecture("LlavaForConditionalGeneration", "LlavaConfig", _llava, LANGUAGE),
    "mistral3": Architecture("Mistral3ForConditionalGeneration", "Mistral3Config", _mistral3, LANGUAGE),
    "paligemma": Architecture("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", _paligemma, LANGUAGE),
    "qwen2.5-vl": Architecture("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig", _qwen2_5_vl, LANGUAGE),
    "qwen3-vl": Architecture("Qwen3VLForConditionalGeneration", "Qwen3VLConfig", _qwen3_vl, LANGUAGE),
    "mllama": Architecture("MllamaForConditionalGeneration", "MllamaConfig", _mllama, LANGUAGE),
}
