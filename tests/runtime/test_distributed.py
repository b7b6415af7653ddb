"""Several gloo processes learn what one does: uneven shares, lost ranks, interrupts, NaN, and the command line."""

import os
import signal
import time
from dataclasses import replace
from itertools import count

import pytest
import torch
from safetensors.torch import load_file

import nsc
import nsc.learning.loop as learning
from nsc.data.packing import pack
from nsc.errors import NonFiniteError, ResumeError
from nsc.learning.passes import Passes, share_out
from nsc.runtime.distributed import RankError, join
from nsc.seal import unsealed
from tests.runtime.ranks import CLOSE, CONFIG, assert_same, run, together, torchrun


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("batch_size", [1, 2])  # 3 or 6 rows a step
@pytest.mark.parametrize("options", [{}, {"shares_rows": True}], ids=str)
def test_ranks_find_what_one_process_finds(setting, tmp_path, size, batch_size, options):
    batches = replace(setting[2], batch_size=batch_size, **options)
    learned = together(tmp_path, size, lambda rank: run(setting, batches=batches))
    assert_same(learned, run(setting, batches=batches))


@pytest.mark.parametrize("size", [1, 2, 4, 7])
@pytest.mark.parametrize("shares_rows", [True, False])
def test_every_row_is_in_one_share_and_shares_are_even(size, shares_rows):
    samples = [[i] * length for i, length in enumerate((3, 17, 9, 4, 11, 2, 8, 1, 16, 16, 15))]
    batches = pack(samples, [0] * len(samples), 99, causal=True, shares_rows=shares_rows)
    shares = share_out(batches, size)
    dealt = sorted(tuple(row) for share in shares for b in share for row in b.inputs["input_ids"].tolist())
    assert dealt == sorted(tuple(row) for b in batches for row in b.inputs["input_ids"].tolist())
    loads = [sum(b.tokens for b in share) for share in shares]
    assert max(loads) <= sum(loads) / size + 2 * max(b.task.shape[1] for b in batches)
    assert sum(not share for share in shares) == max(0, size - sum(len(b.task) for b in batches))


def test_memory_that_runs_out_on_one_rank_is_its_own_affair(setting, alone, tmp_path, monkeypatch):
    whole = Passes._gradient

    def scarce(self, passes):
        if join().rank == 1 and max((p.tokens for p in passes), default=0) > 34:
            raise torch.OutOfMemoryError
        return whole(self, passes)

    monkeypatch.setattr(Passes, "_gradient", scarce)
    assert_same(together(tmp_path, 2, lambda rank: run(setting)), alone)


@pytest.mark.parametrize("dies", [0, 1])
@pytest.mark.parametrize("resumed_by", [1, 2])
def test_a_rank_that_dies_costs_no_step(setting, alone, tmp_path, monkeypatch, dies, resumed_by):
    monkeypatch.setattr(learning, "CHECKPOINT_SECONDS", -1 if dies == 0 else 1e9)
    checkpoint, calls = tmp_path / "state.pt", count()

    def work(rank):
        def deadly(step):
            if rank == dies and next(calls) == 6:  # one call is made before the loop
                os._exit(9)
            return setting[2](step)

        return run(setting, batches=deadly, checkpoint=checkpoint)

    began = time.monotonic()
    outcomes = together(tmp_path, 3, work)
    assert time.monotonic() - began < 20  # not by a timeout
    assert outcomes.pop(dies) == 9
    for error in outcomes:
        assert isinstance(error, RankError) and "lost the others" in str(error) and "resume" in str(error)
    assert unsealed(checkpoint.read_bytes())[1]["step"] == 5
    assert_same(together(tmp_path, resumed_by, lambda rank: run(setting, checkpoint=checkpoint, resume=True)), alone)


@pytest.mark.parametrize("struck", [0, 1])
def test_an_interrupt_of_one_rank_stops_all_at_one_step(setting, alone, tmp_path, struck):
    checkpoint = tmp_path / "state.pt"

    def work(rank):
        def interrupting(step):
            if rank == struck and step == 4:
                signal.raise_signal(signal.SIGTERM)
            return setting[2](step)

        return run(setting, batches=interrupting, checkpoint=checkpoint)

    assert [type(o) for o in together(tmp_path, 2, work)] == [KeyboardInterrupt] * 2
    assert unsealed(checkpoint.read_bytes())[1]["step"] == 5
    assert_same(together(tmp_path, 4, lambda rank: run(setting, checkpoint=checkpoint, resume=True)), alone)


