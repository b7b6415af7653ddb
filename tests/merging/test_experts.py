"""LoRA on experts: as PEFT puts it on parameters, and per expert as transformers 4 named them; the oracle is dense."""

import itertools
import json
import re
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import nsc
from nsc.adapters.lora import read_adapter
from nsc.adapters.matching import match_to_base
from nsc.adapters.surgery import merged_layers, set_coefficients
from nsc.adapters.target_parameters import packed, unpacked, wrapped_parameters
from nsc.bases.base_model import Base
from nsc.bases.experts import fused_experts, layer_shapes
from nsc.errors import AdapterError, NameMismatch, NSCError, UnsupportedAdapter
from nsc.export.served import serving
from nsc.methods import METHODS
from tests.export.test_quantized_bases import fp8
from tests.tiny import save_tokenizer, write_adapter

pytestmark = pytest.mark.skipif(transformers.__version__.startswith("4."), reason="experts are fused in transformers 5")

TEXT = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
TEXT |= dict(vocab_size=64, max_position_embeddings=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
TEXT |= dict(initializer_range=0.2)
DEEPSEEK = dict(n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1)
DEEPSEEK |= dict(first_k_dense_replace=1, kv_lora_rank=8, q_lora_rank=8, n_group=1, topk_group=1)
DEEPSEEK |= dict(qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
QWEN = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
JET = {key: TEXT[key] for key in TEXT if key not in ("num_attention_heads", "max_position_embeddings")}
FAMILIES = {  # config, its settings, what PEFT targets
    "qwen2-moe": ("Qwen2MoeConfig", QWEN | dict(shared_expert_intermediate_size=12), "mlp.experts"),
    "qwen3-moe": ("Qwen3MoeConfig", QWEN | dict(head_dim=8), "mlp.experts"),
    "mixtral": ("MixtralConfig", dict(num_local_experts=4), "mlp.experts"),
    "olmoe": ("OlmoeConfig", dict(num_experts=4, num_experts_per_tok=2), "mlp.experts"),
    "deepseek-v3": ("DeepseekV3Config", DEEPSEEK, "mlp.experts"),
    "gpt-oss": ("GptOssConfig", dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8), "mlp.experts"),
    "granite-moe": ("GraniteMoeConfig", dict(num_local_experts=4, num_experts_per_tok=2), "experts"),
    "llama4": (
        "Llama4TextConfig",
        dict(intermediate_size_mlp=20, num_local_experts=4, head_dim=8, interleave_moe_layer_step=1),
        "feed_forward.experts",
    ),
}
IDS = torch.arange(4, 28).view(2, 12)
SUM = dict(method="task-arithmetic", scale=0.5, progress=False)


def config_of(family: str, **more) -> transformers.PretrainedConfig:
    name, settings, _ = FAMILIES[family]
    return getattr(transformers, name)(**(TEXT | settings | more))


def save_moe(path, config, **saving) -> None:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path, **saving)
    save_tokenizer(path)


def causal(place) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(place).eval()


