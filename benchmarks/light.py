"""A merge as a whole process, from start to exit, by nsc (with its proof), PEFT and mergekit, at LLaMA-3-8B's shapes.

    python benchmarks/light.py                              adapters by concatenation, beside PEFT
    python benchmarks/light.py --mergekit VENV/bin/python   and TIES of whole models, beside mergekit

Six adapters of rank 16 with random float32 factors; neither time nor memory depends on the values. An adapter is made
of the base's config alone: PEFT gets its model by ``to_empty``, whose pages are never touched. Whole models have four
blocks of these shapes in bfloat16 and a small vocabulary; mergekit takes no adapters, so it merges six whole models
that were made beforehand. All programs run by turns, each in its own process. CPU seconds are user and system; the peak
is that of resident memory, as the system tells it of the process (``ru_maxrss``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import record
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
TASKS, RANK, ALPHA = [f"task{k}" for k in range(6)], 16, 32
D, KV, INNER = 4096, 1024, 14336
LINEARS = {
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (KV, D),
    "self_attn.v_proj": (KV, D),
    "self_attn.o_proj": (D, D),
    "mlp.gate_proj": (INNER, D),
    "mlp.up_proj": (INNER, D),
    "mlp.down_proj": (D, INNER),
}
TARGETS = {"q, v": ("self_attn.q_proj", "self_attn.v_proj"), "all seven": tuple(LINEARS)}
LAUNCHER = """
import json, os, resource, subprocess, sys, time
started = time.perf_counter()
status = subprocess.call(sys.argv[1:])
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([time.perf_counter() - started, used.ru_utime + used.ru_stime, used.ru_maxrss]))
sys.exit(status)
"""  # a small process: the system counts the memory of the one that starts a program to that program's peak
BLOCKS, WHOLE_BLOCKS, VOCABULARY = 32, 4, 1024


def write_base(folder: Path, blocks: int, weights: bool) -> None:
    """Write the config of a LLaMA of these shapes, and weights if they are wanted."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=VOCABULARY if weights else 128256,
        hidden_size=D,
        intermediate_size=INNER,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
    )
    if weights:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    else:
        config.save_pretrained(folder)


