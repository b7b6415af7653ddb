"""What is written: exact concatenation, best truncation, and the full model shard by shard."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, safe_open
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

import nsc
from nsc.cli import app
from nsc.errors import NSCError
from nsc.recipes.merged_factors import merged_factors
from tests.conftest import ADAPTERS, KINDS
from tests.tiny import dense_updates, peft_adapter, rewrite, save_base, tiny_llama

IDS = torch.arange(4, 28).view(2, 12)


@pytest.fixture(scope="module")
def update(merged, adapters) -> dict[str, torch.Tensor]:
    """Body module -> sum_k lam_k s_k B_k A_k in float64, factors and scales as PEFT reads them."""
    total: dict[str, torch.Tensor] = {}
    for k, task in enumerate(merged.tasks):
        kind = KINDS.get(ADAPTERS[task].get("task_type", ""), "AutoModelForCausalLM")
        for name, dense in dense_updates(adapters[task], kind).items():
            lam = merged.coefficients[merged.modules.index(name), k].double()
            total[name] = total.get(name, 0) + lam * dense
    return total


def causal(place, **kwargs) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(place, **kwargs).eval()


def dense_merge(base, update) -> torch.nn.Module:
    model = causal(base)
    for name, dense in update.items():
        weight = model.model.get_submodule(name).weight
        weight.data = (weight.double() + dense).to(weight.dtype)
    return model


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def exact(merged, tmp_path_factory):
    out = tmp_path_factory.mktemp("exact") / "out"
    merged.save(out)
    return out


def test_programs_that_know_one_rank_and_one_alpha_read_the_merge(exact, update):
    """llama.cpp scales every module by alpha / r of the config, and SGLang gives every module r rows."""
    config = json.loads((exact / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    tensors = load_file(exact / "adapter_model.safetensors")
    for name, dense in update.items():
        A, B = (tensors[f"base_model.model.model.{name}.lora_{side}.weight"].double() for side in "AB")
        assert len(A) == B.shape[1] == config["r"] == 22
        assert (config["lora_alpha"] / config["r"] * B @ A - dense).norm() < 1e-6 * dense.norm()


def test_what_padding_costs_is_said(exact, merged, tmp_path):
    report = json.loads((exact / "report.json").read_text())
    merged.save(tmp_path / "ragged", ragged=True)
    files = [folder / "adapter_model.safetensors" for folder in (exact, tmp_path / "ragged")]
    more = sum(
        sum(t.nbytes for t in load_file(file).values()) * sign for file, sign in zip(files, (1, -1), strict=True)
    )
    (told,) = [line for line in report["warnings"] if "padded" in line]
    assert f"{more / 2**20:.2g} MiB more" in told and "from 4, and are padded with zeros to 22" in told
    assert report["ranks_by_module"]["layers.0.mlp.down_proj"] == 4
    assert not [w for w in json.loads((tmp_path / "ragged/report.json").read_text())["warnings"] if "padded" in w]


def test_a_padded_adapter_is_merged_again_like_its_ragged_twin(exact, merged, base, tmp_path):
    merged.save(tmp_path / "ragged", ragged=True)
    padded, ragged = (
        nsc.merge(base, {"a": folder}, method="task-arithmetic", progress=False).merged
        for folder in (exact, tmp_path / "ragged")
    )
    for name in ragged.names:
        (B, A), (E, D) = ragged.update(name), padded.update(name)
        assert torch.allclose(B @ A, E @ D, rtol=0, atol=1e-9)


def test_a_replay_keeps_ragged_ranks_unless_told_otherwise(merged, tmp_path):
    merged.save(tmp_path / "ragged", ragged=True)
    for more, ragged in ([], True), (["--one-rank"], False):
        out = tmp_path / f"again-{ragged}"
        run = CliRunner().invoke(app, ["apply", str(tmp_path / "ragged"), "--out", str(out), *more])
        assert not run.exception, run.output
        assert bool(json.loads((out / "adapter_config.json").read_text())["rank_pattern"]) == ragged


def test_concatenation_has_scale_one_and_full_names(merged, tmp_path):
    merged.save(exact := tmp_path / "out", ragged=True)
    config = json.loads((exact / "adapter_config.json").read_text())
    ranks = {f"model.{name}": sum(module.ranks) for name, module in merged.stack.modules.items()}
    top = max(ranks.values())
    assert config["r"] == config["lora_alpha"] == top and not config["use_rslora"]
    assert set(config["target_modules"]) == set(ranks)
    assert config["rank_pattern"] == config["alpha_pattern"] == {n: r for n, r in ranks.items() if r != top}
    assert config["rank_pattern"] and config["modules_to_save"] is None
    tensors = load_file(exact / "adapter_model.safetensors")
    sides = {f"base_model.model.{n}.lora_{s}.weight": r for n, r in ranks.items() for s in "AB"}
    assert {key: t.shape["lora_B" in key] for key, t in tensors.items()} == sides
    assert all(t.dtype == torch.float32 for t in tensors.values())


def test_config_does_not_depend_on_the_hash_seed(exact):
    config = json.loads((exact / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])


def test_stock_peft_on_a_causal_lm_uses_every_weight(exact, base, update):
    model = peft.PeftModel.from_pretrained(causal(base), exact)
    result = model.load_adapter(exact, "again")
    assert not result.unexpected_keys and not [key for key in result.missing_keys if "lora_" in key]
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert {name.removeprefix("model.") for name in layers} == set(update)
    stored = load_file(exact / "adapter_model.safetensors")
    for name, layer in layers.items():
        assert layer.scaling["default"] == 1
        assert torch.equal(layer.lora_A["default"].weight, stored[f"base_model.model.{name}.lora_A.weight"])
        assert torch.equal(layer.lora_B["default"].weight, stored[f"base_model.model.{name}.lora_B.weight"])
        assert layer.lora_B["default"].weight.any()
        dense = update[name.removeprefix("model.")]
        assert (layer.get_delta_weight("default") - dense).norm() < 1e-6 * dense.norm()


def test_logits_of_adapter_and_full_model_are_the_dense_merge(exact, base, merged, update, tmp_path):
    expected, bare = logits(dense_merge(base, update)), logits(causal(base))
    merged.save(tmp_path / "full", full=True)
    for model in (peft.PeftModel.from_pretrained(causal(base), exact), causal(tmp_path / "full")):
        assert (logits(model) - expected).norm() < 1e-5 * (bare - expected).norm()


@pytest.mark.parametrize("rank", [1, 5, 8, 22, 100])
def test_truncation_is_the_best_there_is(merged, update, rank):
    for name, factors in merged_factors(merged.merged, rank).items():
        dense = update[name]
        sigma = torch.linalg.svdvals(dense)
        R = sum(merged.stack.modules[name].ranks)
        assert factors.A.shape[0] == factors.B.shape[1] == min(rank, R, *dense.shape)
        tail = (sigma[rank:R].norm() / sigma.norm()).item()
        written = (factors.B.double() @ factors.A.double() - dense).norm() / dense.norm()
        assert factors.error == pytest.approx(tail, rel=1e-6, abs=1e-12)
        assert written.item() == pytest.approx(tail, rel=1e-5, abs=1e-6)


def test_truncated_adapter_on_disk(merged, base, update, tmp_path):
    merged.save(tmp_path / "out", rank=5)
    report = json.loads((tmp_path / "out/report.json").read_text())
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 5 == report["merged_rank"] and report["vllm_max_lora_rank"] == 8
    assert config["rank_pattern"] == {}
    model = peft.PeftModel.from_pretrained(causal(base), tmp_path / "out").get_base_model()
    for name, dense in update.items():
        u, sigma, vh = torch.linalg.svd(dense)
        best = u[:, :5] * sigma[:5] @ vh[:5]
        delta = model.model.get_submodule(name).get_delta_weight("default")
        assert (delta - best).norm() < 1e-5 * dense.norm()
        assert report["truncation"][name] == pytest.approx((sigma[5:].norm() / sigma.norm()).item(), abs=1e-9)


def test_rank_below_one_is_refused(merged, tmp_path):
    for rank in (0, -3):
        with pytest.raises(NSCError, match=f"rank must be 1 or more, not {rank}"):
            merged.save(tmp_path / "out", rank=rank)
    assert not (tmp_path / "out").exists()


def full(base, adapters, texts, out, **settings) -> nsc.MergeResult:
    result = nsc.merge(base, adapters, texts, start=0.7, steps=0, progress=False, **settings)
    result.save(out, full=True)
    return result


def checkpoint(folder) -> dict[str, torch.Tensor]:
    return {key: t for file in folder.glob("model*.safetensors") for key, t in load_file(file).items()}


def check_full(base, out, result, dtype):
    """Untouched tensors are the source's bits, touched ones its float64 sum rounded once; same files, same keys."""
    for source in base.glob("model*"):
        if source.suffix == ".json":
            assert (out / source.name).read_bytes() == source.read_bytes()
            continue
        before, after = load_file(source), load_file(out / source.name)
        assert before.keys() == after.keys()
        with safe_open(source, framework="pt") as a, safe_open(out / source.name, framework="pt") as b:
            assert a.metadata() == b.metadata()
        for key, tensor in after.items():
            expected, name = before[key], key.removeprefix("model.").removesuffix(".weight")
            if name in result.stack.modules:
                row = result.coefficients[result.modules.index(name)]
                expected = (expected.double() + result.stack.modules[name].delta(row)).to(dtype)
                assert not torch.equal(tensor, before[key])
            assert tensor.dtype == dtype and torch.equal(tensor, expected), key
    assert {p.name for p in base.glob("model*")} == {p.name for p in out.glob("model*")}


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_model_keeps_shards_dtype_and_untouched_bits(tmp_path, adapters, texts, dtype, shard):
    base = save_base(tmp_path / "base", dtype=dtype, max_shard_size=shard)
    assert (len(list(base.glob("*.safetensors"))) > 2) == (shard == "20KB")
    result = full(base, adapters, texts, tmp_path / "out")
    check_full(base, tmp_path / "out", result, dtype)


