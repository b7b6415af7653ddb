"""What a profile says against what is known: exact FLOPs, a trace written by hand, parts that add up."""

import json
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from nsc.adapters.stack import ModuleStack, Stack, whitened
from nsc.bases.base_model import Base
from nsc.bases.roles import choose_targets
from nsc.config import MergeConfig
from nsc.data.packing import collate
from nsc.errors import NSCError
from nsc.learning.loop import learn
from nsc.performance import profile as profile_module
from nsc.performance import timing
from nsc.performance.costs import Step
from nsc.performance.hardware import HARDWARE
from nsc.performance.linears import linears_in_order
from nsc.performance.profile import Profile, find_hardware, format_profile, known_gpu, measure, profile_merge
from nsc.performance.timing import Floor, count_flops, nsc_step, sharing_weights
from nsc.performance.trace import PARTS, profile_step
from nsc.runtime.memory import kept_bytes
from nsc_kernels import GramCache
from tests.cli.test_cli import refused, run
from tests.tiny import linears, tiny_llama

TASKS, LENGTH = 2, 24
FACTORS = MergeConfig(layers="factors")
CPU = torch.device("cpu")
SIZES = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4, vocab_size=64)


def body():
    return tiny_llama(**SIZES).requires_grad_(False).eval()


def random_stack(model, r: int = 4, kinds=("q_proj", "v_proj")) -> Stack:
    generator, cache, modules = torch.Generator().manual_seed(0), GramCache(), {}
    for name, (m, d) in linears(model).items():
        if name.endswith(tuple(kinds)):
            A, B = (torch.randn(*size, generator=generator) for size in ((TASKS * r, d), (m, TASKS * r)))
            grams = tuple(cache.factor([part.contiguous() for part in A.split(r)]))
            inverse = torch.block_diag(*(gram.inverse for gram in grams))
            modules[name] = ModuleStack((A,), (B / 100,), (r,) * TASKS, (1.0,) * TASKS, grams, inverse)
    return whitened(Stack(("a", "b"), modules))


