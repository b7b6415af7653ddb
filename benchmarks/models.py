"""The models whose steps are timed, with random weights: LLaMA-like text models, ViT, and LLaVA as the step sees it.

On a GPU every case is run as it is. A machine without one runs it with fewer blocks and rows: what was cut is said
beside the figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from timing import CUDA, DEVICE
from torch import Tensor, nn
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, PretrainedConfig, ViTConfig

from nsc.bases.loading import DTYPE
from nsc.batch import Batch

SMOLLM2 = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
)
LLAMA3_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)
LLAMA3_70B = LlamaConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
)
VICUNA_7B = LlamaConfig(  # the language model of LLaVA-1.5-7B
    vocab_size=32064,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
CLIP_L = CLIPVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=336,
    patch_size=14,
)
VIT_B = ViTConfig()
TOWER_BLOCKS = 23  # LLaVA takes the features before CLIP's last block
RANK = 16
QV = ("q_proj", "v_proj", "query", "value")  # as transformers 5 and 4 name them


@dataclass(frozen=True, eq=False)
class Case:
    """A step: a model, and for each task so many samples of so many tokens of text.

    Attributes:
        model: its name.
        config: of the body.
        tasks: how many adapters.
        samples: of each task.
        length: tokens of text in a sample; 0 for images alone.
        tower: config of the tower for the images before the text.
        dtype: of weights and adapters.
        tokens_per_pass: of nsc's step, None for a single pass.
        cut: what this machine does not hold.
    """

    model: str
    config: PretrainedConfig
    tasks: int
    samples: int
    length: int = 0
    tower: CLIPVisionConfig | None = None
    dtype: str = "bfloat16"
    tokens_per_pass: int | None = None
    cut: str = ""

    def __str__(self) -> str:
        return f"{self.model}, {self.dtype}"

    @property
    def tokens(self) -> int:
        """Tokens of a sample, those of its image included."""
        images = self.tower or (None if self.length else self.config)
        patches = (images.image_size // images.patch_size) ** 2 if images else 0
        return self.length + patches + (1 if images is self.config else 0)

    @property
    def passes(self) -> int:
        """How many passes nsc's step takes."""
        return math.ceil(self.tasks * self.samples * self.tokens / self.tokens_per_pass) if self.tokens_per_pass else 1

    def here(self) -> Case:
        """Return the case as this machine runs it."""
        if CUDA or self.model not in CUTS:
            return self
        cut = CUTS[self.model]
        text = {"vocab_size": 1024} if self.length else {}
        said = f"{cut.blocks} of {self.config.num_hidden_layers} blocks, {cut.samples} of {self.samples} samples a task"
        if self.length:
            said += f", {cut.length} of {self.length} tokens of text, a vocabulary of 1024"
        if self.tower:
            said += (
                f", {cut.blocks} of {self.tower.num_hidden_layers} blocks of the tower, images of {cut.image} pixels"
            )
        return replace(
            self,
            config=_changed(self.config, num_hidden_layers=cut.blocks, **text),
            samples=cut.samples,
            length=cut.length,
            cut=said,
            tower=self.tower and _changed(self.tower, num_hidden_layers=cut.blocks, image_size=cut.image),
        )


@dataclass(frozen=True)
class Cut:
    """What a machine without a GPU holds: so many blocks, samples of a task, tokens of text, pixels to a side."""

    blocks: int
    samples: int
    length: int = 0
    image: int = 0


def _changed(config: Any, **changes: int) -> Any:
    return type(config)(**{**config.to_dict(), **changes})


CASES = [  # the cheapest first
    Case("SmolLM2-135M", SMOLLM2, 6, 2, 64, dtype="float32"),
    Case("SmolLM2-135M", SMOLLM2, 6, 2, 64),
    Case("ViT-B/16", VIT_B, 20, 32),
    Case("LLaMA-3-8B", LLAMA3_8B, 6, 2, 96, tokens_per_pass=576),
    Case("LLaVA-1.5-7B", VICUNA_7B, 6, 1, 64, CLIP_L),
]
CUTS = {"ViT-B/16": Cut(2, 1), "LLaMA-3-8B": Cut(2, 1, 16), "LLaVA-1.5-7B": Cut(2, 1, 16, 112)}


def random_body(config: PretrainedConfig, dtype: str) -> nn.Module:
    """Return the frozen body of a config, on the device, with the weights that transformers draws (deviation 0.02)."""
    torch.manual_seed(0)
    with torch.device(DEVICE):
        model = AutoModel.from_config(config, **{DTYPE: getattr(torch, dtype)})
    model.config.use_cache = False
    return model.requires_grad_(False).eval()


def random_rows(case: Case, model: nn.Module, features: Callable[[Tensor], Tensor] | None) -> tuple[Batch, Batch]:
    """Return a step's batch without padding as nsc takes it, and as the loop does.

    Both are the same, but where a tower's images are yet to be encoded by the loop.
    """
    generator = torch.Generator().manual_seed(0)
    rows = case.tasks * case.samples
    task = (torch.arange(rows) // case.samples)[:, None].expand(-1, case.tokens).contiguous()
    weight = torch.full(task.shape, 1 / (case.samples * case.tokens))
    images = case.tower or (None if case.length else case.config)
    given: dict[str, Tensor] = {}
    if case.length:
        given["input_ids"] = torch.randint(3, case.config.vocab_size, (rows, case.length), generator=generator)
    if images:
        pixels = torch.randn(rows, 3, images.image_size, images.image_size, generator=generator)
        given["pixel_values"] = pixels.to(getattr(torch, case.dtype))
    raw = Batch(given, task, weight).to(torch.device(DEVICE))
    return (embedded(raw, model, features) if features else raw), raw


@torch.no_grad()
def embedded(raw: Batch, model: nn.Module, features: Callable[[Tensor], Tensor]) -> Batch:
    """Return what LLaVA's language model takes of images and text: the image's tokens, then those of the text."""
    text = model.get_input_embeddings()(raw.inputs["input_ids"])
    return replace(raw, inputs={"inputs_embeds": torch.cat([features(raw.inputs["pixel_values"]), text], 1)})


class Tower(nn.Module):
    """CLIP and LLaVA's projector, frozen: (b, 3, s, s) -> (b, tokens, d)."""

    def __init__(self, config: CLIPVisionConfig, width: int, dtype: str) -> None:
        super().__init__()
        self.clip = random_body(config, dtype)
        options: dict[str, Any] = {"device": DEVICE, "dtype": getattr(torch, dtype)}
        self.projector = nn.Sequential(
            nn.Linear(config.hidden_size, width, **options), nn.GELU(), nn.Linear(width, width, **options)
        ).requires_grad_(False)
        self.layer = min(TOWER_BLOCKS, config.num_hidden_layers - 1)

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Return the features of every patch, without the class token."""
        seen = self.clip(pixels, output_hidden_states=True).hidden_states[self.layer]
        return self.projector(seen[:, 1:])
