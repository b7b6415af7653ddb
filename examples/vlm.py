"""Merge real adapters of a small LLaVA, score the merge on every task beside what else there is.

    pip install --no-deps easy-vqa==1.0
    python examples/vlm.py [--out out/vlm] [--task color shape caption] [--steps 100]

The base is made first, by ``vlm_base.py``; then an adapter a task: a LoRA on ``q_proj`` and ``v_proj`` of the language
model, and the projector in full. What lies in the folder is not trained again, and a score that was taken is kept.
"""

import argparse
import json
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

import torch
from easyvqa import TASKS, Row, load, write_unlabelled
from peft import LoraConfig, PeftModel, get_peft_model
from shares import SCALES, Scores, best_sum, format_table
from smollm2 import NAME, prepare_base
from torch import nn
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor
from vlm_base import answer_logits, fit, prepare_vlm

import nsc

TARGETS = r".*language_model.*\.(q_proj|v_proj)"
PROJECTOR = ["multi_modal_projector.linear_1", "multi_modal_projector.linear_2"]
DEFAULT_TASKS = ["color", "shape", "caption"]  # "presence" is at chance after so few steps
ROWS, UNLABELLED = 200, 500  # test rows and unlabeled samples of each task


def train_adapter(base: Path, task: str, steps: int, out: Path) -> Path:
    """Train the adapter of one task unless it is there, and return its folder."""
    if not out.exists():
        torch.manual_seed(1 + list(TASKS).index(task))  # with one seed all adapters had the same row space
        model, processor = load_vlm(base)
        model = add_lora(model)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fit(model, processor, trained, load(task, "train"), steps, lr=1e-3, name=task)
        model.save_pretrained(out, save_embedding_layers=False)  # "auto" would look for the base
    return out


def add_lora(model: nn.Module, r: int = 16) -> PeftModel:
    """Add LoRA to the language model alone, whose names the image tower shares, and train the projector in full."""
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=2 * r, target_modules=TARGETS, modules_to_save=PROJECTOR))


def load_vlm(base: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, LlavaProcessor]:
    """Return the base, frozen, and its processor."""
    model = LlavaForConditionalGeneration.from_pretrained(base).to(dtype).requires_grad_(False)
    return model.eval(), AutoProcessor.from_pretrained(base)


@torch.no_grad()
def accuracy(model: nn.Module, processor: LlavaProcessor, rows: list[Row], batch_size: int = 40) -> float:
    """Return the share of rows whose greedy answer is exactly right, its end included.

    Greedy decoding gives the answer if and only if each of its tokens is the likeliest after those before it, so that
    one forward is enough.
    """
    right = 0
    for start in range(0, len(rows), batch_size):
        logits, labels = answer_logits(model, processor, rows[start : start + batch_size])
        right += int(((logits.argmax(-1) == labels) | (labels == -100)).all(-1).sum())
    return right / len(rows)


@torch.no_grad()
def add_scaled(model: nn.Module, adapters: Mapping[str, Path], scale: float) -> nn.Module:
    """Add ``scale`` times the sum of all adapters to the weights: of LoRA updates, and of changes of the projector."""
    parameters = dict(model.named_parameters())
    before = {name: p.clone() for name, p in parameters.items() if "multi_modal_projector" in name}
    for task, folder in adapters.items():
        adapter = nsc.read_adapter(folder, task)
        for name, factors in adapter.factors.items():
            weight = parameters[f"{name}.weight"]
            weight += scale * factors.scale * (factors.B @ factors.A).to(weight)
        for name, tensor in adapter.saved.items():
            parameters[name] += scale * (tensor.to(before[name]) - before[name])
    return model


def compare(base: Path, adapters: Mapping[str, Path], merged: Mapping[str, Path], file: Path) -> str:
    """Return the table: fine-tuned, base, the plain sum at the scale that is best on these very rows, merges by name.

    Scores are kept in ``file`` and not taken again, but for those of ``merged``.
    """
    exams = {task: load(task, "test")[:ROWS] for task in adapters}
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept = {key: value for key, value in kept.items() if key.partition(", ")[2] not in merged}  # merged anew each time

    def scores(name: str, change: Callable[[nn.Module], nn.Module], tasks: Collection[str] = tuple(adapters)) -> Scores:
        if any(f"{task}, {name}" not in kept for task in tasks):
            model, processor = load_vlm(base, torch.float32)
            model = change(model).to(torch.bfloat16).eval()
            for task in tasks:
                kept[f"{task}, {name}"] = accuracy(model, processor, exams[task])
                print(f"{task}, {name}: {kept[f'{task}, {name}']:.3f}", flush=True)
                file.write_text(json.dumps(kept, indent=1) + "\n")
        return {task: kept[f"{task}, {name}"] for task in tasks}

    alone: Scores = {}
    for task, folder in adapters.items():
        alone |= scores("fine-tuned", partial(PeftModel.from_pretrained, model_id=folder), [task])
    base_alone = scores("base", lambda model: model)
    learned = {name: scores(name, partial(PeftModel.from_pretrained, model_id=path)) for name, path in merged.items()}
    best_name, best = best_sum(
        lambda scale: scores(f"sum x {scale:g}", partial(add_scaled, adapters=adapters, scale=scale)), alone, SCALES
    )
    merges = {"base": base_alone, best_name: best, **learned}
    return format_table(alone, merges, dict.fromkeys(exams, "exact"))


def main() -> None:
    """Train what is missing, merge and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--language-model", type=Path, default=Path("out") / NAME, help="written if it is not there")
    parser.add_argument("--out", type=Path, default=Path("out/vlm"))
    parser.add_argument("--task", nargs="+", choices=TASKS, default=DEFAULT_TASKS)
    parser.add_argument("--tower-steps", type=int, default=1600)
    parser.add_argument("--projector-steps", type=int, default=250)
    parser.add_argument("--adapter-steps", type=int, default=160)
    parser.add_argument("--steps", type=int, default=100, help="of the merge")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of the merge")
    parser.add_argument("--no-merge", action="store_true", help="everything but NSC and match")
    args = parser.parse_args()
    began = time.perf_counter()
    base = prepare_vlm(prepare_base(args.language_model), args.out, args.tower_steps, args.projector_steps)
    adapters = {task: train_adapter(base, task, args.adapter_steps, args.out / "adapters" / task) for task in args.task}
    data = {task: write_unlabelled(task, args.out / "data" / f"{task}.jsonl", UNLABELLED) for task in args.task}
    nsc_settings = {"steps": args.steps, "lr": args.lr, "batch_size": 1}
    methods = {} if args.no_merge else {"NSC": nsc_settings, "match": {"method": "match"}}
    merged = {name: args.out / f"merged-{name.lower()}" for name in methods}
    for name, settings in methods.items():
        shutil.rmtree(merged[name], ignore_errors=True)
        result = nsc.merge(base, adapters, data, dtype="bfloat16", **settings)
        print(f"{name}: {result.save(merged[name])}", flush=True)
    print(f"\n{compare(base, adapters, merged, args.out / 'scores.json')}\n")
    print(f"{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