def trained(path, base, seed: int, **lora) -> torch.nn.Module:
    """An adapter of PEFT's own on a base, with random factors; returns what stock PEFT makes of the base by it."""
    torch.manual_seed(seed)
    model = peft.get_peft_model(causal(base), peft.LoraConfig(lora_alpha=6, **lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    return model.merge_and_unload()


def parameters(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().double() for name, p in model.named_parameters()}


def summed(base, experts, scale: float = 0.5) -> dict[str, Tensor]:
    """Every parameter of base + scale * sum of what the experts add to it, float64."""
    bare = parameters(causal(base))
    return {name: w + scale * sum(parameters(e)[name] - w for e in experts) for name, w in bare.items()}


def assert_merged(base, out, full, expected: dict[str, Tensor]) -> None:
    """Stock PEFT with the adapter, and transformers with the full model, are the dense merge: in weights and logits."""
    dense = causal(base)
    for name, parameter in dense.named_parameters():
        parameter.data = expected[name].float()
    loaded = peft.PeftModel.from_pretrained(causal(base), out).eval()
    with torch.no_grad():
        want, got = dense(IDS).logits, [loaded(IDS).logits, causal(full)(IDS).logits]
    for logits in got:
        assert (logits - want).abs().max() <= 1e-5 * want.abs().max()
    for model in (loaded.merge_and_unload(), causal(full)):
        for name, parameter in parameters(model).items():
            assert (parameter - expected[name]).abs().max() <= 1e-6 * expected[name].abs().max(), name


def keys_of(folder) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A Qwen3-MoE with twelve experts, so that 10 and 11 come between 1 and 2 as strings."""
    folder = tmp_path_factory.mktemp("qwen") / "base"
    save_moe(folder, config_of("qwen3-moe", num_experts=12))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_lora_on_parameters_of_every_layout(family, tmp_path):
    base, holder = tmp_path / "base", FAMILIES[family][2]
    save_moe(base, config_of(family))
    both = [f"{holder}.gate_up_proj", f"{holder}.down_proj"]
    router = "router.weight" if family in ("gpt-oss", "granite-moe", "llama4") else "mlp.gate.weight"
    experts = [
        trained(tmp_path / "a", base, 1, r=2, target_modules=["o_proj"], target_parameters=both),
        trained(
            tmp_path / "b",
            base,
            2,
            r=3,
            target_modules=["o_proj"],
            target_parameters=[both[1], router],
            use_rslora=True,
        ),
        trained(
            tmp_path / "c",
            base,
            3,
            r=2,
            target_modules=[],
            target_parameters=both,
            rank_pattern={r"1\..*gate_up_proj": 4},
            alpha_pattern={"down_proj": 1},
        ),
    ]
    result = nsc.merge(base, {task: tmp_path / task for task in "abc"}, **SUM)
    result.save(tmp_path / "out")
    nsc.apply(tmp_path / "out").save(tmp_path / "full", full=True)
    assert keys_of(tmp_path / "full") == keys_of(base)
    assert_merged(base, tmp_path / "out", tmp_path / "full", summed(base, experts))
    nsc.apply(tmp_path / "out").save(tmp_path / "again")
    first, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[key], again[key]) for key in first)


def old_adapter(path, seed: int, experts: int = 12):
    """As transformers 4 trained them: ranks and alphas by pattern; expert 7 of block 0 and one up are not there."""
    generator, factors = torch.Generator().manual_seed(seed), {}
    config = dict(r=2, alpha=4, rank_pattern={r"experts\.1\d\.gate_proj": 3}, alpha_pattern={"up_proj": 10})
    for block in range(2):
        for e in range(experts):
            for name, (m, d) in {"gate_proj": (12, 16), "up_proj": (12, 16), "down_proj": (16, 12)}.items():
                if (block, e) == (0, 7) or (block, e, name) == (1, 3, "up_proj"):
                    continue
                rank = 3 if name == "gate_proj" and e >= 10 else 2
                pair = torch.randn(rank, d, generator=generator), torch.randn(m, rank, generator=generator) / 4
                factors[f"model.layers.{block}.mlp.experts.{e}.{name}"] = pair
    return write_adapter(path, factors, **config, target_modules=["gate_proj", "up_proj", "down_proj"]), factors


def old_updates(factors) -> dict[str, Tensor]:
    """Of each fused parameter, by this file's own reading: (12, out, in), gate above up."""
    found = {}
    for name, (A, B) in factors.items():
        block, e, kind = re.fullmatch(r"model\.layers\.(\d)\.mlp\.experts\.(\d+)\.(\w+)", name).groups()
        update = (10 if kind == "up_proj" else 4) / len(A) * (B.double() @ A.double())
        down, rows = (
            kind == "down_proj",
            slice(12, 24) if kind == "up_proj" else slice(0, 12 if kind != "down_proj" else 16),
        )
        key = f"model.layers.{block}.mlp.experts.{'down_proj' if down else 'gate_up_proj'}"
        found.setdefault(key, torch.zeros(12, *((16, 12) if down else (24, 16)), dtype=torch.float64))[int(e)][
            rows
        ] += update
    return found


def test_experts_of_transformers_4_beside_fused_ones(qwen, tmp_path):
    folder, factors = old_adapter(tmp_path / "old", 1)
    new = trained(
        tmp_path / "new", qwen, 2, r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"]
    )
    expected = summed(qwen, [new])
    for name, update in old_updates(factors).items():
        expected[name] += 0.5 * update
    result = nsc.merge(qwen, {"old": folder, "new": tmp_path / "new"}, **SUM)
    result.save(tmp_path / "out")
    result.save(tmp_path / "full", full=True)
    assert "model.layers.0.mlp.experts.11.up_proj.weight" in keys_of(tmp_path / "full")
    assert_merged(qwen, tmp_path / "out", tmp_path / "full", expected)
    absent = load_file(tmp_path / "out/adapter_model.safetensors")[
        "base_model.model.model.layers.0.mlp.experts.lora_B.weight"
    ]
    assert not absent[:, 7::12].any() and absent[:, 8::12].any()
    assert len(result.modules) == 2 + 2 * 12 + 24 - 1  # q_proj; gate_up of the new one; down without one expert


def test_a_base_whose_files_are_fused_is_written_fused(qwen, tmp_path):
    folder, factors = old_adapter(tmp_path / "old", 1)
    model = causal(qwen)
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    assert "model.layers.0.mlp.experts.gate_up_proj" in keys_of(tmp_path / "fused")
    result = nsc.merge(tmp_path / "fused", {"old": folder}, **SUM)
    result.save(tmp_path / "out")
    result.save(tmp_path / "full", full=True)
    assert keys_of(tmp_path / "full") == keys_of(tmp_path / "fused")
    expected = summed(qwen, [])
    for name, update in old_updates(factors).items():
        expected[name] = expected[name] + 0.5 * update
    assert_merged(tmp_path / "fused", tmp_path / "out", tmp_path / "full", expected)


def test_experts_in_fp8_are_merged_as_the_numbers_that_they_stand_for(qwen, tmp_path):
    folder, factors = old_adapter(tmp_path / "old", 1)
    base, numbers = fp8(qwen, tmp_path / "fp8", "a scale a block")
    nsc.merge(base, {"old": folder}, **SUM).save(tmp_path / "full", full=True)
    tensors = load_file(tmp_path / "full/model.safetensors")
    assert tensors.keys() == numbers.keys()
    for key, update in old_updates(factors).items():
        holder, _, kind = key.rpartition(".")
        parts = (
            {"down_proj": slice(0, 16)}
            if kind == "down_proj"
            else {"gate_proj": slice(0, 12), "up_proj": slice(12, 24)}
        )
        for e, (name, rows) in itertools.product(range(12), parts.items()):
            numbers[f"{holder}.{e}.{name}.weight"] += 0.5 * update[e][rows]
    for key, expected in numbers.items():
        assert (tensors[key].double() - expected).abs().max() <= 1e-6 * expected.abs().max(), key


def test_old_mixtral_with_its_router_is_what_stock_peft_makes_of_it(tmp_path):
    base, generator, factors = tmp_path / "base", torch.Generator().manual_seed(0), {}
    save_moe(base, config_of("mixtral"))
    names = {f"experts.{e}.{w}": (16, 24) if w == "w2" else (24, 16) for e in range(4) for w in ("w1", "w2", "w3")}
    for block in range(2):
        for name, (m, d) in (names | {"gate": (4, 16)}).items():
            pair = torch.randn(2, d, generator=generator), torch.randn(m, 2, generator=generator) / 4
            factors[f"model.layers.{block}.block_sparse_moe.{name}"] = pair
    folder = write_adapter(tmp_path / "old", factors, r=2, alpha=4, target_modules=["w1", "w2", "w3", "gate"])
    expert = peft.PeftModel.from_pretrained(causal(base), folder).merge_and_unload()
    peft.PeftModel.from_pretrained(causal(base), folder).save_pretrained(tmp_path / "new")  # in names of today
    stacks = [match_to_base(Base(str(base)), {"a": read_adapter(f)}).stack for f in (folder, tmp_path / "new")]
    for name, module in stacks[0].modules.items():
        torch.testing.assert_close(stacks[1].modules[name].delta(torch.ones(1)), module.delta(torch.ones(1)))
    result = nsc.merge(base, {"old": folder}, **SUM)
    assert "layers.0.mlp.gate" in result.modules
    result.save(tmp_path / "out")
    result.save(tmp_path / "full", full=True)
    assert_merged(base, tmp_path / "out", tmp_path / "full", summed(base, [expert]))


def test_all_linear_and_shared_experts_reach_stock_peft(tmp_path):
    """PEFT takes gate_proj of a shared expert for an expert's, and drops it, unless it is targeted as a parameter."""
    base = tmp_path / "base"
    save_moe(base, config_of("deepseek-v3"))
    shared = [f"shared_experts.{name}.weight" for name in ("gate_proj", "down_proj")]
    targets = [*shared, "layers.0.mlp.down_proj.weight", "mlp.gate.weight", "mlp.experts.down_proj"]
    experts = [
        trained(tmp_path / "a", base, 1, r=2, target_modules="all-linear"),
        trained(tmp_path / "b", base, 2, r=3, target_modules=["o_proj"], target_parameters=targets),
    ]
    result = nsc.merge(base, {task: tmp_path / task for task in "ab"}, **SUM)
    assert {"layers.1.mlp.gate", "layers.0.mlp.down_proj", "layers.1.mlp.shared_experts.gate_proj"} <= set(
        result.modules
    )
    result.save(tmp_path / "out")
    result.save(tmp_path / "full", full=True)
    assert_merged(base, tmp_path / "out", tmp_path / "full", summed(base, experts))


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if not method.inputs])
def test_every_method_without_data_merges_experts(qwen, tmp_path_factory, method):
    folder = tmp_path_factory.getbasetemp() / "for-methods"
    if not folder.exists():
        for seed in (1, 2):
            old_adapter(folder / f"task{seed}", seed)
    result = nsc.merge(qwen, {f"task{seed}": folder / f"task{seed}" for seed in (1, 2)}, method=method, progress=False)
    merged, out = result.merged, tmp_path_factory.mktemp("out") / "out"
    result.save(out, rank=2)
    assert all(torch.isfinite(nsc_dense(merged.update(name))).all() for name in merged.names)
    back = match_to_base(Base(str(qwen)), {"out": read_adapter(out)}).stack.modules
    for name in ("layers.0.mlp.experts.gate_up_proj[10]", "layers.1.mlp.experts.down_proj[2]"):
        update = nsc_dense(merged.update(name))
        lost = torch.linalg.svdvals(update)[2:].norm()
        distance = (back[name].delta(torch.ones(1)) - update).norm()
        assert (distance - lost).abs() <= 1e-5 * update.norm()


