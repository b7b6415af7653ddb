"""Two merges into one folder: one is refused while the other is at work, and what was proven is what was renamed."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from threading import Thread

import pytest

import nsc
from nsc.errors import NSCError, ProofError
from nsc.export import output
from nsc.paths import CHECKPOINT, held

ROOT = Path(__file__).parents[2]
HOLD = """
import pathlib, sys
from nsc.paths import held
with held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    input()
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds ``out.partial`` until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()


def test_a_folder_in_use_is_refused_by_the_number_of_its_process(merged, other, tmp_path):
    holder = rf"process {other.pid}\)" if Path("/proc/locks").exists() else "another process"
    with pytest.raises(NSCError, match=rf"another merge is at work in .*out\.partial \({holder}; wait until it ends"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_lock_dies_with_its_process(merged, other, tmp_path):
    other.kill()
    other.wait()
    assert (tmp_path / "out.partial").exists()  # nobody was left to remove it
    merged.save(tmp_path / "out")
    assert (tmp_path / "out").is_dir() and not (tmp_path / "out.partial").exists()


def test_a_lock_nests_in_its_thread_and_in_no_other(tmp_path):
    refused = []

    def take():
        with pytest.raises(NSCError, match="another merge is at work"), held(tmp_path / "a/out"):
            pass
        refused.append(True)

    with held(tmp_path / "a/out") as folder, held(tmp_path / "a/out") as same:
        thread = Thread(target=take)
        thread.start()
        thread.join()
        assert folder == same == tmp_path / "a/out.partial" and folder.is_dir()
    assert refused and not list(tmp_path.iterdir())


def test_nothing_is_filled_again_between_proof_and_rename(monkeypatch, merged, tmp_path):
    prove = output._prove

    def prove_and_write(folder, *rest):
        proof = prove(folder, *rest)
        file = folder / "adapter_model.safetensors"
        file.write_bytes(bytes(len(file.read_bytes())))
        return proof

    monkeypatch.setattr(output, "_prove", prove_and_write)
    with pytest.raises(ProofError, match=r"adapter_model\.safetensors was changed by another program after its proof"):
        merged.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_made_meanwhile_is_not_replaced(monkeypatch, merged, tmp_path):
    prove = output._prove
    monkeypatch.setattr(output, "_prove", lambda *args: ((tmp_path / "out").mkdir(), prove(*args))[1])
    with pytest.raises(NSCError, match="was made meanwhile"):
        merged.save(tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_the_checkpoint_of_another_merge_is_kept(merged, tmp_path):
    merged.save(tmp_path / "done")
    left = tmp_path / "out.partial" / CHECKPOINT
    left.parent.mkdir()
    left.write_bytes(b"of an interrupted merge")
    for result in (nsc.apply(tmp_path / "done"), merged, replace(merged, checkpoint=tmp_path / "other.pt")):
        with pytest.raises(NSCError, match=r"interrupted merge in .*: finish it with nsc merge --resume, or remove"):
            result.save(tmp_path / "out")
    assert left.read_bytes() == b"of an interrupted merge" and not (tmp_path / "out").exists()
    replace(merged, checkpoint=left).save(tmp_path / "out")
    assert (tmp_path / "out").is_dir() and not left.parent.exists()


@pytest.mark.parametrize("place", ["file/out", "x" * 300, "\0", "link", "nowhere/..", "\ud800"], ids=ascii)
def test_places_that_cannot_be_written(merged, tmp_path, place):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(NSCError, match=r"choose another|exists already"):
        merged.save(tmp_path / place)
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_is_told_and_keeps_nothing(monkeypatch, merged, tmp_path):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output, "write_adapter", full)
    with pytest.raises(NSCError, match=r"out cannot be written \(.*No space left on device\); free space") as error:
        merged.save(tmp_path / "out")
    assert re.fullmatch(r"[^\n]*", str(error.value)) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("rank", [0, -3])
def test_no_rank_is_refused_before_anything_is_made(merged, tmp_path, rank):
    with pytest.raises(NSCError, match=f"rank must be 1 or more, not {rank}"):
        merged.save(tmp_path / "out", rank=rank)
    assert not list(tmp_path.iterdir())
