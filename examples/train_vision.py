"""A small ViT trained on real images without labels, and one LoRA adapter with its head for each task on top of it."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from pictures import PATCH, SIZE, Samples, Task, patches
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from training import descend, warmed_up
from transformers import AutoModel, ViTConfig, ViTImageProcessor, ViTModel

from nsc.bases.base_model import quiet_loading

BATCH, MASKED = 64, 0.4
BASE_RATE, LORA_RATE, HEAD_RATE = 1e-3, 4e-3, 2e-3
MEASURED = ("o_proj", "attention.output.dense")  # as transformers 5 and 4 name it
TARGETS = ("q_proj", "k_proj", "v_proj", "query", "key", "value", *MEASURED)
BODY = {"hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 512}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pixels(images: Tensor) -> Tensor:
    """Scale uint8 (n, 3, H, W) to between -1 and 1, as the base's image processor does."""
    return images.float() / 127.5 - 1


def prepare_base(out: Path, images: Tensor, steps: int, **body: int) -> Path:
    """Pretrain a ViT on ``images``, uint8 (n, 3, 32, 32), and write it with its processor, unless it is there."""
    if not out.exists():
        torch.manual_seed(0)
        config = ViTConfig(image_size=SIZE, patch_size=PATCH, **(BODY | NO_DROPOUT | body))
        model = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        _pretrain(model, images, steps)
        model.embeddings.mask_token = None  # nothing is masked from here on
        model.save_pretrained(out)
        size, middle = {"height": SIZE, "width": SIZE}, [0.5] * 3
        ViTImageProcessor(size=size, image_mean=middle, image_std=middle).save_pretrained(out)
    return out


def _pretrain(model: nn.Module, images: Tensor, steps: int) -> None:
    """Train to fill in four masked patches in ten and to tell by which multiple of 90 degrees a picture was turned."""
    width = model.config.hidden_size
    fill, turn = nn.Linear(width, 3 * PATCH**2), nn.Linear(width, 4)

    def loss_of(rows: Tensor) -> Tensor:
        turned = torch.cat([torch.rot90(pixels(images[rows[k::4]]), k, (2, 3)) for k in range(4)])
        turns = torch.arange(4).repeat_interleave(len(rows) // 4)
        true = patches(turned)
        true = (true - true.mean(-1, keepdim=True)) / (true.std(-1, keepdim=True) + 0.05)
        masked = torch.rand(true.shape[:2]) < MASKED
        hidden = model(pixel_values=turned, bool_masked_pos=masked).last_hidden_state
        filled = F.mse_loss(fill(hidden[:, 1:][masked]), true[masked])
        return filled + F.cross_entropy(turn(hidden[:, 1:].mean(1)), turns)

    parameters = [p for module in (model, fill, turn) for p in module.parameters()]
    train_on_rows("base", [{"params": parameters, "lr": BASE_RATE}], len(images), loss_of, steps)


def train_on_rows(name: str, groups: list[dict], count: int, loss_of: Callable[[Tensor], Tensor], steps: int) -> None:
    """Train on seeded batches of row numbers below ``count``."""
    rates = (warmed_up((step + 1) / (steps + 1)) for step in range(steps))
    descend(name, groups, lambda: loss_of(torch.randint(count, (BATCH,))), rates, every=100)


def features(model: nn.Module, task: Task, images: Tensor) -> Tensor:
    """Return what the head of a task sees: each patch's last hidden state if the task is dense, else their mean."""
    hidden = model(pixel_values=pixels(images)).last_hidden_state[:, 1:]
    return hidden if task.dense else hidden.mean(1)


def train_adapter(base: Path, out: Path, task: Task, train: Samples, seed: int, steps: int) -> Path:
    """Train and write the adapter of a task, in ``out``, with its head beside it, unless they are there."""
    if out.exists():
        return out
    torch.manual_seed(seed)  # one seed for all would give every adapter the same row space
    began = time.perf_counter()
    body = load(base)
    model = get_peft_model(body, LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS)))
    is_class = task.metric == "accuracy"
    true = train.targets if is_class else _standardised(train.targets)
    head = nn.Linear(body.config.hidden_size, int(true.max()) + 1 if is_class else true.shape[-1])

    def loss_of(rows: Tensor) -> Tensor:
        answers = head(features(model, task, train.inputs[rows]))
        return F.cross_entropy(answers, true[rows]) if is_class else F.mse_loss(answers, true[rows])

    lora = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": lora, "lr": LORA_RATE}, {"params": list(head.parameters()), "lr": HEAD_RATE}]
    train_on_rows(task.name, groups, len(train.inputs), loss_of, steps)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial, save_embedding_layers=False)
    save_file({name: t.detach() for name, t in head.state_dict().items()}, partial / "head.safetensors")
    partial.rename(out)
    print(
        f"{task.name}: {steps} steps on {len(train.inputs)} pictures, {time.perf_counter() - began:.0f} s", flush=True
    )
    return out


def load(base: Path) -> nn.Module:
    """Return the body alone, in eval mode."""
    with quiet_loading():
        return AutoModel.from_pretrained(base, add_pooling_layer=False)


def _standardised(targets: Tensor) -> Tensor:
    """Scale every output to mean 0 and standard deviation 1."""
    rows = targets.flatten(0, -2)
    return (targets - rows.mean(0)) / rows.std(0).clamp_min(1e-6)


@torch.no_grad()
def score(model: nn.Module, task: Task, head: Path, test: Samples, batch: int = 250) -> float:
    """Return the accuracy of the head's answers, or their Pearson correlation averaged over outputs."""
    weights = load_file(head / "head.safetensors")
    seen = torch.cat([features(model, task, part) for part in test.inputs.split(batch)])
    answers = F.linear(seen, weights["weight"], weights["bias"])
    if task.metric == "accuracy":
        return (answers.argmax(-1) == test.targets).double().mean().item()
    return pearson(answers.flatten(0, -2), test.targets.flatten(0, -2))


def pearson(answers: Tensor, true: Tensor) -> float:
    """Return the correlation over rows of (n, outputs), averaged over outputs; one that is constant counts as 0."""
    a, b = (x.double() - x.double().mean(0) for x in (answers, true))
    return ((a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0)).clamp_min(1e-12)).mean().item()