def nsc_dense(update) -> Tensor:
    return update.double() if isinstance(update, Tensor) else update.B.double() @ update.A.double()


def test_dense_merges_in_half_precision_are_proven_to_the_last_bit(tmp_path):
    """Whatever is rounded otherwise makes a router choose other experts for some token."""
    base = tmp_path / "base"
    save_moe(base, config_of("gpt-oss", dtype="bfloat16"))
    assert causal(base).dtype == torch.bfloat16
    for seed, task in enumerate("ab"):
        trained(tmp_path / task, base, seed, r=2, target_modules=["q_proj"], target_parameters=["experts.gate_up_proj"])
    adapters = {task: tmp_path / task for task in "ab"}
    proof = nsc.merge(base, adapters, method="ties", progress=False).save(tmp_path / "full", full=True)
    assert proof.outputs == 0 and proof.effect > 1e-3
    proof = nsc.merge(base, adapters, **SUM).save(tmp_path / "out")
    assert proof.outputs < 1e-5 and proof.effect > 1e-3


@pytest.mark.parametrize("search", ["match", "null-space"])
def test_the_scale_of_experts_is_searched(qwen, tmp_path, search):
    rows = {task: [f"word{i} word{i + 1} word{3 * i}" for i in range(6)] for task in "ab"}
    for seed, task in enumerate("ab"):
        targets = dict(target_modules=["v_proj"], target_parameters=["mlp.experts.down_proj"])
        trained(tmp_path / task, qwen, seed, r=2, **targets)
    adapters = {task: tmp_path / task for task in "ab"}
    result = nsc.merge(qwen, adapters, rows, method="task-arithmetic", search=search, progress=False)
    curve = result.report.searched["curve"]
    assert len(set(curve.values())) > 1 and result.report.searched["best"] == min(curve, key=curve.get)