@pytest.mark.parametrize(("stored", "used"), [(torch.bfloat16, "float32"), (torch.float32, "bfloat16")], ids=str)
def test_full_model_keeps_the_files_dtype_whatever_it_ran_in(tmp_path, adapters, texts, stored, used):
    base = save_base(tmp_path / "base", dtype=stored)
    check_full(base, tmp_path / "out", full(base, adapters, texts, tmp_path / "out", dtype=used), stored)


def test_full_model_with_tied_embeddings_stays_tied(tmp_path, adapters, texts):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    full(base, adapters, texts, tmp_path / "out")
    assert "lm_head.weight" not in checkpoint(tmp_path / "out")
    model, source = causal(tmp_path / "out"), causal(base)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, source.lm_head.weight)


def test_full_model_of_a_bare_body(tmp_path, adapters, texts):
    base = save_base(tmp_path / "base", kind="AutoModel")
    result = full(base, adapters, texts, tmp_path / "out")
    loaded, info = AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    name = result.modules[0]
    expected = load_file(base / "model.safetensors")[f"{name}.weight"] + result.stack.modules[name].delta(
        result.coefficients[0]
    )
    torch.testing.assert_close(loaded.get_submodule(name).weight.double(), expected, rtol=1e-6, atol=1e-6)


def test_side_files_are_copied_but_not_the_bases_readme_or_other_weights(tmp_path, base, adapters, texts):
    source = shutil.copytree(base, tmp_path / "base")
    for name in ("README.md", "chat_template.jinja", "pytorch_model.bin", "LICENSE"):
        (source / name).write_text(name)
    out = tmp_path / "out"
    full(source, adapters, texts, out)
    assert (out / "chat_template.jinja").read_text() == "chat_template.jinja" and (out / "LICENSE").exists()
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert "merged model" in (out / "README.md").read_text() and not (out / "pytorch_model.bin").exists()