def random_batch():
    ids = torch.randint(3, 60, (2 * TASKS, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    return collate(ids, [0, 0, 1, 1], pad_id=0, causal=True)


@pytest.fixture(params=["q and v", "down", "v alone, weights"])
def case(request):
    """A model, its stack, targets, batch and config."""
    model = body()
    kinds = {"q and v": ("q_proj", "v_proj"), "down": ("down_proj",)}.get(request.param, ("v_proj",))
    stack = random_stack(model, kinds=kinds)
    config = MergeConfig(layers="weights" if "weights" in request.param else "factors")
    return model, stack, choose_targets(model, stack.names), random_batch(), config


def planned(model, stack, targets, config) -> dict[str, float]:
    ranks = {name: sum(module.ranks) for name, module in stack.modules.items()}
    step = Step(model, linears_in_order(model), ranks, targets, TASKS, 2 * TASKS, LENGTH, 4)
    return {work.part: work.flops for work in step.work(config.layers)}


def test_the_floor_runs_what_the_plan_says_every_step_must(case):
    model, stack, targets, batch, config = case
    floor = Floor(sharing_weights(model), stack.names[0], targets[-1])
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    expected = planned(model, stack, targets, config)
    with pytest.MonkeyPatch.context() as patch:  # products of weights only
        for name in (attention, f"{attention}_backward"):
            patch.setitem(timing.FLOPS, name, lambda *_, **__: 0)
        counted = count_flops(lambda: floor(batch))
    rotary = counted - expected["base, forward"] - expected["base, backward"]
    assert 0 <= rotary <= 2 * SIZES["hidden_size"] * LENGTH


def test_the_floor_is_the_gradient_of_the_bare_base():
    model = body().double()
    batch = random_batch()
    seen = {}
    first, last = model.layers[1].self_attn.q_proj, model.layers[3].self_attn.v_proj

    def perturb(_module, _args, y):
        seen["leaf"] = y.detach().requires_grad_()
        return seen["leaf"]

    handles = [
        first.register_forward_hook(perturb),
        last.register_forward_pre_hook(lambda _module, args: seen.update(z=args[0])),
    ]
    model(**batch.inputs)
    (expected,) = torch.autograd.grad(seen["z"].sum(), seen["leaf"])
    for handle in handles:
        handle.remove()
    floor = Floor(sharing_weights(model), "layers.1.self_attn.q_proj", "layers.3.self_attn.v_proj")
    torch.testing.assert_close(floor(batch), expected, rtol=0, atol=1e-10)
    assert expected.abs().max() > 1e-3 and not any(m._forward_hooks for m in model.modules())


def test_a_second_model_takes_no_memory_for_weights():
    model = body()
    other = sharing_weights(model)
    assert other is not model
    pairs = zip((*model.parameters(), *model.buffers()), (*other.parameters(), *other.buffers()), strict=True)
    assert all(x is y for x, y in pairs)


def test_the_step_is_that_of_learning(case):
    model, stack, targets, batch, config = case
    with nsc_step(model, stack, targets, [batch], config) as step:
        losses = [float(step()) for _ in range(3)]
    config = replace(config, steps=3)
    learned = learn(model, stack, targets, lambda _: [batch], config, progress=False)
    assert losses == learned.losses and losses[0] != losses[2]


def test_counted_flops_are_those_of_the_plan(case):
    model, stack, targets, batch, config = case
    with nsc_step(model, stack, targets, [batch], config) as step:
        counted = count_flops(step)
    expected = planned(model, stack, targets, config)
    attention = expected["attention"] * 2 * LENGTH / (LENGTH + 1)  # all pairs: 2 products forward, 5 backward, not 4
    least = sum(expected.values()) - expected["ratios"]
    assert least * 0.93 <= counted <= (least + attention) * 1.03


def test_bytes_kept_are_those_of_the_plan():
    model = body()
    stack = random_stack(model)
    targets, batch = choose_targets(model, stack.names), random_batch()
    ranks = {name: sum(module.ranks) for name, module in stack.modules.items()}
    memory = Step(model, linears_in_order(model), ranks, targets, TASKS, 2 * TASKS, LENGTH, 4).memory()
    with nsc_step(model, stack, targets, [batch], MergeConfig()) as step:
        assert 0.97 <= memory.activations / kept_bytes(step, model) <= 1.25


@pytest.mark.parametrize("layers", ["factors", "weights"])
def test_every_op_of_a_step_is_seen(layers):
    """By its own name under the profiler, forward and backward; and no longer once it is over."""
    model = body()
    stack = random_stack(model)
    targets = choose_targets(model, stack.names)
    with nsc_step(model, stack, targets, [random_batch()], MergeConfig(layers=layers)) as step:
        with torch.profiler.profile() as traced:
            step()
        busy, seconds = profile_step(step, CPU, 2)
    names = {e.name for e in traced.events() if e.name.startswith("nsc::")}
    fold = {"nsc::lora_fold"} if layers == "weights" else {"nsc::lora_up"}  # whose gradient is that of lora_up
    backwards = {f"nsc::{op}_backward" for op in ("lora_down", "lora_up", "ratio_from_energy")}
    assert names == {"nsc::lora_down", "nsc::ratio_from_energy"} | fold | backwards
    assert set(busy) == set(PARTS) and all(part > 0 for part in busy.values()) and sum(busy.values()) <= seconds


def test_more_ranks_are_more_lora():
    busy = []
    for r in (2, 64):
        model = body()
        stack = random_stack(model, r=r)
        with nsc_step(model, stack, choose_targets(model, stack.names), [random_batch()], FACTORS) as step:
            step()
            busy.append(min(profile_step(step, CPU)[0]["lora"] for _ in range(5)))
    assert busy[1] > busy[0] > 0


@pytest.fixture(scope="module")
def profile(base, adapters, texts) -> Profile:
    some = ("plain", "rslora")
    return profile_merge(
        base, {t: adapters[t] for t in some}, {t: texts[t] for t in some}, steps=2, flops=1e12, layers="factors"
    )


def test_parts_add_up_to_the_step(profile):
    assert set(profile.parts) == {*PARTS, "host"}
    assert all(seconds > 0 for seconds in profile.parts.values())
    assert sum(profile.parts.values()) == pytest.approx(profile.split_of)


def test_a_profile_compares_with_its_floor_and_its_plan(profile):
    assert profile.over_floor == profile.step / profile.floor > 0
    assert profile.mfu == pytest.approx(profile.flops_predicted / profile.step / 1e12)
    assert 0.9 < profile.flops / profile.flops_predicted < 1.2
    assert 0.9 < profile.kept_predicted / profile.kept < 1.3
    assert profile.floor_predicted == pytest.approx(0.9 * profile.flops_predicted / 1e12, rel=0.2)
    assert profile.beyond is None and profile.peak > profile.weights > 0 and profile.notes == ()
    text = format_profile(profile)
    assert re.search(r"^floor .* measured by turns \(predicted .*s\); the step takes \d+\.\d{3} of it$", text, re.M)
    named = [line.split("  ")[1] for line in text.splitlines() if line.startswith("  ")]
    assert named == list(profile_module.NAMES.values())


def test_an_unknown_device_leaves_mfu_out_and_says_why():
    model = body()
    stack = random_stack(model)
    found = measure(
        Base("b", model),
        stack,
        choose_targets(model, stack.names),
        [random_batch()],
        MergeConfig(),
        1,
        find_hardware(CPU),
    )
    assert found.mfu is None and found.floor_predicted is None and found.flops > 0
    assert "give flops or hardware" in found.notes[0] and "MFU  " not in format_profile(found)


def test_a_body_without_a_plan_is_measured_all_the_same(monkeypatch):
    def refuse(_model):
        raise NSCError("no plan for experts")

    monkeypatch.setattr(profile_module, "linears_in_order", refuse)
    model = body()
    stack = random_stack(model)
    given = choose_targets(model, stack.names), [random_batch()], MergeConfig(), 1, find_hardware(CPU, None, 1e12)
    found = measure(Base("b", model), stack, *given)
    assert found.notes == ("no plan for experts",) and found.flops_predicted is found.kept_predicted is None
    assert found.mfu == pytest.approx(found.flops / found.step / 1e12)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA GH200 480GB", None),
    ],
)
def test_gpus_are_known_by_their_own_name_only(name, known, monkeypatch):
    assert known_gpu(name) == known
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: name)
    found = find_hardware(torch.device("cuda"))
    assert found == HARDWARE[known] if known else "no datasheet" in found


