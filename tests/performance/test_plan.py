"""The plan against what is counted in real steps, against known models, and its choices at their edges."""

import json
import re
from dataclasses import replace

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import stack_adapters, whitened
from nsc.adapters.surgery import merged_layers, set_coefficients
from nsc.batch import Batch
from nsc.errors import NSCError, TargetError
from nsc.learning.objective import Goal, NullSpaceObjective, OutputObjective
from nsc.performance.costs import Memory
from nsc.performance.hardware import get_hardware
from nsc.performance.launch import choose_launch
from nsc.performance.plan import Cluster, Plan, Workload, format_plan, plan_merge
from nsc_kernels.modules import extra_flops, layer_plan
from tests.cli.test_cli import refused, run
from tests.tiny import VISION, linears, random_factors, tiny_llama, tiny_llava, tiny_vit, write_adapter

TASKS, RANK, SAMPLES = ("a", "b"), 4, 3  # of each task
QV = ("q_proj", "v_proj", "query", "value")  # as transformers 5 and 4 name them
LLAMA_8B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
LLAMA_405B = dict(hidden_size=16384, intermediate_size=53248, num_hidden_layers=126, num_attention_heads=128)


def plan_of(base, adapters=None, **settings) -> Plan:
    """``plan_merge`` with the fields of Workload and Cluster as arguments."""
    if "hardware" in settings and isinstance(settings["hardware"], str):
        settings["hardware"] = get_hardware(settings["hardware"])
    cluster = {key: settings.pop(key) for key in ("hardware", "gpus", "nodes") if key in settings}
    return plan_merge(base, adapters, Workload(**settings), Cluster(**cluster))


def llama(**sizes) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**({"num_key_value_heads": 8, "vocab_size": 128256} | sizes))


