"""The devices a merge may run on, and which way of running it they allow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from nsc.errors import NSCError
from nsc.performance.costs import Memory

USABLE = 0.9  # of a device's memory: the rest is for its context and for what an allocator cannot hand out


@dataclass(frozen=True)
class Hardware:
    """One device: dense FLOPs a second in 16 bits and in float32, bytes a second and bytes of its memory."""

    flops: float
    flops_float32: float
    bandwidth: float
    memory: float


HARDWARE = {  # datasheets
    "A100-80": Hardware(312e12, 19.5e12, 2.04e12, 80e9),
    "H100": Hardware(989e12, 67e12, 3.35e12, 80e9),
    "H200": Hardware(989e12, 67e12, 4.8e12, 141e9),
    "B200": Hardware(2250e12, 75e12, 8e12, 180e9),
    "MI300X": Hardware(1307e12, 163e12, 5.3e12, 192e9),
    "cpu": Hardware(237e9, 118e9, 25e9, 16e9),  # one Zen 4 core at 3.7 GHz: 64 and 32 FLOPs a cycle
}


def get_hardware(
    name: str, flops: float | None = None, bandwidth: float | None = None, memory: float | None = None
) -> Hardware:
    """A device of the table by name, with these figures instead of its own (``flops`` in every dtype).

    Raises NSCError for an unknown name or a figure that is not positive.
    """
    given = {"flops": flops, "flops_float32": flops, "bandwidth": bandwidth, "memory": memory}
    changes = {key: value for key, value in given.items() if value is not None}
    require_positive(changes)
    return replace(choice("hardware", name, HARDWARE), **changes)


@dataclass(frozen=True)
class Launch:
    """way: single, replicas, 8-bit, sharded or none.  devices: that it takes.  passes: of a step, on each of them.

    command: None where there is no way.
    """

    way: str
    devices: int
    passes: int
    command: str | None
    why: str


def choose_launch(memory: Memory, room: float, gpus: int, nodes: int, itemsize: int) -> Launch:
    """The simplest way that ``room`` bytes a device allow: one device, a replica on each, sharded over those there are,
    8-bit weights on one, sharded over more than there are. Passes are as many as memory asks for.
    """
    there, shards = gpus * nodes, memory.fewest_shards(room)
    too_large = f"{metric(memory.weights, 'B')} of weights and one sample do not fit a device"
    split = (
        f"sharding takes {shards} devices at least"
        if shards
        else "sharding does not help: what each device holds does not fit"
    )
    if fit := memory.samples_within(room):
        if there == 1:
            return Launch("single", 1, _passes(memory, 1, fit), "nsc merge ...", "the base and a sample fit one device")
        used = math.ceil(memory.samples / math.ceil(memory.samples / there))
        why = f"the base fits one device, so {used} of {there} share the {memory.samples} samples of a step"
        return Launch("replicas", used, _passes(memory, used, fit), _torchrun(gpus, nodes), why)
    if not (shards and shards <= there) and (fit := memory.in_8_bits(itemsize).samples_within(room)):
        why = f"{too_large}; in 8 bits they do, or {split}"
        return Launch("8-bit", 1, _passes(memory, 1, fit), "nsc merge ... --weights int8", why)
    if not shards:
        return Launch("none", 1, 0, None, f"{too_large}, in 8 bits neither; {split}")
    devices = max(shards, there)
    fit = memory.sharded(devices).samples_within(room)
    command = _torchrun(gpus, math.ceil(devices / gpus)) + " --shard"
    return Launch(
        "sharded", devices, _passes(memory, devices, fit), command, f"{too_large}; {split}, there are {there}"
    )


def choice(name: str, value: str, choices: Mapping[str, Any]) -> Any:
    """``choices[value]``. Raises NSCError listing them."""
    if value not in choices:
        raise NSCError(f"{name} {value!r} is unknown; give one of {', '.join(choices)}")
    return choices[value]


def require_positive(values: Mapping[str, float]) -> None:
    """Raises NSCError naming the first that is not."""
    for name, value in values.items():
        if not value > 0:
            raise NSCError(f"{name} must be more than 0, not {value:g}")


def metric(value: float, unit: str = "") -> str:
    """Three digits with a metric prefix."""
    power = min(max(math.floor(math.log10(value) / 3), -3), 6) if value > 0 else 0
    return f"{value / 1000**power:.3g} {'nµm kMGTPE'[power + 3].strip()}{unit}".strip()


def _passes(memory: Memory, devices: int, fit: int) -> int:
    return math.ceil(math.ceil(memory.samples / devices) / max(fit, 1))


def _torchrun(gpus: int, nodes: int) -> str:
    across = f"--nnodes {nodes} --rdzv_endpoint HOST:PORT --rdzv_backend c10d " if nodes > 1 else ""
    return f"torchrun {across}--nproc_per_node {gpus} -m nsc merge ..."
