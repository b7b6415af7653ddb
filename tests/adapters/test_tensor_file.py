"""Tensors read from the file that they were mapped from: equal, a copy, and refused once the file is cut off."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from nsc.adapters.lora import read_adapter
from nsc.adapters.stack import stack_adapters
from nsc.adapters.tensor_file import Spill, map_tensors, read, write_tensors
from nsc.errors import AdapterError
from tests.tiny import random_factors, write_adapter

Q, V = "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj"


WRITERS = {
    "safetensors": lambda tensors, path: save_file(tensors, path, metadata={"format": "pt"}),
    "ours": lambda tensors, path: write_tensors(path, tensors, {"format": "pt"}),
}


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_what_is_read_is_what_safetensors_loads(tmp_path, writer):
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.arange(7),
        "c": torch.randn(2, 3, 4, dtype=torch.float64),
        "d": torch.tensor(True),
        "e": torch.empty(0, 4),
        "é f": torch.randn(9).half(),
    }
    writer(tensors, tmp_path / "x.safetensors")
    mapped = map_tensors(tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    for key, tensor in load_file(tmp_path / "x.safetensors").items():
        assert torch.equal(read(mapped[key]), tensor) and read(mapped[key]).dtype == tensor.dtype
        assert read(mapped[key]).shape == tensors[key].shape and torch.equal(mapped[key], tensors[key])
    assert mapped.keys() == tensors.keys()


def test_what_is_read_is_a_copy(tmp_path):
    save_file({"a": torch.ones(8)}, tmp_path / "x.safetensors")
    mapped = map_tensors(tmp_path / "x.safetensors")
    read(mapped["a"]).zero_()
    assert read(mapped["a"]).eq(1).all() and mapped["a"].eq(1).all()
    held = torch.randn(3)
    assert read(held) is held


def test_what_is_spilled_is_read_back_and_leaves_no_file(tmp_path):
    spill, tensors = Spill(tmp_path), [torch.randn(9, 7), torch.randn(4, 3000).bfloat16(), torch.randn(5, 6).T]
    moved = [spill.put(tensor) for tensor in tensors]
    for tensor, there in zip(tensors, moved, strict=True):
        assert torch.equal(read(there), tensor) and torch.equal(there, tensor) and there.dtype == tensor.dtype
    write_tensors(tmp_path / "x.safetensors", {str(k): tensor for k, tensor in enumerate(moved)}, {})
    stored = load_file(tmp_path / "x.safetensors")
    assert all(torch.equal(stored[str(k)], tensor) for k, tensor in enumerate(tensors))
    assert [file.name for file in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("fault", [lambda file: file.write_bytes(file.read_bytes()[:-4]), Path.unlink])
def test_a_file_that_is_cut_off_or_gone_is_an_error_by_name(tmp_path, fault):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(1024)}, file)
    mapped = map_tensors(file)
    fault(file)
    with pytest.raises(AdapterError, match=r"x\.safetensors"):
        read(mapped["a"])


def test_a_stack_keeps_no_copy_of_the_factors(tmp_path):
    """Blocks are the adapters' own tensors; A and B are put together from the files each time."""
    folders = {t: write_adapter(tmp_path / t, random_factors([Q, V], seed=s)) for s, t in enumerate("ab")}
    adapters = {t: read_adapter(folder, t) for t, folder in folders.items()}
    d = adapters["a"].factors[Q].A.shape[1]
    shapes = {name: (len(adapters["a"].factors[name].B), d) for name in (Q, V)}
    stack = stack_adapters(adapters, {t: {Q: Q, V: V} for t in "ab"}, shapes)
    for name, module in stack.modules.items():
        assert all(block is adapters[t].factors[name].A for t, block in zip("ab", module.A_blocks, strict=True))
        assert torch.equal(module.A, torch.cat([adapters[t].factors[name].A for t in "ab"]))
        assert torch.equal(module.B, torch.cat([adapters[t].factors[name].B for t in "ab"], 1))