def test_adapters_of_attention_alone_are_learned(qwen, tmp_path):
    rows = {task: [f"word{i} word{i + 1} word{3 * i}" for i in range(4)] for task in "ab"}
    for seed, task in enumerate("ab"):
        trained(tmp_path / task, qwen, seed, r=2, target_modules=["q_proj", "v_proj"])
    result = nsc.merge(qwen, {task: tmp_path / task for task in "ab"}, rows, steps=2, progress=False)
    assert result.report.targets == ["layers.1.self_attn.v_proj"]
    result.save(tmp_path / "out")


def test_packing_is_the_inverse_of_unpacking_and_pads_ranks():
    generator = torch.Generator().manual_seed(0)
    ranks = [2, 0, 3, 1]
    pairs = [(torch.randn(r, 5, generator=generator), torch.randn(4, r, generator=generator)) for r in ranks]
    A, B, rank = packed(pairs)
    assert (A.shape, B.shape, rank) == ((12, 5), (4, 12), 3)
    for (a, b), (a0, b0) in zip(unpacked(A, B, rank), pairs, strict=True):
        torch.testing.assert_close(b @ a, b0 @ a0)
        assert torch.equal(a[: len(a0)], a0) and torch.equal(b[:, : len(a0)], b0)


def test_which_parameter_a_wrapper_is_on():
    held = "model.layers.0.mlp.experts"
    config = {"target_parameters": ["down_proj", "gate_up_proj", "gate.weight"], "target_modules": ["q_proj"]}
    modules = [held, f"{held}.base_layer", "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.gate"]
    assert wrapped_parameters(config, modules) == {
        f"{held}.base_layer": f"{held}.gate_up_proj",
        held: f"{held}.down_proj",
        "model.layers.0.mlp.gate": "model.layers.0.mlp.gate.weight",
    }
    with pytest.raises(ValueError, match=r"names gate_up_proj, down_proj of .* which has 1 pairs"):
        wrapped_parameters({"target_parameters": ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]}, [held])


