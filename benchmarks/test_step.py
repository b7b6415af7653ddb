"""Seconds a step on a LLaMA of SmolLM2-135M's shapes: nsc (packed, truncated, whitened) and the per-task loop by turns.

Adapters and tokens are random: the time does not depend on their values. Beside seconds on the clock, CPU seconds of
the process are recorded: with one thread they are the same on a quiet machine, and say more on a busy one.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import peft
import pytest
import torch
from baseline import PerTaskLoop, split_by_task
from floor import Floor
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig

from nsc.adapters import read_adapter
from nsc.batch import Batch
from nsc.config import MergeConfig
from nsc.distributed import ALONE
from nsc.families import choose_targets, linear_shapes, load_body
from nsc.learn import _step
from nsc.merging import match_adapters
from nsc.objective import NullSpaceObjective
from nsc.packing import collate
from nsc.passes import Passes
from nsc.stack import Stack, stack_adapters, whitened
from nsc.state import begin
from nsc.surgery import merged_layers, share_inputs

TASKS, RANK, MODULES = 6, 16, ["q_proj", "v_proj"]
SAMPLES, LENGTH = 2, 64  # of each task, in tokens
ROUNDS, WARMUP = 10, 2
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMOLLM2 = LlamaConfig(
    vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, max_position_embeddings=8192,
)  # fmt: skip
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # by dtype


@pytest.mark.benchmark(group="step")
@pytest.mark.parametrize("dtype", LOSS_TOLERANCE)
def test_step(benchmark: BenchmarkFixture, dtype: str, pytestconfig: pytest.Config, tmp_path: Path) -> None:
    base = pytestconfig.getoption("base")
    model = smollm2(base, dtype)
    carrier = with_random_adapters(sharing_weights(model))
    carrier.save_pretrained(tmp_path)
    stack = read_stack(tmp_path, model)
    targets = choose_targets(model, stack.names)
    batch = random_batch(model).to(torch.device(DEVICE))
    loop, parts, floor = PerTaskLoop(carrier, targets), split_by_task(batch), Floor(sharing_weights(model), targets[-1])
    seconds: dict[str, list[tuple[float, float]]] = {"nsc": [], "loop": [], "floor": []}
    made: dict[str, list[Tensor]] = {name: [] for name in seconds}

    def timed(name: str, step: Callable[[], Tensor]) -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        made[name].append(step())
        wait()
        seconds[name].append((time.perf_counter() - start, time.process_time() - cpu_start))

    def others() -> None:
        timed("loop", lambda: loop.step(parts))
        timed("floor", lambda: floor(batch).sum())

    with nsc_step(model, stack, targets, batch) as step:
        benchmark.pedantic(partial(timed, "nsc", step), setup=others, rounds=ROUNDS, warmup_rounds=WARMUP)
    first = [made[name][0].float() for name in ("nsc", "loop")]
    torch.testing.assert_close(*first, rtol=0, atol=LOSS_TOLERANCE[dtype])  # it is the same work
    for clock, unit in enumerate(["seconds", "cpu_seconds"]):
        ours, usual, least = (median(pair[clock] for pair in taken[WARMUP:]) for taken in seconds.values())
        benchmark.extra_info[unit] = {
            "nsc": ours, "loop": usual, "floor": least, "ratio": usual / ours, "over_floor": ours / least,
        }  # fmt: skip
    benchmark.extra_info |= {
        "load_average": os.getloadavg()[0], "device": DEVICE,
        "dtype": dtype, "tokens": batch.task.numel(), "adapters": TASKS, "rank": RANK, "modules": MODULES,
        "adapter_values": "random", "weights": Path(base).name if base else "random, of SmolLM2-135M's shapes",
    }  # fmt: skip


@contextmanager
def nsc_step(model: nn.Module, stack: Stack, targets: list[str], batch: Batch) -> Iterator[Callable[[], Tensor]]:
    """The step of ``nsc.learn``, on one batch; returns its loss."""
    lam = nn.Parameter(torch.full((len(stack.names), len(stack.tasks)), 0.4, device=DEVICE))
    run = begin(lam, torch.zeros_like(lam, dtype=torch.bool), MergeConfig(), "")
    with merged_layers(model, stack, lam.detach()) as layers:
        share_inputs(model, layers, targets, batch.within(1)[0])
        objective = NullSpaceObjective(model, layers, stack, targets)
        passes = Passes(objective, lam, loss=run.loss)

        def step() -> Tensor:
            _step(run, lambda _: passes.gradient([batch]), ALONE, [])
            return run.losses[run.step - 1]

        yield step


def smollm2(base: str | None, dtype: str) -> nn.Module:
    """The frozen body, from a folder or with random weights."""
    if base:
        return load_body(base, dtype, DEVICE)
    torch.manual_seed(0)
    return AutoModel.from_config(SMOLLM2).to(DEVICE, getattr(torch, dtype)).requires_grad_(False).eval()


def sharing_weights(model: nn.Module) -> nn.Module:
    """A second model on the same parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_random_adapters(model: nn.Module) -> peft.PeftModel:
    """PEFT's layers in ``model``, in its dtype."""
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, init_lora_weights=False)
    carrier = peft.get_peft_model(model, config, adapter_name="task0", autocast_adapter_dtype=False)
    for k in range(1, TASKS):
        carrier.add_adapter(f"task{k}", config, autocast_adapter_dtype=False)
    for name, parameter in carrier.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return carrier


def read_stack(folder: Path, model: nn.Module) -> Stack:
    """The adapters as nsc reads, matches and whitens them."""
    adapters = {f"task{k}": read_adapter(folder / f"task{k}") for k in range(TASKS)}
    shapes = linear_shapes(model)
    return whitened(stack_adapters(adapters, match_adapters(adapters, shapes, []), list(shapes)))


def random_batch(model: nn.Module) -> Batch:
    """SAMPLES x LENGTH tokens of each task, without padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (TASKS * SAMPLES, LENGTH), generator=generator)
    return collate(ids.tolist(), [k for k in range(TASKS) for _ in range(SAMPLES)], pad_id=0, causal=True)


def wait() -> None:
    """Until the device has done what it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
