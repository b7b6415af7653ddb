"""A corrupted file never passes: every way of writing something else than the merge must end in a refusal."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nsc
from nsc.data.packing import collate
from nsc.errors import NSCError, ProofError
from nsc.export import output
from nsc.export.expected_merge import hidden_states
from nsc.recipes.updates import WeightedSum
from tests.tiny import rewrite, save_base, tiny_llama

KEY = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
WEIGHT = "model.layers.1.self_attn.v_proj.weight"


def tensors(change):
    return lambda folder: rewrite(folder / "adapter_model.safetensors", change)


def shard(change):
    return lambda folder: rewrite(folder / "model.safetensors", change)


def settings(file: str, change):
    def corrupt(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        change(values)
        (folder / file).write_text(json.dumps(values))

    return corrupt


def truncate(file: str):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:-50])


def scaled(key: str, by: float):
    return lambda t: t[key].mul_(by)


def poke(key: str, value: float):
    """One entry of one tensor, the smallest damage there is."""
    return lambda t: t[key].view(-1)[5:6].fill_(value)


def swap(key: str, other: str):
    return lambda t: t.update({key: t[other], other: t[key]})


A, B = KEY.format("A"), KEY.format("B")
OTHER = B.replace("layers.1", "layers.2")
config = "adapter_config.json"
ADAPTER = {
    "one entry": tensors(poke(B, 0.5)),
    "one tensor off by 1e-4": tensors(scaled(B, 1.0001)),
    "zero tensor": tensors(scaled(A, 0)),
    "sign": tensors(scaled(A, -1)),
    "NaN": tensors(poke(A, math.nan)),
    "infinity": tensors(poke(B, math.inf)),
    "module dropped": tensors(lambda t: (t.pop(A), t.pop(B))),
    "half a module dropped": tensors(lambda t: t.pop(A)),
    "two modules swapped": tensors(swap(OTHER, OTHER.replace("layers.2", "layers.0"))),
    "module added": tensors(
        lambda t: t.update({k.format(s): t[KEY.format(s)].clone() for s in "AB" for k in [KEY.replace("v_proj", "x")]})
    ),
    "stored in bfloat16": tensors(lambda t: t.update({k: v.bfloat16() for k, v in t.items()})),
    "other prefix": tensors(lambda t: [t.update({k.replace("model.model.", "model."): t.pop(k)}) for k in list(t)]),
    "alpha doubled": settings(config, lambda c: c.update(lora_alpha=2 * c["lora_alpha"])),
    "alpha pattern lost": settings(config, lambda c: c.update(alpha_pattern={})),
    "rank pattern lost": settings(config, lambda c: c.update(rank_pattern={})),
    "rsLoRA set": settings(config, lambda c: c.update(use_rslora=True)),
    "DoRA set": settings(config, lambda c: c.update(use_dora=True)),
    "one target lost": settings(config, lambda c: c["target_modules"].pop()),
    "one target more": settings(config, lambda c: c["target_modules"].append("model.layers.0.mlp.up_proj")),
    "layers excluded": settings(config, lambda c: c.update(exclude_modules=r".*layers\.3.*")),
    "file truncated": truncate("adapter_model.safetensors"),
    "config truncated": truncate(config),
    "file missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
}
FULL = {
    "one entry": shard(poke(WEIGHT, 0.5)),
    "one tensor off by 1e-3": shard(scaled(WEIGHT, 1.001)),
    "NaN": shard(poke(WEIGHT, math.nan)),
    "two layers swapped": shard(swap(WEIGHT, WEIGHT.replace("layers.1", "layers.2"))),
    "untouched layer off by a bit": shard(scaled("model.layers.1.mlp.up_proj.weight", 1 + 2**-22)),
    "norm": shard(scaled("model.norm.weight", 1.001)),
    "LM head, which the body never runs": shard(poke("lm_head.weight", 3.0)),
    "LM head lost": shard(lambda t: t.pop("lm_head.weight")),
    "layer lost": shard(lambda t: t.pop(WEIGHT)),
    "tensor added": shard(lambda t: t.update({"model.layers.1.self_attn.v_proj.bias": torch.ones(16)})),
    "other dtype": shard(lambda t: t.update({k: v.double() for k, v in t.items()})),
    "one layer less in config": settings("config.json", lambda c: c.update(num_hidden_layers=3)),
    "other rotation in config": settings("config.json", lambda c: c.get("rope_parameters", c).update(rope_theta=100.0)),
    "config truncated": truncate("config.json"),
    "file truncated": truncate("model.safetensors"),
    "file missing": lambda folder: (folder / "model.safetensors").unlink(),
}


def corrupted(monkeypatch, writer: str, corrupt) -> None:
    """``writer`` of nsc.export.output, followed by ``corrupt`` on the folder that it wrote."""
    write = getattr(output, writer)

    def write_and_corrupt(folder: Path, *args) -> None:
        write(folder, *args)
        corrupt(folder)

    monkeypatch.setattr(output, writer, write_and_corrupt)


@pytest.mark.parametrize("case", ADAPTER)
def test_a_corrupted_adapter_is_refused(monkeypatch, merged, tmp_path, case):
    corrupted(monkeypatch, "write_adapter", ADAPTER[case])
    (tmp_path / "kept").write_text("kept")
    with pytest.raises(ProofError):
        merged.save(tmp_path / "out", ragged=True)
    assert not (tmp_path / "out").exists() and (tmp_path / "kept").read_text() == "kept"


@pytest.mark.parametrize(
    "case", [c for c in ADAPTER if c not in ("one target lost", "one target more", "layers excluded")]
)
def test_a_corrupted_adapter_is_refused_without_base(monkeypatch, merged, tmp_path, case):
    corrupted(monkeypatch, "write_adapter", ADAPTER[case])
    with pytest.raises(ProofError):
        replayed(merged).save(tmp_path / "out", ragged=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("case", FULL)
def test_a_corrupted_full_model_is_refused(monkeypatch, merged, tmp_path, case):
    corrupted(monkeypatch, "write_full_model", FULL[case])
    with pytest.raises(ProofError):
        merged.save(tmp_path / "out", full=True)
    assert not (tmp_path / "out").exists()


def replayed(merged: nsc.MergeResult) -> nsc.MergeResult:
    """The same merge as ``apply`` gives it: without model or rows."""
    return nsc.MergeResult(merged.coefficients, merged.report, merged.record, merged.adapters, merged.stack)


def test_wrong_factors_in_memory_do_not_prove_themselves(monkeypatch, merged, tmp_path):
    """The proof goes back to the adapters: an error in the concatenation itself is not compared with itself."""
    factors = output.merged_factors(WeightedSum(merged.stack, merged.coefficients.flip(1)))
    monkeypatch.setattr(output, "merged_factors", lambda *args: factors)
    with pytest.raises(ProofError, match="update of"):
        merged.save(tmp_path / "out")


def test_an_understated_truncation_error_is_caught(monkeypatch, merged, tmp_path):
    """The error in the report must account for all that the truncation lost."""
    factors = output.merged_factors(merged.merged, 4)
    understated = {name: replace(f, error=f.error * 0.9) for name, f in factors.items()}
    monkeypatch.setattr(output, "merged_factors", lambda *args: understated)
    with pytest.raises(ProofError, match="truncation accounts for"):
        merged.save(tmp_path / "out", rank=4)


def test_what_the_proof_says(merged, tmp_path):
    proof = merged.save(tmp_path / "out")
    assert proof.modules == len(merged.modules)
    assert 0 <= proof.weights < 1e-6 and proof.outputs < 1e-5 < 1e-2 < proof.effect
    assert (
        "hidden states" in str(proof) and str(proof) in json.loads((tmp_path / "out/report.json").read_text())["proofs"]
    )
    bare = replayed(merged).save(tmp_path / "bare")
    assert bare.outputs is None and "outputs not compared" in str(bare)


def test_the_proof_leaves_the_model_as_it_was(merged, tmp_path):
    before = {name: (m, type(m)) for name, m in merged.model.named_modules()}
    weights = {name: p.clone() for name, p in merged.model.named_parameters()}
    merged.save(tmp_path / "out")
    assert {name: (m, type(m)) for name, m in merged.model.named_modules()} == before
    assert all(torch.equal(p, weights[name]) and not p.requires_grad for name, p in merged.model.named_parameters())


def test_a_failed_save_leaves_nothing_of_itself_to_the_next(monkeypatch, merged, tmp_path):
    with monkeypatch.context() as patch:
        corrupted(patch, "write_full_model", FULL["NaN"])
        with pytest.raises(ProofError):
            merged.save(tmp_path / "out", full=True)
    (tmp_path / "out.partial" / "own.txt").write_text("somebody's own file")
    merged.save(tmp_path / "out")
    assert not list((tmp_path / "out").glob("model*")) and not (tmp_path / "out/config.json").exists()
    assert [p.name for p in (tmp_path / "out.partial").iterdir()] == ["own.txt"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_bases_are_proven_too(tmp_path, adapters, texts, dtype):
    result = nsc.merge(save_base(tmp_path / "base", dtype=dtype), adapters, texts, steps=1, progress=False)
    for form in ({}, {"rank": 4}, {"full": True}):
        proof = result.save(tmp_path / "-".join(["out", *form]), **form)
        assert proof.weights < 1e-6 and proof.outputs < proof.effect / 10


def test_existing_out_and_contradicting_forms(merged, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(NSCError, match=r"out exists already; choose another folder"):
        merged.save(tmp_path / "out")
    with pytest.raises(NSCError, match="rank truncates an adapter"):
        merged.save(tmp_path / "new", rank=4, full=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_states_that_are_compared_keep_no_graph():
    """Also of a body whose parameters want gradients: a graph would hold the activations of every layer."""
    model = tiny_llama().requires_grad_()
    assert not hidden_states(model, collate([[3, 4, 5]], [0], 0, causal=True)).requires_grad
