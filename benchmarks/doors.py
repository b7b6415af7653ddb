"""The ways into an op, on inputs so small that only the host's work counts."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from timing import CUDA, DEVICE
from torch import Tensor

import nsc_kernels
from nsc_kernels._op import Launch

N, D, M, RANKS = 8, 64, 64, (8, 8)  # each a multiple of what kernels are specialised for, as real shapes are
DTYPE = torch.bfloat16
OPS = ("null_space_ratio", "ratio_from_energy", "lora_down", "lora_up", "lora_fold")
DIFFERENTIABLE = {  # positions of the arguments that get a gradient in a merge
    "null_space_ratio": (0, 1),
    "ratio_from_energy": (0, 1),
    "lora_down": (0,),
    "lora_up": (0, 1, 2),
    "lora_fold": (2,),
}


def arguments(op: str, gradient: bool) -> list[Any]:
    """Return what the op takes, as the merge calls it (routed and weighted, no Gram), on this device."""
    kwargs = {"device": DEVICE, "dtype": DTYPE}
    z, u, y = (torch.randn(N, width, **kwargs) for width in (D, sum(RANKS), M))
    A, B = torch.randn(sum(RANKS), D, **kwargs), torch.randn(M, sum(RANKS), **kwargs)
    c, row = torch.rand(sum(RANKS), device=DEVICE), torch.rand(N, device=DEVICE)
    adapter, offsets = torch.arange(N, device=DEVICE) % len(RANKS), torch.tensor([0, 8, 16], device=DEVICE)
    args = {
        "null_space_ratio": [z, u, None, adapter, offsets, row],
        "ratio_from_energy": [row + 50, u, None, adapter, offsets, row],
        "lora_down": [z, A, True],
        "lora_up": [y, u, c, B],
        "lora_fold": [torch.randn(M, D, **kwargs), B, c, A],
    }[op]
    for position in DIFFERENTIABLE[op] if gradient else ():
        args[position].requires_grad_()
    return args


def public(op: str) -> Callable:
    """Return the function that users call, made to take what the op takes."""
    function = getattr(nsc_kernels, op)
    if op in ("null_space_ratio", "ratio_from_energy"):
        return lambda x, u, gram, adapter, offsets, weight: function(
            x, u, gram, adapter=adapter, offsets=offsets, weight=weight
        )
    return (lambda z, lora_A, _energy: function(z, lora_A)) if op == "lora_down" else function


def doors(op: str) -> dict[str, Callable]:
    """Return the ways to call an op by name: in full, past the checks, and through torch's dispatcher."""
    registered = importlib.import_module(f"nsc_kernels.{op}")._forward_op
    found = {"public": public(op), "op": registered, "registered": registered.registered}
    return found if CUDA else found | {"reference": registered.reference}


def call(function: Callable, args: list[Any]) -> Callable[[], Any]:
    """Return a call of ``function``, with a backward to whatever of ``args`` requires a gradient."""
    leaves = [x for x in args if isinstance(x, Tensor) and x.requires_grad]
    if not leaves:
        return lambda: function(*args)
    grads = [torch.ones_like(x) for x in _differentiable(function(*args))]
    return lambda: torch.autograd.grad(_differentiable(function(*args)), leaves, grads)


def _differentiable(returned: Any) -> list[Tensor]:
    tensors = [returned] if isinstance(returned, Tensor) else returned
    return [x for x in tensors if x.requires_grad]


@contextmanager
def without_kernels() -> Iterator[None]:
    """Let ops prepare their launches as on a GPU, and launch nothing.

    It is meant for a machine without a GPU.
    """
    with (
        patch.object(Launch, "run", lambda self: None),
        patch("nsc_kernels._op.runs_triton", lambda args: True),
    ):
        yield


def launches_of(function: Callable[[], Any]) -> list[Launch]:
    """Return the launches of a call, ready to run again without anything around them."""
    found: list[Launch] = []
    run = Launch.run

    def keep(launch: Launch) -> None:
        found.append(launch)
        run(launch)

    with patch.object(Launch, "run", keep):
        function()
    return found


def run_all(launches: list[Launch]) -> None:
    """Run these launches and nothing else."""
    for launch in launches:
        launch.run()


def captured(function: Callable[[], Any], calls: int) -> Callable[[], None]:
    """Return the replay of a CUDA graph of that many calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # once outside the graph, on a stream of its own, as torch asks
        function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph.replay