def turned(path, folder):
    """The same adapter as PEFT before 0.19 laid it out: A over the outputs, B over the inputs."""
    shutil.copytree(folder, path)
    tensors, config = (
        load_file(path / "adapter_model.safetensors"),
        json.loads((path / "adapter_config.json").read_text()),
    )
    for key in [key for key in tensors if "experts" in key and "lora_A" in key]:
        other = key.replace("lora_A", "lora_B")
        pairs = unpacked(tensors[key], tensors[other], config["r"])
        tensors[key], tensors[other], _ = packed([(b.mT, a.mT) for a, b in pairs])
    from safetensors.torch import save_file

    save_file({key: x.contiguous() for key, x in tensors.items()}, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps(config | {"peft_version": "0.18.1"}))
    return path


def test_the_layout_of_older_peft_is_known_by_its_shapes(qwen, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(tmp_path / "new", qwen, 1, r=2, target_modules=[], target_parameters=names)
    stacks = [
        match_to_base(Base(str(qwen)), {"a": read_adapter(folder)}).stack.modules
        for folder in (tmp_path / "new", turned(tmp_path / "old", tmp_path / "new"))
    ]
    for name, module in stacks[0].items():
        torch.testing.assert_close(stacks[1][name].delta(torch.ones(1)), module.delta(torch.ones(1)))


def test_square_matrices_of_older_peft_are_told_by_others_or_refused(tmp_path):
    base = tmp_path / "base"
    save_moe(base, config_of("qwen3-moe", moe_intermediate_size=8))  # gate_up_proj[e] is (16, 16), down_proj[e] (16, 8)
    for targets, name in ((["gate_up_proj", "down_proj"], "both"), (["gate_up_proj"], "alone")):
        full = [f"mlp.experts.{target}" for target in targets]
        trained(tmp_path / name, base, 1, r=2, target_modules=[], target_parameters=full)
        turned(tmp_path / f"old-{name}", tmp_path / name)
    read = {name: read_adapter(tmp_path / name) for name in ("both", "old-both", "alone", "old-alone")}
    stacks = {n: match_to_base(Base(str(base)), {"a": read[n]}).stack.modules for n in ("both", "old-both", "alone")}
    name = "layers.0.mlp.experts.gate_up_proj[2]"
    torch.testing.assert_close(*(stacks[n][name].delta(torch.ones(1)) for n in ("both", "old-both")))
    with pytest.raises(NameMismatch, match=r"square, \(16, 16\).*PEFT since 0\.19.*train it again"):
        match_to_base(Base(str(base)), {"a": read["old-alone"]})


def test_the_model_is_what_it_was_after_it_carried_a_merge(qwen, tmp_path):
    folder, _ = old_adapter(tmp_path / "old", 1)
    model = transformers.AutoModel.from_pretrained(qwen)
    stack = match_to_base(Base(str(qwen), model), {"old": read_adapter(folder)}).stack
    before = {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}
    name = "layers.1.mlp.experts.gate_up_proj"
    with merged_layers(model, stack, torch.full((len(stack.names), 1), 0.5)) as layers:
        moved = model.get_parameter(name)[11].double() - before[name][1][11].double()
        torch.testing.assert_close(moved, 0.5 * stack.modules[f"{name}[11]"].delta(torch.ones(1)), rtol=0, atol=1e-6)
        set_coefficients(layers, torch.zeros(len(stack.names), 1))
        assert torch.equal(model.get_parameter(name), before[name][1])
    assert all(p.data_ptr() == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())


def test_layers_of_a_base_are_in_the_order_of_numbers(qwen):
    names = [name for name in layer_shapes(Base(str(qwen)).model) if "layers.0.mlp.experts.down_proj" in name]
    assert names == [f"layers.0.mlp.experts.down_proj[{e}]" for e in range(12)]
    marked = {f.marked for f in fused_experts(Base(str(qwen)).model).values()}
    assert marked == {False}


def test_a_larger_base_than_the_one_trained_on_is_refused(qwen, tmp_path):
    fewer, _ = old_adapter(tmp_path / "fewer", 1, experts=8)
    with pytest.raises(NameMismatch, match=r"none for 'layers\.0\.mlp\.experts\.gate_up_proj\[8\]'.*larger"):
        nsc.merge(qwen, {"a": fewer}, **SUM)
    save_moe(tmp_path / "deep", config_of("qwen3-moe", num_experts=12, num_hidden_layers=3))
    whole, _ = old_adapter(tmp_path / "whole", 1)
    with pytest.raises(NameMismatch, match=r"none for 'layers\.2\.mlp\.experts\.gate_up_proj'.*larger"):
        nsc.merge(tmp_path / "deep", {"a": whole}, **SUM)
    save_moe(tmp_path / "wide", config_of("qwen3-moe", num_experts=12, moe_intermediate_size=20))
    with pytest.raises(
        NameMismatch, match=r"update of 'model\.layers.*down_proj' is \(16, 12\).*the base has \(16, 20\)"
    ):
        nsc.merge(tmp_path / "wide", {"a": whole}, **SUM)


@pytest.mark.parametrize("settings", [{}, {"method": "ssr"}, {"method": "task-arithmetic", "aim": 0.4}])
def test_what_watches_inputs_is_refused_by_name(qwen, tmp_path, settings):
    folder, _ = old_adapter(tmp_path / "old", 1)
    with pytest.raises(NSCError, match=r"LoRA on experts or routers, first on layers\.0\.mlp\.experts.*needs no data"):
        nsc.merge(qwen, {"a": folder}, {"a": ["word1 word2 word3"] * 4}, progress=False, **settings)


def test_what_is_no_lora_on_a_parameter_is_refused_by_name(qwen, tmp_path):
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    trained(tmp_path / "a", qwen, 1, r=2, target_modules=[], target_parameters=names)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    write = (tmp_path / "a/adapter_config.json").write_text
    write(json.dumps(config | {"target_parameters": None}))
    with pytest.raises(UnsupportedAdapter, match="LoRA on parameters that no target_parameters of its config names"):
        read_adapter(tmp_path / "a")
    write(json.dumps(config | {"target_parameters": names[:1]}))
    with pytest.raises(AdapterError, match=r"names gate_up_proj of .* which has 2 pairs.*correct target_parameters"):
        read_adapter(tmp_path / "a")
    write(json.dumps(config | {"r": 5}))
    with pytest.raises(AdapterError, match="lora_A has 24 rows, no multiple of the rank 5"):
        read_adapter(tmp_path / "a")


def test_programs_that_take_linear_modules_alone_say_so(qwen, tmp_path):
    trained(tmp_path / "a", qwen, 1, r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.down_proj"])
    result = nsc.merge(qwen, {"a": tmp_path / "a"}, **SUM)
    result.save(tmp_path / "out")
    assert "| layers.1.mlp.experts.down_proj, 12 experts | 2 | none |" in (tmp_path / "out/README.md").read_text()
    for name in ("vllm", "llama.cpp"):
        assert "takes no LoRA on the experts of model.layers.0" in serving(name, tmp_path / "out")["problems"][0]
    assert serving("peft", tmp_path / "out")["problems"] == []


def test_inspection_shows_experts_in_a_line_each(qwen, tmp_path):
    folder, _ = old_adapter(tmp_path / "old", 1)
    trained(tmp_path / "new", qwen, 1, r=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    text = nsc.format_inspection(nsc.inspect({"old": folder, "new": tmp_path / "new"}))
    assert "experts.gate_proj x 23: rank 2..3, scale 1.33333, 2" in text
    assert "experts.gate_up_proj x 24: rank 2, scale 3" in text and "[3]" not in text.split("worst")[0]
