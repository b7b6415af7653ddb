"""A CUDA graph without CUDA: operators are recorded with the tensors they ran on, and replayed on the same tensors.

A tape behaves as a graph does: it repeats only what goes through torch's dispatcher, values that the host computed stay
as they were in the recording, waiting for the device is refused, and recording leaves all tensors unchanged.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")


class Tape(TorchDispatchMode):
    """A dispatch mode that records the operators inside its ``with``, and repeats them in ``replay``."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = {}  # storage -> a tensor made in it while recording, as in a graph's memory pool
        self.before = {}  # storage -> (tensor, its value) for older tensors that are written to

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.__name__.split(".")[0] in WAITING:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for x in written(func, args, kwargs):
            if place(x) not in self.made and place(x) not in self.before:
                self.before[place(x)] = x, x.clone()
        given = {place(x) for x in tensors((args, kwargs))}
        now = as_is((args, kwargs))
        out = func(*args, **kwargs)
        self.made |= {place(x): x for x in tensors(out) if place(x) not in given}
        if torch.Tag.inplace_view not in func.tags:
            self.calls.append((func, *now, as_is(out)))
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        with torch.no_grad():
            for x, value in self.before.values():
                x.copy_(value)

    @torch.no_grad()
    def replay(self):
        self.poison()
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tensors(out), tensors(again), strict=True):
                if place(old) != place(new):
                    old.copy_(new)
        self.poison()

    def poison(self):
        """Fill the pool with NaN: a replay may read nothing it has not computed, since graphs share the memory."""
        for x in self.made.values():
            whole = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
            whole.fill_(float("nan") if x.is_floating_point() else 0)


class TapeRecorder:
    """The ``nsc.runtime.cuda_graphs.Recorder`` of the CPU, in place of ``CudaRecorder``."""

    def __init__(self, device):
        self.device = device
        self.tapes = []

    def warm_up(self, work):
        work()

    def record(self, work):
        with Tape() as tape:
            work()
        self.tapes.append(tape)
        return tape.replay

    def forget(self):
        pass


@torch.no_grad()
def as_is(tree):
    """Aliases of the tensors with their present shapes, which a later ``unsqueeze_`` does not change."""
    return tree_map_only(Tensor, torch.ops.aten.alias.default, tree)


def place(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def tensors(tree) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def written(func, args, kwargs) -> list[Tensor]:
    """The arguments that ``func`` writes into, according to its schema."""
    schema = func._schema.arguments
    named = {a.name: value for a, value in zip(schema, args, strict=False)} | kwargs
    return tensors([named[a.name] for a in schema if a.name in named and a.alias_info and a.alias_info.is_write])