def test_a_rate_alone_bounds_by_flops_alone():
    assert find_hardware(CPU, None, 2e12).flops == 2e12 and find_hardware(CPU, None, 2e12).bandwidth == math.inf
    assert find_hardware(CPU, "cpu", 2e12).bandwidth == HARDWARE["cpu"].bandwidth


def test_memory_beyond_the_weights_on_a_gpu(monkeypatch):
    """With torch's counters faked: the peak of the steps, the weights taken off."""
    model = body()
    stack = random_stack(model)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    cuda = SimpleNamespace(type="cuda")
    log = []
    fakes = dict(
        reset_peak_memory_stats=lambda _: log.append("reset"),
        synchronize=lambda _: None,
        get_device_name=lambda _: "NVIDIA H100 80GB HBM3",
    )
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(profile_module, "input_device", lambda _model: cuda)
    monkeypatch.setattr(profile_module, "peak_memory", lambda _device: weights + 1000)
    monkeypatch.setattr(profile_module, "profile_step", lambda *_: (dict.fromkeys(PARTS, 1e-9), 1.0))
    found = measure(
        Base("b", model),
        stack,
        choose_targets(model, stack.names),
        [random_batch()],
        MergeConfig(),
        1,
        HARDWARE["H100"],
    )
    assert log == ["reset"] and found.beyond == 1000 and found.device.startswith("NVIDIA")
    assert found.split_of == found.step and sum(found.parts.values()) == pytest.approx(found.step)
    assert "beyond the base's weights" in format_profile(found)


def test_the_command(base, adapters, texts, tmp_path):
    file = tmp_path / "plain.txt"
    file.write_text("\n".join(texts["plain"]))
    given = ["profile", "--base", base, "--adapter", f"plain={adapters['plain']}", "--data", f"plain={file}"]
    shown = run(*given, "--steps-timed", 1, "--hardware", "cpu")
    assert shown.exit_code == 0 and "of 118 GFLOP/s" in shown.stdout and "note" not in shown.stdout
    read = json.loads(run(*given, "--steps-timed", 1, "--json").stdout)
    assert (
        read["steps"] == 1 and read["over_floor"] > 0 and sum(read["parts"].values()) == pytest.approx(read["split_of"])
    )
    assert "steps must be 1 or more" in refused(run(*given, "--steps-timed", 0))
    assert "hardware must be one of A100-80" in refused(run(*given, "--hardware", "TPU"))


def test_a_step_of_matching_is_profiled_over_a_floor_that_runs_to_the_end(base, adapters, texts):
    """The floor has the heads and their loss; FLOPs and what is kept are those of ``nsc plan`` for that objective."""
    of = {"a": adapters["plain"], "b": adapters["pattern"]}
    rows = {"a": texts["plain"], "b": texts["pattern"]}
    settings = dict(granularity="rank", max_drift=None, max_new_tokens=2, hardware="cpu", flops=1e9)
    matched = profile_merge(base, of, rows, steps=1, objective="match", **settings)
    usual = profile_merge(base, of, rows, steps=1, hardware="cpu", flops=1e9)
    assert matched.flops > usual.flops and matched.flops_predicted > 0.8 * matched.flops
    assert matched.floor > 0 and matched.kept > usual.kept
    with pytest.raises(NSCError, match="a profile is of learned coefficients"):
        profile_merge(base, of, rows, objective="entropy")