def write_adapter(folder: Path, seed: int, blocks: int, targets: tuple[str, ...]) -> None:
    """Write an adapter with random factors, as PEFT does."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name in (f"base_model.model.model.layers.{i}.{target}" for i in range(blocks) for target in targets):
        m, d = LINEARS[name.split(".", 5)[5]]
        tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, d, generator=generator) * 0.02
        tensors[f"{name}.lora_B.weight"] = torch.randn(m, RANK, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": [target.rpartition(".")[2] for target in targets],
        "base_model_name_or_path": "base",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))


def write_expert(folder: Path, base: Path, adapter: Path) -> None:
    """Write the base with an adapter in its weights, as mergekit takes it."""
    shutil.copytree(base, folder)
    tensors, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key in [key for key in factors if key.endswith("lora_A.weight")]:
        place = key.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        update = ALPHA / RANK * (factors[key.replace("lora_A", "lora_B")] @ factors[key])
        tensors[place] = (tensors[place].float() + update).to(tensors[place].dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def peft_cat(base: str, out: str, *adapters: str) -> None:
    """Concatenate adapters by PEFT alone: this is the whole other program."""
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    first, *others = adapters
    model = PeftModel.from_pretrained(model, first, adapter_name=TASKS[0], low_cpu_mem_usage=True)
    for task, folder in zip(TASKS[1:], others, strict=True):
        model.load_adapter(folder, adapter_name=task, low_cpu_mem_usage=True)
    model.add_weighted_adapter(TASKS, [1.0] * len(TASKS), "merged", combination_type="cat")
    model.save_pretrained(out, selected_adapters=["merged"])


def nsc_command(home: Path, out: Path, *more: str) -> list[str]:
    """Return the merge of all adapters by the command line of nsc."""
    adapters = [word for task in TASKS for word in ("--adapter", f"{task}={home / task}")]
    return [sys.executable, "-m", "nsc", "merge", "--base", str(home / "base"), *adapters, "--out", str(out), *more]


def peft_command(home: Path, out: Path) -> list[str]:
    """Return the concatenation of all adapters by PEFT."""
    adapters = [str(home / task) for task in TASKS]
    return [sys.executable, str(Path(__file__).resolve()), "--peft", str(home / "base"), str(out), *adapters]


def mergekit_command(home: Path, out: Path, python: str) -> list[str]:
    """Return the TIES merge of whole models by mergekit."""
    models = [f"  - model: {home / f'{task}-whole'}\n    parameters: {{weight: 1.0, density: 0.2}}" for task in TASKS]
    head = (
        f"merge_method: ties\nbase_model: {home / 'base'}\ndtype: bfloat16\nparameters: {{normalize: false}}\nmodels:\n"
    )
    (home / "ties.yaml").write_text(head + "\n".join(models) + "\n")
    return [str(Path(python).parent / "mergekit-yaml"), str(home / "ties.yaml"), str(out), "--lazy-unpickle"]


def run(command: list[str], out: Path) -> dict[str, float]:
    """Run a process to its end.

    Returns:
        Its seconds on the clock and of CPU, and its peak of resident memory in bytes.
    """
    shutil.rmtree(out, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command], env=environment, capture_output=True, text=True
    )
    if done.returncode or not list(out.rglob("*.safetensors")):
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    took, cpu, peak = json.loads(done.stdout.splitlines()[-1])
    return {"clock": took, "cpu": cpu, "peak_bytes": peak * (1 if sys.platform == "darwin" else 1024)}


def race(name: str, commands: dict[str, list[str]], out: Path, rounds: int) -> dict[str, Any]:
    """Run programs by turns; return the entry for the file of results."""
    took: dict[str, list[dict[str, float]]] = {program: [] for program in commands}
    for _ in range(rounds):
        for program, command in commands.items():
            took[program].append(run(command, out))
            print(name, program, took[program][-1], flush=True)
    shutil.rmtree(out, ignore_errors=True)
    keys = ("clock", "cpu", "peak_bytes")
    found = {program: {key: median(one[key] for one in runs) for key in keys} for program, runs in took.items()}
    other = next(program for program in commands if program != "nsc")
    info = {
        "kind": "light",
        "merge": name,
        "rounds": rounds,
        "programs": found,
        "against": other,
        "ratios": {key: found["nsc"][key] / found[other][key] for key in keys},
        "load_average": os.getloadavg()[0],
    }
    return {"fullname": f"benchmarks/light.py::{name}", "group": "light", "extra_info": info, "made": made()}


def made() -> dict[str, Any]:
    """Return what the numbers depend on; each process has one thread, whatever this one has."""
    return {**record.provenance(), "threads": 1}


def main() -> None:
    """Make the inputs, run everything, and add it to the file of this machine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where 12 GB may lie for a while")
    parser.add_argument("--mergekit", help="python of an environment with mergekit")
    parser.add_argument("--only", choices=[*TARGETS, "whole"], action="append", help="some of it")
    parser.add_argument("--peft", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peft:
        return peft_cat(*given.peft)
    torch.set_num_threads(1)
    file = Path(__file__).parent / "results" / record.file_name()
    for name, targets in TARGETS.items():
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            home, out = Path(folder), Path(folder) / "out"
            if given.only and name not in given.only:
                continue
            write_base(home / "base", BLOCKS, weights=False)
            for seed, task in enumerate(TASKS):
                write_adapter(home / task, seed, BLOCKS, targets)
            commands = {
                "nsc": nsc_command(home, out, "--method", "task-arithmetic"),
                "PEFT": peft_command(home, out),
            }
            record.keep([race(f"adapter, {name}", commands, out, given.rounds)], file)
    if given.mergekit and (not given.only or "whole" in given.only):
        with tempfile.TemporaryDirectory(dir=given.scratch) as folder:
            home, out = Path(folder), Path(folder) / "out"
            write_base(home / "base", WHOLE_BLOCKS, weights=True)
            for seed, task in enumerate(TASKS):
                write_adapter(home / task, seed, WHOLE_BLOCKS, TARGETS["q, v"])
                write_expert(home / f"{task}-whole", home / "base", home / task)
            commands = {
                "nsc": nsc_command(home, out, "--method", "ties", "--full"),
                "mergekit": mergekit_command(home, out, given.mergekit),
            }
            record.keep([race("whole model by TIES, q, v", commands, out, given.rounds)], file)


if __name__ == "__main__":
    main()