class Counted:
    """One step of nsc's own objective with random adapters: FLOPs of every torch product, bytes saved by autograd."""

    def __init__(self, model, kinds, targets, inputs, tokens, folder, whole=False):
        model = model.requires_grad_(False).eval()
        names = [name for name in linears(model) if name.endswith(tuple(kinds))]
        stack = self._stack(linears(model), names, folder)
        rows = len(TASKS) * SAMPLES
        task = torch.arange(rows)[:, None].expand(-1, tokens) % len(TASKS)
        batch = Batch(inputs, task.contiguous(), torch.full(task.shape, 1 / (SAMPLES * tokens)))
        lam = torch.full((len(names), len(TASKS)), 0.4, requires_grad=True)
        with merged_layers(model, stack, lam.detach()) as layers:
            frozen = [*model.parameters(), *model.buffers()]
            self._known = {x.untyped_storage().data_ptr() for x in frozen}
            self._saved = {}
            objective = NullSpaceObjective(model, layers, stack, targets)
            if whole:
                output = Goal(output=lambda states, batch, preferences: states.square().mean())
                objective = OutputObjective(model, layers, TASKS, output)
            set_coefficients(layers, lam)
            with FlopCounterMode(display=False) as forward:
                loss = objective.loss(batch)
            with FlopCounterMode(display=False) as backward:
                loss.backward()
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda x: x):
                self.loss = objective.loss(batch)
        self.forward, self.backward = (mode.get_flop_counts()["Global"] for mode in (forward, backward))
        assert lam.grad.abs().max() > 0

    @property
    def saved(self) -> int:
        """Bytes, weights and factors left out."""
        return sum(storage.nbytes() for storage in self._saved.values())

    @staticmethod
    def of(counts, *names: str) -> int:
        """FLOPs of these operators of aten."""
        return sum(flops for op, flops in counts.items() if str(op).removeprefix("aten.") in names)

    def _pack(self, x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._saved[storage.data_ptr()] = storage
        return x

    @staticmethod
    def _stack(shapes, names, folder):
        adapters = {}
        for seed, task in enumerate(TASKS):
            factors = {}
            for name in names:
                m, d = shapes[name]
                factors |= random_factors([name], r=RANK, d=d, m=m, seed=seed)
            adapters[task] = read_adapter(write_adapter(folder / task, factors, r=RANK), task)
        return whitened(stack_adapters(adapters, {t: {n: n for n in names} for t in TASKS}, shapes))


SIZES = dict(hidden_size=64, intermediate_size=160, num_hidden_layers=4)
CASES = {  # make the model, its tokens, where LoRA is, what is measured
    "llama, q and v": (tiny_llama, 24, QV, ("v_proj",)),
    "llama, first at o": (tiny_llama, 24, ("o_proj",), None),
    "llama, last at down": (tiny_llama, 24, ("q_proj", "down_proj"), ("q_proj", "down_proj")),
    "llama, last at up": (tiny_llama, 24, ("k_proj", "up_proj"), ("up_proj",)),
    "vit, q and v": (tiny_vit, 5, QV, None),
    "vit, first at fc1": (tiny_vit, 5, ("fc1", "intermediate.dense"), None),
    "llama, to its end": (tiny_llama, 24, QV, None, "match"),
}


@pytest.fixture(params=CASES)
def case(request, tmp_path):
    """Counts a real step with a kind of attention: (what was counted, the plan of the same step)."""

    def count(attention: str):
        make, tokens, kinds, targets, *objective = CASES[request.param]
        model = make(**SIZES, attn_implementation=attention)
        torch.manual_seed(0)
        rows = len(TASKS) * SAMPLES
        inputs = {"input_ids": torch.randint(3, 60, (rows, tokens))}
        if make is tiny_vit:
            inputs = {"pixel_values": torch.randn(rows, 3, VISION["image_size"], VISION["image_size"])}
        chosen = dict(tasks=len(TASKS), rank=RANK, lora_modules=kinds, batch_size=SAMPLES, max_length=tokens)
        chosen |= {"objective": objective[0]} if objective else {}
        plan = plan_of(model.config, **chosen, target_modules=targets, dtype="float32")
        assert plan.tokens == tokens
        return Counted(model, kinds, plan.targets, inputs, tokens, tmp_path, bool(objective)), plan

    return count


def work(plan) -> dict[str, float]:
    return {part.part: part.flops for part in plan.work}


def test_flops_of_the_base_are_those_of_a_real_step(case):
    counted, plan = case("sdpa")
    linear = ("mm", "addmm", "convolution")
    spread = 2 * len(TASKS) * len(TASKS) * RANK * sum(kind.modules for kind in plan.layers)  # c = lam @ spread
    forward, backward = work(plan)["base, forward"], work(plan)["base, backward"]
    assert 0 <= counted.of(counted.forward, *linear) - forward <= spread
    assert 0 <= counted.of(counted.backward, *linear) - backward <= spread
    assert backward > 100 * spread


def test_flops_of_attention_are_those_of_a_real_step(case):
    """Eager attention computes all pairs, causal or not; in the first block it may leave out dk and dv."""
    counted, plan = case("eager")
    bmm = counted.of(counted.forward, "bmm") + counted.of(counted.backward, "bmm")
    rows = plan.samples * plan.tokens
    product = 2 * rows * plan.tokens * SIZES["hidden_size"]
    planned = work(plan)["attention"] / ((plan.tokens + 1) / 2 / plan.tokens if plan.base == "llama" else 1)
    assert -0.01 <= (planned - bmm) / product <= 2.01


def test_what_is_kept_for_the_backward_is_that_of_a_real_step(case):
    counted, plan = case("sdpa")
    assert 0.97 <= plan.memory.activations / counted.saved <= 1.25  # the first block is counted whole


@pytest.mark.parametrize(
    ("config", "head", "whole", "linear"),
    [
        (llama(**LLAMA_8B), 128256 * 4096, 8_030_261_248, 32 * (2 * 4096 * 5120 + 3 * 4096 * 14336)),
        (llama(**LLAMA_405B), 128256 * 16384, 405_853_388_800, 126 * (2 * 16384 * 17408 + 3 * 16384 * 53248)),
        (transformers.ViTConfig(), 0, 86_389_248, 12 * (4 * 768**2 + 2 * 768 * 3072)),
    ],
    ids=["LLaMA-3-8B", "LLaMA-3-405B", "ViT-B/16"],
)
def test_parameters_of_known_models(config, head, whole, linear):
    plan = plan_of(config, dtype="bfloat16", lora_modules=QV)
    assert plan.parameters + head == whole
    assert plan.memory.weights == 2 * plan.parameters and plan.memory.linears == 2 * linear


def test_the_floor_is_four_flops_a_parameter_and_token_or_the_weights_read_twice():
    large = plan_of(llama(**LLAMA_8B), tasks=6, dtype="bfloat16", hardware="H100")
    assert large.floor == pytest.approx(4 * 6.98e9 * 6 * 2 * 512 / 989e12, rel=0.04)
    small = plan_of(llama(**LLAMA_8B), tasks=1, batch_size=1, max_length=1, dtype="bfloat16", hardware="H100")
    assert small.floor == pytest.approx(2 * 2 * 6.98e9 / 3.35e12, rel=0.04)
    assert large.floor < large.step < 1.1 * large.floor and large.to_dict()["run"] == 500 * large.step


def test_a_step_ends_at_the_last_target_and_turns_back_at_the_first_lora():
    first, last = (plan_of(llama(**LLAMA_8B), target_blocks=[block], target_modules=["q_proj"]) for block in (8, 16))
    block = 2 * first.samples * first.tokens * (2 * 4096 * 5120 + 3 * 4096 * 14336)
    assert work(first)["base, forward"] == 8 * block and work(last)["base, forward"] == 16 * block
    qkv = 2 * first.samples * first.tokens * 4096 * (4096 + 2 * 1024)
    assert work(first)["base, backward"] == 8 * block - qkv


@pytest.mark.parametrize("d", [64, 768, 4096])
def test_factors_below_a_tenth_of_the_width_weights_above(d):
    n = 10**9
    assert [layer_plan(n, d, d, R) for R in (1, d // 10 - 1, d // 10 + 1, d)] == ["factors"] * 2 + ["weights"] * 2
    assert extra_flops("factors", n, d, d, 3) == 8 * n * 3 * d
    assert layer_plan(1, d, d, d) == "factors"  # folding costs more than it saves


def test_plans_of_the_issue_and_their_override():
    wide, narrow = llama(**LLAMA_8B), transformers.ViTConfig()
    kinds = dict(lora_modules=QV, batch_size=16)
    assert {kind.plan for kind in plan_of(wide, tasks=6, **kinds).layers} == {"factors"}
    plans = {way: plan_of(narrow, tasks=20, layers=way, **kinds) for way in ("auto", "factors", "weights")}
    assert {kind.plan for kind in plans["auto"].layers} == {"weights"}
    assert {kind.plan for kind in plans["factors"].layers} == {"factors"}
    assert plans["auto"].step == plans["weights"].step < plans["factors"].step


MEMORY = Memory(
    weights=100, factors=1, coefficients=1, activations=36, checkpointed=8, workspace=4, samples=4, linears=96, block=5
)  # a sample is 10


@pytest.mark.parametrize(
    ("room", "gpus", "nodes", "way", "devices", "passes"),
    [
        (142, 1, 1, "single", 1, 1),
        (141, 1, 1, "single", 1, 2),
        (112, 1, 1, "single", 1, 4),
        (112, 2, 1, "replicas", 2, 2),
        (142, 2, 8, "replicas", 4, 1),
        (122, 3, 1, "replicas", 2, 1),
        (111, 1, 1, "8-bit", 1, 1),
        (64, 1, 1, "8-bit", 1, 4),
        (63, 1, 1, "sharded", 3, 1),
        (72, 2, 1, "sharded", 2, 2),
        (22, 1, 1, "sharded", 96, 1),
        (21, 1, 1, "none", 1, 0),
    ],
)
def test_the_launch_at_its_edges(room, gpus, nodes, way, devices, passes):
    launch = choose_launch(MEMORY, room, gpus, nodes, itemsize=2)
    assert (launch.way, launch.devices, launch.passes) == (way, devices, passes)
    if way == "sharded" and devices > gpus * nodes:
        assert MEMORY.sharded(devices).samples_within(room) and not MEMORY.sharded(devices - 1).samples_within(room)
    torchrun = f"--nproc_per_node {gpus} -m nsc merge ..."
    one = {"single": "nsc merge ...", "8-bit": "nsc merge ... --weights int8", "none": None}
    if way in one:
        assert launch.command == one[way]
    else:
        assert launch.command.endswith(torchrun if way == "replicas" else f"{torchrun} --shard")
        assert ("--nnodes" in launch.command) == (nodes > 1 or devices > gpus)


def test_the_largest_model_on_many_nodes():
    plan = plan_of(llama(**LLAMA_405B), tasks=6, dtype="bfloat16", gpus=8, nodes=8)
    assert not plan.fits and (plan.launch.way, plan.launch.devices) == ("sharded", 64)
    fewer = plan_of(llama(**LLAMA_405B), tasks=6, dtype="bfloat16", gpus=8, nodes=4)
    assert fewer.launch.devices > 32 and f"takes {fewer.launch.devices} devices at least" in fewer.launch.why


@pytest.mark.parametrize("length", [96, 512])
def test_a_70b_model_fits_one_gpu_of_141_gb_in_8_bits_only(length):
    sizes = dict(tasks=6, rank=16, batch_size=2, max_length=length, dtype="bfloat16", hardware="H200")
    plan = plan_of(llama(**LLAMA_70B), **sizes)
    assert plan.parameters == 70_553_706_496 - 128256 * 8192 and not plan.fits
    assert (plan.launch.way, plan.launch.devices) == ("8-bit", 1) and plan.launch.passes == (1 if length == 96 else 3)
    assert plan.launch.command == "nsc merge ... --weights int8"
    eight = plan.memory.in_8_bits(2)
    assert 69e9 < eight.weights < 72e9 and eight.samples_within(0.9 * 141e9) >= 12 // plan.launch.passes


def test_devices_share_rows_but_each_reads_the_weights():
    one, four = (plan_of(llama(**LLAMA_8B), tasks=4, dtype="bfloat16", gpus=gpus) for gpus in (1, 4))
    assert four.floor == pytest.approx(one.floor / 4) and work(four) == work(one)
    slow = replace(get_hardware("H100"), bandwidth=1e9)
    bound = [plan_of(llama(**LLAMA_8B), dtype="bfloat16", gpus=gpus, hardware=slow).floor for gpus in (1, 4)]
    assert bound[0] == bound[1]


def test_an_image_is_patches_and_a_class_token_and_llava_adds_them_to_the_text():
    assert plan_of(transformers.ViTConfig(), lora_modules=QV).tokens == 14 * 14 + 1
    config = tiny_llava().config
    plan = plan_of(config, max_length=100)
    assert plan.tokens == 100 + 576 and "no image tower" in plan.notes[0]
    assert plan.targets[-1] == "layers.3.self_attn.v_proj"


def test_adapters_are_read_as_nsc_merge_reads_them(base, adapters):
    plan = plan_of(base, {task: adapters[task] for task in ("plain", "rslora", "pattern")})
    ranks = {kind.kind: {(k.R, k.modules) for k in plan.layers if k.kind == kind.kind} for kind in plan.layers}
    # plain and rslora have rank 4; pattern 4, but 2 on q_proj and 6 on the v_proj of block 1
    assert ranks == {"q_proj": {(6, 4)}, "v_proj": {(12, 3), (14, 1)}, "k_proj": {(4, 4)}, "down_proj": {(4, 4)}}
    assert plan.dtype == "float32" and plan.tasks == 3
    with pytest.raises(NSCError, match="Wrong base"):
        plan_of(llama(**LLAMA_8B, num_key_value_heads=4), {"plain": adapters["plain"]})


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (transformers.T5Config(), "no plan for t5: it is more than one body"),
        (transformers.GPT2Config(), "GPT-2's Conv1D"),
        (transformers.MixtralConfig(num_hidden_layers=1, num_local_experts=2), "experts"),
        (transformers.CLIPConfig(), "no plan for clip: it is more than one body"),
    ],
    ids=lambda c: getattr(c, "model_type", ""),
)
def test_other_architectures_are_refused_by_name(config, said):
    with pytest.raises(NSCError, match=re.escape(said)):
        plan_of(config)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (dict(hardware="TPU"), "hardware must be one of A100-80, H100, H200, B200, MI300X, cpu, not TPU"),
        (dict(layers="both"), "layers must be one of auto, factors, weights, not both"),
        (dict(dtype="int8"), "dtype must be one of bfloat16, float16, float32, float64, not int8"),
        (dict(tasks=0), "tasks must be more than 0"),
        (dict(lora_modules=["qq"]), "lora_modules qq match no linear"),
        (dict(base="/nowhere"), "base '/nowhere' cannot be loaded"),
        (dict(target_blocks=[99]), "no target layer"),
    ],
    ids=str,
)
def test_refusals_name_argument_and_remedy(wrong, said):
    arguments = {"base": tiny_llama().config} | wrong
    with pytest.raises((NSCError, TargetError), match=re.escape(said)):
        plan_of(**arguments)


