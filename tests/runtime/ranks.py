"""Several gloo processes on this machine, forked or under torchrun, and checks that they learn what one does."""

import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from nsc.config import MergeConfig
from nsc.learning.loop import learn
from nsc.runtime.distributed import join

TARGETS = ["layers.2.self_attn.v_proj", "layers.3.self_attn.v_proj"]
CONFIG = MergeConfig(steps=12, lr=1e-2)
LENGTHS = {"a": (4, 17, 5), "b": (9, 2, 2, 6, 3), "c": (11,)}
CLOSE = {"rtol": 0, "atol": 1e-9}
ROOT = Path(__file__).parents[2]


def run(setting, config=CONFIG, batches=None, **options):
    """Call ``learn`` in the group that this process belongs to, if any."""
    model, stack, own = setting
    return learn(model, stack, TARGETS, batches or own, config, progress=False, team=join(), **options)


def together(folder, size, work, environment=False):
    """Call ``work(rank)`` in ``size`` forked processes; what each returned or raised, or its exit code if it died.

    The processes form a gloo group here; with ``environment`` they find each other by the variables of torchrun.
    """
    meeting, port = folder / uuid.uuid4().hex, free_port()

    def process(rank):
        torch.set_num_threads(1)  # a thread pool does not survive a fork
        if environment:
            os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        else:
            group = dict(init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=timedelta(seconds=30))
            dist.init_process_group("gloo", **group)
        try:
            outcome = work(rank)
        except BaseException as error:
            outcome = error
        meeting.with_suffix(f".{rank}").write_bytes(pickle.dumps(outcome))

    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=process, args=(rank,)) for rank in range(size)]
    for one in processes:
        one.start()
    deadline = time.monotonic() + 60
    for one in processes:
        one.join(max(0, deadline - time.monotonic()))
    hung = [rank for rank, one in enumerate(processes) if one.is_alive()]
    for rank in hung:
        processes[rank].kill()
    assert not hung, f"rank {hung} hung"
    files = [meeting.with_suffix(f".{rank}") for rank in range(size)]
    return [pickle.loads(f.read_bytes()) if f.exists() else p.exitcode for f, p in zip(files, processes, strict=True)]


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def assert_same(learned, expected):
    """All ranks have the same bits, and learned what one process did."""
    for one in learned:
        assert torch.equal(one.coefficients, learned[0].coefficients) and one.losses == learned[0].losses
    torch.testing.assert_close(learned[0].coefficients, expected.coefficients, **CLOSE)
    torch.testing.assert_close(learned[0].losses, expected.losses, **CLOSE)
    assert torch.equal(learned[0].frozen, expected.frozen)
    assert (expected.coefficients - CONFIG.start).abs().max() > 0.05  # not merely the start


def torchrun(size, launcher, command, out, *more):
    """Run ``command`` by ``launcher`` in ``size`` processes."""
    ranks = ["-m", "torch.distributed.run", "--nproc_per_node", str(size), "--master_port", free_port()]
    process = [sys.executable, *ranks, *launcher, *command, "--out", str(out), *more]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(process, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=120)
