"""CUDA graphs: work that recurs is launched by one call of the host; the same kernels, the same bits.

The first call with arguments of one shape runs as usual, since kernels are compiled and caches filled on first sight.
The second runs on a side stream, as a graph's warm-up must, and is recorded behind that. From the third on, the batch
is copied to where the recorded one lay, and the graph is replayed. All graphs share one pool of memory, which holds
nothing between two replays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.runtime.sharding import shards_of

MOST_GRAPHS = 32  # that live at once, the first met twice; others run as usual


class Recorder(Protocol):
    """How a device records work, and replays it."""

    device: torch.device

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` as it must be run before it is recorded."""

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """What replays ``work``, which is not run here. Raises whatever makes that impossible."""

    def forget(self) -> None:
        """Give back the memory of graphs that are gone."""


class CudaRecorder:
    """By ``torch.cuda.CUDAGraph``, as in https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run ``work`` on the side stream, between what was launched before and what comes after."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """A graph of what ``work`` launches. Raises RuntimeError if it waits for the device."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Start a new pool: one that all graphs have left is not to be recorded into."""
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class _Recorded(NamedTuple):
    batch: Batch | None  # where the graph reads
    replay: Callable[[], None]


class Graphs:
    """Calls work, and replays it once it recurs.

    recorder: None to run everything as usual.  say: told once, why recording had to be given up.
    Work takes a batch or nothing, returns nothing, and keeps nothing but what it writes into tensors made before it;
    every value that changes from call to call must be read from a tensor.
    """

    def __init__(self, recorder: Recorder | None = None, say: Callable[[str], Any] = print) -> None:
        self.recorder = recorder
        self.say = say
        self.replayed = 0
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, work: Callable[..., None], batch: Batch | None = None) -> None:
        """Do ``work``, of ``batch`` where there is one.

        Raises torch.OutOfMemoryError where memory does not hold a pass and its graph.
        """
        arguments = () if batch is None else (batch,)
        key = (work, *((name, x.shape, x.dtype) for name, x in _tensors(batch).items()))
        if found := self._recorded.get(key):
            for name, tensor in _tensors(found.batch).items():
                tensor.copy_(_tensors(batch)[name], non_blocking=True)
            found.replay()
            self.replayed += 1
        elif self.recorder and key in self._seen and len(self._recorded) < MOST_GRAPHS:
            self._record(key, work, batch)
        else:
            self._seen.add(key)
            work(*arguments)

    def clear(self) -> None:
        """Drop all graphs and their memory; what recurs is recorded anew."""
        self._seen.clear()
        self._recorded.clear()
        if self.recorder:
            self.recorder.forget()

    def _record(self, key: Any, work: Callable[..., None], batch: Batch | None) -> None:
        assert self.recorder
        device = self.recorder.device
        static = batch and batch._map(lambda x: x.to(device, copy=True, non_blocking=True))

        def recorded() -> None:
            work(*(() if static is None else (static,)))

        self.recorder.warm_up(recorded)
        try:
            self._recorded[key] = _Recorded(static, self.recorder.record(recorded))
        except Exception as error:  # torch and the driver raise many kinds; the work itself is done
            self.clear()
            if batch is not None and ran_out(error):
                raise torch.OutOfMemoryError(str(error)) from error
            self.recorder = None
            self.say(f"no CUDA graphs, since a step could not be recorded ({first_line(error)}); learning goes on")


def make_graphs(model: nn.Module, wanted: bool, say: Callable[[str], Any]) -> Graphs:
    """Graphs for steps of ``model``, or none, saying why not."""
    if not wanted:
        return Graphs()
    if why := obstacle(model):
        say(f"no CUDA graphs: {why}")
        return Graphs()
    return Graphs(CudaRecorder(next(model.parameters()).device), say)


def obstacle(model: nn.Module) -> str | None:
    """Why steps of ``model`` cannot be recorded, as far as that shows beforehand; None where it does not."""
    if shards_of(model):
        return "the processes gather the base's weights within a step"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"the base's weights lie on {', '.join(devices)}"
    return None if devices[0].startswith("cuda") else f"the base is on {devices[0]}"


def ran_out(error: BaseException | None) -> bool:
    """Whether memory ran out, in the end: ending a recording that failed raises another error."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def first_line(error: BaseException) -> str:
    """The first line of its message, or else its kind."""
    return str(error).partition("\n")[0] or type(error).__name__


def _tensors(batch: Batch | None) -> dict[str, Tensor]:
    if batch is None:
        return {}
    own = {"task": batch.task, "weight": batch.weight, "segment": batch.segment}
    inputs = {f"inputs.{name}": value for name, value in batch.inputs.items()}
    return inputs | {name: value for name, value in own.items() if value is not None}