def test_the_command(base, adapters):
    shown = run("plan", "--base", base, "--tasks", 6, "--lora-module", "v_proj", "--hardware", "cpu", "--gpus", 2)
    assert shown.exit_code == 0 and shown.stdout.startswith("Predicted from shapes: nothing was run.")
    assert "torchrun --nproc_per_node 2 -m nsc merge" in shown.stdout
    assert re.search(r"v_proj +4 +\(16, 32\) +96 +weights", shown.stdout)
    given = ["--adapter", f"plain={adapters['plain']}", "--flops", 1e12, "--bandwidth", 1e11, "--memory", 1e9]
    read = json.loads(run("plan", "--base", base, *given, "--json").stdout)
    assert read["tasks"] == 1 and read["hardware"] == dict(flops=1e12, flops_float32=1e12, bandwidth=1e11, memory=1e9)
    base_flops = sum(part["flops"] for part in read["work"][:2])
    assert read["floor"] == pytest.approx(base_flops / 1e12) and read["fits"] and read["launch"]["way"] == "single"
    assert "flops must be more than 0" in refused(run("plan", "--base", base, "--flops", 0))


def test_figures_for_people_carry_their_prefix():
    text = format_plan(plan_of(llama(**LLAMA_8B), tasks=6, dtype="bfloat16"))
    assert "7.5 G parameters, bfloat16" in text and re.search(r"^floor +168 ms +84 s$", text, re.MULTILINE)
    assert re.search(r"^weights +15 GB$", text, re.MULTILINE)