def test_full_model_needs_safetensors(tmp_path, base, adapters, texts, merged):
    source = shutil.copytree(base, tmp_path / "base")
    result = nsc.merge(source, adapters, texts, steps=0, progress=False)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with pytest.raises(NSCError, match=r"holds no model\.safetensors.*save_pretrained"):
        result.save(tmp_path / "out", full=True)
    assert not (tmp_path / "out").exists()


def test_full_model_from_a_truncated_shard(tmp_path, base, adapters, texts):
    source = shutil.copytree(base, tmp_path / "base")
    result = nsc.merge(source, adapters, texts, steps=0, progress=False)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(NSCError, match="cannot be read"):
        result.save(tmp_path / "out", full=True)


@pytest.mark.parametrize("full", [False, True])
def test_a_base_of_pointers_of_git_lfs_is_told_so(tmp_path, base, adapters, texts, full):
    source = shutil.copytree(base, tmp_path / "base")
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(NSCError, match=r"model\.safetensors.*Git LFS pointer.*git lfs pull"):
        if full:
            nsc.merge(source, adapters, method="task-arithmetic").save(tmp_path / "out", full=True)
        nsc.merge(source, adapters, texts, progress=False)


def test_full_model_refuses_a_base_without_the_merged_layer(tmp_path, base, adapters, texts):
    source = shutil.copytree(base, tmp_path / "base")
    result = nsc.merge(source, adapters, texts, steps=0, progress=False)
    rewrite(source / "model.safetensors", lambda t: t.pop("model.layers.2.self_attn.q_proj.weight"))
    with pytest.raises(NSCError, match=r"layers\.2\.self_attn\.q_proj"):
        result.save(tmp_path / "out", full=True)


def test_an_adapter_trained_on_the_bare_body_is_written_for_it(tmp_path, base, texts):
    body = peft_adapter(tmp_path / "a", tiny_llama(), r=4, target_modules=["q_proj", "v_proj"])
    nsc.merge(base, {"a": body}, {"a": texts["plain"]}, steps=0, start=1.0, progress=False).save(tmp_path / "out")
    model = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), tmp_path / "out").merge_and_unload()
    expected = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(base), body).merge_and_unload()
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter)
