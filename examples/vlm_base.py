"""A small LLaVA of SmolLM2-135M-Instruct: the blocks of it that are kept, an image tower, a projector between them.

The tower learns alone to tell the colours, shapes and places of easy-VQA's training images, as CLIP's came ready to
LLaVA; then the projector learns, with everything else frozen, what to show the language model of it, on captions.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from easyvqa import COLORS, PLACES, SHAPES, Row, scenes
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from training import descend
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

KEPT = (0, 1, 8, 10, 11, 20, 21, 22, 24, 27, 28, 29)  # removing these 18 of 30 blocks one by one hurt the least
VISION = dict(
    hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, image_size=64, patch_size=16
)
LAYER = -1  # the tower's last: it has nothing to do besides
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END = "<|im_end|>"


def prepare_vlm(language_model: Path, out: Path, tower_steps: int, steps: int) -> Path:
    """Train tower and projector, and write the whole into ``out``/base, unless it is there; return that folder."""
    base = out / "base"
    if base.exists():
        return base
    torch.manual_seed(0)
    model, processor = assemble(language_model, KEPT, VISION)
    tower = tower_of(model)
    if not (out / "tower").exists():
        train_tower(tower, processor, tower_steps)
        tower.save_pretrained(out / "tower")
    tower.load_state_dict(CLIPVisionModel.from_pretrained(out / "tower").state_dict())
    model.requires_grad_(False).to(torch.bfloat16)
    projector = [p for name, p in model.named_parameters() if "multi_modal_projector" in name]
    rows = [Row(scene.image, "", scene.caption) for scene in scenes("train")]
    fit(model, processor, projector, rows, steps, lr=2e-3, name="projector")
    model.float().save_pretrained(base)
    processor.save_pretrained(base)
    return base


def assemble(language_model: Path, blocks: Sequence[int], vision: dict[str, int]) -> tuple[nn.Module, LlavaProcessor]:
    """Return a LLaVA of these blocks of a LLaMA, in float32, with a random tower and projector; and its processor."""
    llama = AutoModelForCausalLM.from_pretrained(language_model).float()
    llama.model.layers = nn.ModuleList(llama.model.layers[i] for i in blocks)
    llama.config.num_hidden_layers = len(blocks)
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    llama.resize_token_embeddings(len(tokenizer))
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(
        text_config=llama.config,
        vision_config=CLIPVisionConfig(**vision),
        image_token_index=image,
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        vision_feature_layer=LAYER,
        tie_word_embeddings=llama.config.tie_word_embeddings,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.get_decoder().load_state_dict(llama.model.state_dict())
    model.tie_weights()
    return model, _processor(tokenizer, vision)


def _processor(tokenizer: Any, vision: dict[str, int]) -> LlavaProcessor:
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    return LlavaProcessor(
        CLIPImageProcessor(size=size, crop_size=size),
        tokenizer,
        patch_size=vision["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def tower_of(model: nn.Module) -> CLIPVisionModel:
    """Return the image tower, wherever this version of transformers keeps it."""
    return next(m for m in model.modules() if isinstance(m, CLIPVisionModel))


def train_tower(tower: CLIPVisionModel, processor: LlavaProcessor, steps: int, batch_size: int = 32) -> None:
    """Train the tower's patches to tell colour, shape and place, by three linear heads on their mean."""
    shown = scenes("train")
    answers = [
        [t.index(a) for t, a in zip((COLORS, SHAPES, PLACES), (s.color, s.shape, s.place), strict=True)] for s in shown
    ]
    heads = nn.ModuleList(nn.Linear(tower.config.hidden_size, len(kind)) for kind in (COLORS, SHAPES, PLACES))
    pixels = pixels_of([scene.image for scene in shown], processor)
    parameters = [*tower.parameters(), *heads.parameters()]

    def loss() -> Tensor:
        rows = torch.randint(len(shown), (batch_size,))
        states = tower(pixels[rows], output_hidden_states=True).hidden_states[LAYER][:, 1:].mean(1)
        labels = torch.tensor(answers)[rows].T
        return sum(F.cross_entropy(head(states), label) for head, label in zip(heads, labels, strict=True))

    train_parameters(loss, parameters, steps, 1e-3, "tower")


def pixels_of(images: Sequence[Path], processor: LlavaProcessor) -> Tensor:
    """Return (b, 3, H, W), as the processor prepares the images."""
    return processor.image_processor(images=[_open(path) for path in images], return_tensors="pt")["pixel_values"]


def fit(
    model: nn.Module,
    processor: LlavaProcessor,
    parameters: list[nn.Parameter],
    rows: Sequence[Row],
    steps: int,
    lr: float,
    name: str,
    batch_size: int = 8,
) -> None:
    """Train ``parameters``, in float32 with the rest in bfloat16, to answer the questions."""
    for parameter in parameters:
        parameter.requires_grad_(True).data = parameter.data.float()
    drawn = _batches(rows, batch_size, random.Random(0))

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits, labels = answer_logits(model, processor, next(drawn))
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    train_parameters(loss, parameters, steps, lr, name)


def answer_logits(model: nn.Module, processor: LlavaProcessor, rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """Return what the model says in place of the answers.

    Returns:
        Logits (b, n, vocabulary) for the tokens of the answers given those before, and these tokens (b, n), -100 for
        padding.
    """
    answers = [row.answer + END for row in rows]
    texts = [question(processor, row.prompt) + answer for row, answer in zip(rows, answers, strict=True)]
    inputs = processor(text=texts, images=[_open(row.image) for row in rows], padding=True, return_tensors="pt")
    lengths = torch.tensor([len(ids) for ids in processor.tokenizer(answers).input_ids])[:, None]
    n = int(lengths.max())
    labels = inputs["input_ids"][:, -n:].masked_fill(torch.arange(n) < n - lengths, -100)
    before = inputs["input_ids"].shape[1] - 1 + torch.arange(-n, 0)  # as positions: a slice copies the head's weight
    return model(**inputs, logits_to_keep=before, use_cache=False).logits, labels


def question(processor: LlavaProcessor, prompt: str) -> str:
    """Return what stands before the answer: the image and the prompt, in the chat template."""
    content = [{"type": "image"}] + [{"type": "text", "text": prompt}] * bool(prompt)
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def train_parameters(
    loss_of: Callable[[], Tensor], parameters: list[nn.Parameter], steps: int, lr: float, name: str
) -> None:
    """Train these parameters, the learning rate rising over a twentieth of the steps, then falling to zero."""
    rates = (min(20 * (step + 1) / steps, 1) * (1 - step / steps) for step in range(steps))
    descend(name, [{"params": parameters, "lr": lr}], loss_of, rates, weight_decay=0.0, clip=1.0)


def _batches(rows: Sequence[Row], size: int, rng: random.Random) -> Iterator[list[Row]]:
    while True:
        order = rng.sample(list(rows), len(rows))
        yield from (order[start : start + size] for start in range(0, len(order) - size + 1, size))


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
