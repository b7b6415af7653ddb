"""Bases whose checkpoints hold codes: FP8 is read as what it stands for, everything else is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

import nsc
from nsc.bases import codes
from nsc.bases.base_model import Base
from nsc.bases.weights import read_layers, read_tensors
from nsc.cli import app
from nsc.errors import NSCError, ProofError
from nsc.export import output
from tests.tiny import dense_updates, peft_adapter, random_factors, tiny_llama, write_adapter

E4M3 = torch.float8_e4m3fn
Q = "model.layers.1.self_attn.q_proj"
BLOCK = (20, 24)  # divides neither side of any layer


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> dict[str, Path]:
    folder, lora = tmp_path_factory.mktemp("tasks"), dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    return {t: peft_adapter(folder / t, tiny_llama("AutoModelForCausalLM"), i, **lora) for i, t in enumerate("ab")}


def spread(scale: Tensor, weight: Tensor) -> Tensor:
    """One scale for every entry of a weight, entry by entry."""
    m, d = weight.shape
    if scale.numel() == 1:
        return scale.reshape(1, 1).expand(m, d)
    if scale.numel() == m:
        return scale.reshape(m, 1).expand(m, d)
    return torch.stack([torch.stack([scale[i // BLOCK[0], j // BLOCK[1]] for j in range(d)]) for i in range(m)])


def by_tensor(w: Tensor) -> Tensor:
    return w.abs().max() / 448


def by_row(w: Tensor) -> Tensor:
    return w.abs().amax(1, keepdim=True) / 448


def by_block(w: Tensor) -> Tensor:
    grid = (-(-w.shape[0] // BLOCK[0]), -(-w.shape[1] // BLOCK[1]))
    return 0.001 + 0.001 * torch.rand(grid, generator=torch.Generator().manual_seed(3))


FORMATS = {  # suffix and value of the scale, dtype of the codes, quantization_config
    "a scale a tensor": ("weight_scale_inv", by_tensor, E4M3, {"quant_method": "fp8", "weight_block_size": None}),
    "a scale a block": ("weight_scale_inv", by_block, E4M3, {"quant_method": "fp8", "weight_block_size": BLOCK}),
    "a scale a row": ("weight_scale", by_row, E4M3, {"quant_method": "fbgemm_fp8"}),
    "powers of two": (
        "weight_scale_inv",
        lambda w: by_block(w).log2().round().exp2().to(torch.float8_e8m0fnu),
        E4M3,
        {"quant_method": "fp8", "weight_block_size": BLOCK, "scale_fmt": "ue8m0"},
    ),
    "blocks of compressed-tensors": (
        "weight_scale",
        by_block,
        E4M3,
        {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"block_structure": "20x24"}}}},
    ),
    "plain numbers": ("", None, torch.float8_e5m2, None),
}


def fp8(base: Path, place: Path, kind: str, dtype: str = "float32", kinds=("proj",), shards: bool = False):
    """A copy of a base with linears in FP8, and key -> what each tensor stands for, float64."""
    suffix, scale_of, coded, settings = FORMATS[kind]
    shutil.copytree(base, place)
    tensors, numbers = {}, {}
    for key, w in load_file(base / "model.safetensors").items():
        if w.ndim != 2 or not any(kind in key for kind in kinds):
            tensors[key], numbers[key] = w, w.double()
        elif scale_of is None:
            tensors[key] = w.to(coded)
            numbers[key] = tensors[key].double()
        else:
            scale = scale_of(w)
            tensors[key] = (w / spread(scale.float(), w)).to(coded)
            numbers[key] = tensors[key].double() * spread(scale.double(), w)
            module = key.removesuffix(".weight")
            tensors |= {f"{module}.{suffix}": scale, f"{module}.input_scale": torch.ones(1)}
    write_shards(place, tensors, shards)
    change_config(place, dtype=dtype, torch_dtype=dtype, **({"quantization_config": settings} if settings else {}))
    return place, numbers


def write_shards(place: Path, tensors: dict[str, Tensor], shards: bool) -> None:
    """One file, or two with an index, the scales apart from their weights."""
    if not shards:
        save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        return
    (place / "model.safetensors").unlink()
    files = {key: f"model-0000{1 + ('scale' in key)}-of-00002.safetensors" for key in tensors}
    for file in set(files.values()):
        save_file({k: x for k, x in tensors.items() if files[k] == file}, place / file, metadata={"format": "pt"})
    (place / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def change_config(place: Path, **fields) -> None:
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | fields))


def merge(base: Path, tasks: dict[str, Path], **settings) -> nsc.MergeResult:
    return nsc.merge(base, tasks, method="task-arithmetic", scale=0.5, progress=False, **settings)


def written(folder: Path) -> dict[str, Tensor]:
    return {key: x for file in folder.glob("model*.safetensors") for key, x in load_file(file).items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_an_fp8_base_is_merged_as_the_numbers_that_it_stands_for(tmp_path, base, tasks, kind, monkeypatch):
    monkeypatch.setattr("nsc.export.result.free_memory", lambda device: 0)  # the proof of the files is alone
    source, numbers = fp8(base, tmp_path / "base", kind)
    merge(source, tasks).save(tmp_path / "out", full=True)
    updates, found = [dense_updates(folder) for folder in tasks.values()], written(tmp_path / "out")
    assert found.keys() == numbers.keys()
    for key, number in numbers.items():
        name = key.removeprefix("model.").removesuffix(".weight")
        expected = number + 0.5 * sum(u[name] for u in updates) if name in updates[0] else number
        assert torch.equal(found[key], expected.float())
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


def test_transformers_loads_the_merge_and_an_index_forgets_the_scales(tmp_path, base, tasks):
    source, numbers = fp8(base, tmp_path / "base", "a scale a block", "bfloat16", shards=True)
    proof = merge(source, tasks).save(tmp_path / "out", full=True)
    assert proof.outputs is not None and proof.outputs < 0.02 < 0.1 < proof.effect
    found = written(tmp_path / "out")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == found.keys() == numbers.keys()
    assert found[f"{Q}.weight"].dtype == torch.bfloat16 and found["model.norm.weight"].dtype == torch.float32


def test_codes_that_nothing_is_added_to_stay_codes(tmp_path, base, tasks):
    source, _ = fp8(base, tmp_path / "base", "a scale a block", kinds=("gate_proj", "up_proj"))
    merge(source, tasks).save(tmp_path / "out", full=True)
    before, found = written(source), written(tmp_path / "out")
    same = [
        k
        for k in before
        if torch.equal(found[k].reshape(-1).view(torch.uint8), before[k].reshape(-1).view(torch.uint8))
    ]
    assert found.keys() == before.keys() and {k for k in before if "scale" in k or "gate_proj" in k} <= set(same)
    assert len(same) == len(before) - 8 and "quantization_config" in (tmp_path / "out/config.json").read_text()


def test_layers_fine_tuned_whole_and_heads_are_compared_with_numbers(tmp_path, base):
    source, numbers = fp8(base, tmp_path / "base", "a scale a block")
    gate = "layers.0.mlp.gate_proj"
    (stored,) = read_layers(Base(str(source)), [gate]).values()
    assert torch.equal(stored, numbers[f"model.{gate}.weight"].float())
    factors = random_factors(["model.layers.3.self_attn.q_proj"])
    whole = {f"model.{gate}.weight": stored + 1}
    a = write_adapter(tmp_path / "a", factors, saved=whole, target_modules=sorted(factors))
    merge(source, {"a": a}).save(tmp_path / "out")
    found = load_file(tmp_path / "out/adapter_model.safetensors")[f"base_model.model.model.{gate}.weight"]
    torch.testing.assert_close(found, stored + 0.5, rtol=0, atol=1e-6)
    q = read_tensors(Base(str(source)), [f"{Q}.weight"])[f"{Q}.weight"]
    assert torch.equal(q, numbers[f"{Q}.weight"].float())


def packed(*parts: str):
    """Tensors of integers in place of a weight."""
    return lambda name, w: {f"{name}.{part}": torch.ones(4, 32, dtype=torch.int32) for part in parts}


def eight_bits(name: str, w: Tensor) -> dict[str, Tensor]:
    scale = w.abs().amax(1)
    return {f"{name}.weight": (w / scale[:, None] * 127).to(torch.int8), f"{name}.SCB": scale}


def four_bits(name: str, w: Tensor) -> dict[str, Tensor]:
    parts = {"absmax": torch.ones(16), "quant_map": torch.ones(16), "quant_state.bitsandbytes__nf4": torch.ones(9)}
    weight = torch.ones(w.numel() // 2, 1, dtype=torch.uint8)
    return {f"{name}.weight": weight} | {f"{name}.weight.{part}": x for part, x in parts.items()}


def fp8_with(**more: tuple[int, ...]):
    """Codes with tensors of ones beside them."""
    return lambda name, w: {f"{name}.weight": w.to(E4M3)} | {f"{name}.{p}": torch.ones(x) for p, x in more.items()}


REFUSED = {
    "gptq": packed("qweight", "qzeros", "scales", "g_idx"),
    "awq": packed("qweight", "qzeros", "scales"),
    "compressed-tensors": packed("weight_packed", "weight_shape", "weight_scale"),
    "bitsandbytes": eight_bits,
    "nf4": four_bits,
    "zero points": fp8_with(weight_scale=(1,), weight_zero_point=(1,)),
    "nvfp4": lambda name, w: {
        f"{name}.weight": torch.ones(32, 16, dtype=torch.uint8),
        f"{name}.weight_scale": w.to(E4M3),
    },
    "blocks of unknown size": fp8_with(weight_scale_inv=(2, 2)),
    "a scale that is not there": fp8_with(),
    "scaled floats": lambda name, w: {f"{name}.weight": w, f"{name}.weight_scale": torch.ones(1)},
}


def coded(base: Path, place: Path, kind: str, where: str = "self_attn.q_proj") -> Path:
    """A copy of a base, some linears of which are stored as codes."""
    shutil.copytree(base, place)
    tensors = {}
    for key, w in load_file(base / "model.safetensors").items():
        tensors |= REFUSED[kind](key.removesuffix(".weight"), w) if where in key else {key: w}
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
    change_config(place, quantization_config={"quant_method": kind, "load_in_8bit": True})
    return place


@pytest.mark.parametrize("kind", REFUSED)
def test_other_codes_are_refused_before_anything_is_learned(tmp_path, base, tasks, kind):
    source = coded(base, tmp_path / "base", kind)
    (tmp_path / "rows.txt").write_text("word1 word2\nword3\n")
    given = [f"--adapter={t}={folder}" for t, folder in tasks.items()]
    given += [f"--data={t}={tmp_path}/rows.txt" for t in tasks]
    out = tmp_path / "out"
    result = CliRunner().invoke(app, ["merge", f"--base={source}", *given, f"--out={out}", "--full", "--steps=2"])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "stores layer layers.0.self_attn.q_proj as codes" in result.output and f"written by {kind}" in result.output
    assert "full-precision model" in result.output and "without --full" in result.output
    assert "coefficients" not in result.output and {p.name for p in tmp_path.iterdir()} == {"base", "rows.txt"}


@pytest.mark.parametrize("kind", ["gptq", "bitsandbytes"])
def test_an_adapter_needs_no_weights_of_such_a_base(tmp_path, base, tasks, kind):
    source = coded(base, tmp_path / "base", kind)
    result = merge(source, tasks)
    assert result.save(tmp_path / "out").outputs is None
    with pytest.raises(NSCError, match=r"layer layers\.0\.self_attn\.q_proj as codes"):
        result.save(tmp_path / "full", full=True)
    with pytest.raises(NSCError, match=r"full-precision model"):
        nsc.merge(source, tasks, {t: ["word1"] for t in tasks}, progress=False, steps=1)


def test_codes_beside_fp8_that_would_be_left_are_refused(tmp_path, base, tasks):
    source, _ = fp8(base, tmp_path / "base", "a scale a block", kinds=("q_proj", "v_proj"))
    tensors = load_file(source / "model.safetensors")
    tensors |= eight_bits("model.layers.2.mlp.up_proj", tensors["model.layers.2.mlp.up_proj.weight"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NSCError, match=r"stores model\.layers\.2\.mlp\.up_proj\.weight as codes in I8"):
        merge(source, tasks).save(tmp_path / "out", full=True)


def test_the_proof_reads_codes_by_itself(tmp_path, base, tasks, monkeypatch):
    source, _ = fp8(base, tmp_path / "base", "a scale a block")
    monkeypatch.setattr("nsc.export.result.free_memory", lambda device: 0)
    with monkeypatch.context() as patch:
        patch.setattr(codes.Codes, "read", lambda self, key, stored, scale: stored.double())
        with pytest.raises(ProofError, match="differs from the merge"):
            merge(source, tasks).save(tmp_path / "out", full=True)
    write = output.write_full_model

    def keeps_the_config(folder, *args):
        write(folder, *args)
        shutil.copyfile(source / "config.json", folder / "config.json")

    monkeypatch.setattr(output, "write_full_model", keeps_the_config)
    with pytest.raises(ProofError, match="its config still speaks of codes"):
        merge(source, tasks).save(tmp_path / "again", full=True)


NAMES = ["../model.safetensors", "/model.safetensors", "a/b.safetensors", "..", "", "C:x", "a\\b", 7]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("index", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
def test_an_index_names_files_beside_itself(tmp_path, base, tasks, name, index):
    source = shutil.copytree(base, tmp_path / "in/base")
    keys = load_file(source / "model.safetensors")
    shutil.move(source / "model.safetensors", tmp_path / "in/model.safetensors")
    (source / index).write_text(json.dumps({"weight_map": dict.fromkeys(keys, name)}))
    with pytest.raises(NSCError, match="no file name"):
        nsc.merge(source, tasks, {t: ["word1"] for t in tasks}, progress=False, steps=1)
    with pytest.raises(NSCError, match="no file name" if "safetensors" in index else "holds no model"):
        merge(source, tasks).save(tmp_path / "out", full=True)
