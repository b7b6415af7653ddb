"""Heads are proven, files that change during a merge are refused, and a power cut loses nothing."""

import mmap
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import nsc
from nsc.errors import NSCError, ProofError
from nsc.export import output
from tests.tiny import peft_adapter, rewrite, tiny_llama


@pytest.fixture
def task(base, tmp_path) -> Path:
    """An adapter with a head of its own."""
    lora = dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
    return peft_adapter(tmp_path / "a", tiny_llama("AutoModelForSequenceClassification"), **lora)


def merge(base: Path, task: Path) -> nsc.MergeResult:
    return nsc.merge(base, {"a": task}, method="task-arithmetic", progress=False)


def zeroed(file: Path) -> None:
    """All tensors of a file set to zero in place, as another process that trains on would."""
    with file.open("r+b") as opened, mmap.mmap(opened.fileno(), 0) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = bytes(len(content) - start)


CHANGES = {
    "adapter zeroed in place": lambda base, task: zeroed(task / "adapter_model.safetensors"),
    "adapter truncated": lambda base, task: os.truncate(task / "adapter_model.safetensors", 99),
    "adapter removed": lambda base, task: (task / "adapter_model.safetensors").unlink(),
    "adapter's config": lambda base, task: (task / "adapter_config.json").write_text("{}"),
    "base": lambda base, task: rewrite(base / "model.safetensors", lambda t: t["lm_head.weight"].zero_()),
    "base's config": lambda base, task: os.utime(base / "config.json"),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_during_a_merge_is_refused(tmp_path, base, task, change, full):
    base = shutil.copytree(base, tmp_path / "base")
    result = merge(base, task)
    head = load_file(task / "adapter_model.safetensors")["base_model.model.score.weight"].clone()
    CHANGES[change](base, task)
    with pytest.raises(NSCError, match=r"was changed while it was merged.*merge again"):
        result.save(tmp_path / "out", full=full)
    assert not (tmp_path / "out").exists() and torch.equal(result.adapters["a"].saved["score.weight"], head)


def test_other_files_may_come_and_go(tmp_path, base, task):
    result = merge(base, task)
    (task / "training.log").write_text("more")
    (task / "added.json").write_text("{}")
    result.save(tmp_path / "out")


HEADS = {
    "one bit": lambda folder: rewrite(
        folder / "a.safetensors", lambda t: t["score.weight"].view(torch.int32)[0, 0].add_(1)
    ),
    "zeros": lambda folder: zeroed(folder / "a.safetensors"),
    "another dtype": lambda folder: rewrite(
        folder / "a.safetensors", lambda t: t.update({k: x.half() for k, x in t.items()})
    ),
    "a tensor more": lambda folder: rewrite(folder / "a.safetensors", lambda t: t.update(more=torch.ones(1))),
    "truncated": lambda folder: os.truncate(folder / "a.safetensors", 99),
    "missing": lambda folder: (folder / "a.safetensors").unlink(),
    "another file": lambda folder: (folder / "b.safetensors").write_text(""),
}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("case", HEADS)
def test_a_corrupted_head_is_refused(monkeypatch, tmp_path, base, task, case, full):
    write = output.Output._write_heads
    monkeypatch.setattr(output.Output, "_write_heads", lambda self, f: (write(self, f), HEADS[case](f / "heads")))
    with pytest.raises(ProofError, match="heads"):
        merge(base, task).save(tmp_path / "out", full=full)
    assert not (tmp_path / "out").exists()


def test_every_file_is_on_the_disk_before_the_folder_has_its_name(monkeypatch, tmp_path, base, task):
    synced, move, sync = [], os.replace, os.fsync

    def replace(source, target):
        synced.append("moved")
        move(source, target)

    def fsync(handle):
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    result = merge(base, task)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(os, "fsync", fsync)
    result.save(tmp_path / "out")
    staging = tmp_path / "out.partial/unproven"
    written = [staging / path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
    at = synced.index("moved")
    assert {str(path) for path in (*written, staging)} <= set(synced[:at]) and str(tmp_path) in synced[at:]
