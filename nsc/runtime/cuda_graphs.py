"""CUDA graphs: the host launches recurring work by one call, with the same kernels and the same bits as eager mode.

The first call with arguments of one shape runs eagerly, since it compiles kernels and fills caches. The second runs on
a side stream, as the warm-up of a graph must, and is then recorded. From the third call on, the batch is copied to
where the recorded one lies, and the graph is replayed. All graphs share one memory pool, which holds nothing between
two replays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nsc.batch import Batch
from nsc.errors import first_line
from nsc.runtime.sharding import shards_of

MOST_GRAPHS = 32  # kept at once; shapes that recur after that many run eagerly


class Recorder(Protocol):
    """What a device needs to record and replay work.

    Attributes:
        device: where the work runs.
    """

    device: torch.device

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work as it must run once before it is recorded.

        Args:
            work: what will be recorded.
        """

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record work without running it.

        Args:
            work: what to record, warmed up before.

        Returns:
            A function that replays it.

        Raises:
            Exception: of any kind that torch or the driver raises, if the work cannot be recorded.
        """

    def forget(self) -> None:
        """Give back the memory of graphs that nothing refers to any more."""


class CudaRecorder:
    """Records on a GPU by ``torch.cuda.CUDAGraph``.

    Args:
        device: the GPU.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Callable[[], None]) -> None:
        """Run work on the side stream, after all that was launched before and ahead of all that comes after.

        Args:
            work: what will be recorded.
        """
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            work()
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record the kernels that work launches as a graph in the shared pool.

        Args:
            work: what to record, warmed up before.

        Returns:
            The graph's ``replay``.

        Raises:
            RuntimeError: if the work waits for the device.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
            work()
        return graph.replay  # type: ignore[no-any-return]

    def forget(self) -> None:
        """Start a new pool, since torch does not record into one whose graphs are all gone."""
        self.pool = torch.cuda.graph_pool_handle()
        torch.cuda.empty_cache()


class _Recorded(NamedTuple):
    batch: Batch | None  # the tensors that the graph reads
    replay: Callable[[], None]


class Graphs:
    """Runs work, and replays it as a graph once it recurs.

    Work takes a batch or nothing and returns nothing. Its only effect must be what it writes into tensors that existed
    before it, and it must read every value that changes from call to call from a tensor.

    Args:
        recorder: how to record; None to run everything eagerly.
        say: called at most once, with the reason why recording was given up.
    """

    def __init__(self, recorder: Recorder | None = None, say: Callable[[str], Any] = print) -> None:
        self.recorder = recorder
        self.say = say
        self.replayed = 0
        self._seen: set[Any] = set()
        self._recorded: dict[Any, _Recorded] = {}

    def __call__(self, work: Callable[..., None], batch: Batch | None = None) -> None:
        """Run work, or replay it.

        Args:
            work: the same object in every call that should be replayed.
            batch: its argument, if it takes one.

        Raises:
            torch.OutOfMemoryError: if memory does not hold a pass and its graph.
        """
        arguments = () if batch is None else (batch,)
        key = (work, *((name, x.shape, x.dtype) for name, x in _tensors(batch).items()))
        if graph := self._recorded.get(key):
            for name, tensor in _tensors(graph.batch).items():
                tensor.copy_(_tensors(batch)[name], non_blocking=True)
            graph.replay()
            self.replayed += 1
        elif self.recorder and key in self._seen and len(self._recorded) < MOST_GRAPHS:
            self._record(key, work, batch)
        else:
            self._seen.add(key)
            work(*arguments)

    def clear(self) -> None:
        """Drop all graphs and their memory; work that recurs is recorded anew."""
        self._seen.clear()
        self._recorded.clear()
        if self.recorder:
            self.recorder.forget()

    def _record(self, key: Any, work: Callable[..., None], batch: Batch | None) -> None:
        assert self.recorder
        device = self.recorder.device
        static = batch and batch.map(lambda x: x.to(device, copy=True, non_blocking=True))

        def recorded() -> None:
            work(*(() if static is None else (static,)))

        self.recorder.warm_up(recorded)
        try:
            self._recorded[key] = _Recorded(static, self.recorder.record(recorded))
        except Exception as error:  # torch and the driver raise many kinds; the warm-up did the work
            self.clear()
            if batch is not None and ran_out(error):
                raise torch.OutOfMemoryError(str(error)) from error
            self.recorder = None
            self.say(f"no CUDA graphs, since a step could not be recorded ({first_line(error)}); learning goes on")


def make_graphs(model: nn.Module, wanted: bool, say: Callable[[str], Any]) -> Graphs:
    """Return what runs the steps of a model.

    Args:
        model: the base that the steps run.
        wanted: whether steps should be recorded.
        say: called with the reason if they are wanted but cannot be recorded.

    Returns:
        Graphs that record on the model's GPU, or graphs that run everything eagerly.
    """
    if not wanted:
        return Graphs()
    if why := obstacle(model):
        say(f"no CUDA graphs: {why}")
        return Graphs()
    return Graphs(CudaRecorder(next(model.parameters()).device), say)


def obstacle(model: nn.Module) -> str | None:
    """Say why steps of a model cannot be recorded, as far as the model shows it beforehand.

    Args:
        model: the base that the steps run.

    Returns:
        The reason, or None where recording is worth a try.
    """
    if shards_of(model):
        return "the processes gather the base's weights within a step"
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1:
        return f"the base's weights lie on {', '.join(devices)}"
    return None if devices[0].startswith("cuda") else f"the base is on {devices[0]}"


def ran_out(error: BaseException | None) -> bool:
    """Say whether an error goes back to memory that ran out.

    CUDA ends a recording that failed with an error of its own, which hides the first one.

    Args:
        error: what was raised, with its causes and contexts.

    Returns:
        Whether any of them is ``torch.OutOfMemoryError``.
    """
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _tensors(batch: Batch | None) -> dict[str, Tensor]:
    return {} if batch is None else batch.tensors()