def test_nan_in_one_share_is_told_alike_by_all(setting, tmp_path):
    model, _, batches = setting

    def work(rank):
        def poisoned(step):
            if step == 4:
                batch = share_out(batches(step), 2)[1][0]
                model.get_input_embeddings().weight.data[batch.inputs["input_ids"][0, 0]] = float("nan")
            return batches(step)

        return run(setting, batches=poisoned, checkpoint=tmp_path / "state.pt")

    first, second = together(tmp_path, 2, work)
    assert isinstance(first, NonFiniteError) and isinstance(second, NonFiniteError) and str(first) == str(second)
    assert "by step 5" in str(first) and "activations enter layers.2.self_attn.v_proj (task" in str(first)
    assert not (tmp_path / "state.pt").exists()


def test_nothing_to_resume_is_told_alike_by_all(setting, tmp_path):
    outcomes = together(tmp_path, 2, lambda rank: run(setting, checkpoint=tmp_path / "no.pt", resume=True))
    assert [type(o) for o in outcomes] == [ResumeError] * 2 and "nothing to resume" in str(outcomes[1])


def test_ranks_that_drift_apart_are_found(setting, tmp_path):
    outcomes = together(tmp_path, 2, lambda rank: run(setting, replace(CONFIG, lr=0.01 + 1e-9 * rank)))
    for error in outcomes:
        assert isinstance(error, RankError) and "coefficients of rank 1 differ" in str(error)


def test_a_merge_in_the_group_that_torchrun_describes(base, adapters, texts, tmp_path):
    """Twice in the same processes; then ranks with different seeds are refused."""
    settings = dict(steps=5, lr=0.05, dtype="float64", progress=False)

    def work(rank):
        one, two = (nsc.merge(base, adapters, texts, **settings) for _ in range(2))
        assert torch.equal(one.coefficients, two.coefficients)
        with pytest.raises(RankError, match="data or settings of rank 1 differ"):
            nsc.merge(base, adapters, texts, seed=rank, **settings)
        return one.coefficients, one.report.to_dict()

    (first, told), (second, _) = together(tmp_path, 2, work, environment=True)
    expected = nsc.merge(base, adapters, texts, **settings)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected.coefficients, **CLOSE)
    for name in ("ratio_before", "ratio_after"):
        torch.testing.assert_close(told[name], expected.report.to_dict()[name], rtol=0, atol=1e-6)


def test_others_that_never_come(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RankError, match=r"rank 1 of 2 does not find the others .*MASTER_ADDR.*torchrun"):
        join("cpu")
    with pytest.raises(RankError, match="cannot share cuda:1; give cuda"):
        join("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert join("cpu").size == 1


@pytest.mark.slow
def test_the_command_line_under_torchrun(command, tmp_path):
    """One of two ranks dies, two new ones resume; they write one result, which equals that of a single process."""
    from typer.testing import CliRunner

    from nsc.cli import app

    (tmp_path / "dies.py").write_text(
        "import os, nsc.learning.loop as learn; from nsc.cli import app; step = learn.take_step\n"
        "def die(run, *rest):\n"
        "    if run.step == 20 and os.environ['RANK'] == '1': os._exit(9)\n"
        "    return step(run, *rest)\n"
        "learn.take_step = die; app()"
    )
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    killed = torchrun(2, [str(tmp_path / "dies.py")], command, out)
    assert killed.returncode == 1 and "nsc (rank 0): rank 0 of 2 lost the others" in killed.stderr
    assert unsealed((partial / "checkpoint.pt").read_bytes())[1]["step"] == 20 and not out.exists()

    done = torchrun(2, ["-m", "nsc"], command, out, "--resume")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1 and done.stderr.count("measured at") == 1 and not partial.exists()
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path / "alone")]).exit_code == 0
    ours, theirs = (load_file(tmp_path / name / "coefficients.safetensors") for name in ("out", "alone"))
    torch.testing.assert_close(ours, theirs, **CLOSE)
