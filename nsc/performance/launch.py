"""How a merge is started: on one device, several, or several nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nsc.console import metric
from nsc.performance.costs import Memory

USABLE = 0.9  # of a device's memory: the rest is for its context and for what an allocator cannot hand out


@dataclass(frozen=True)
class LaunchPlan:
    """One way to start a merge.

    Attributes:
        way: "single", "replicas", "8-bit", "sharded" or "none".
        devices: number of devices that it takes.
        passes: passes of a step, on each device.
        command: to type; None where there is no way.
        why: the reason.
    """

    way: str
    devices: int
    passes: int
    command: str | None
    why: str


def choose_launch(memory: Memory, room: float, gpus: int, nodes: int, itemsize: int) -> LaunchPlan:
    """Choose the simplest way to start a merge that memory allows.

    In this order: one device, a replica on each, sharded over the devices there are, 8-bit weights on one device,
    sharded over more devices than there are. Passes are as many as memory requires.

    Args:
        memory: memory of a step in one pass.
        room: bytes that are usable on each device.
        gpus: devices per node.
        nodes: how many there are.
        itemsize: bytes per weight.

    Returns:
        The way, which may be "none".
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
            return LaunchPlan(
                "single", 1, _passes(memory, 1, fit), "nsc merge ...", "the base and a sample fit one device"
            )
        used = math.ceil(memory.samples / math.ceil(memory.samples / there))
        why = f"the base fits one device, so {used} of {there} share the {memory.samples} samples of a step"
        return LaunchPlan("replicas", used, _passes(memory, used, fit), _torchrun(gpus, nodes), why)
    if not (shards and shards <= there) and (fit := memory.in_8_bits(itemsize).samples_within(room)):
        why = f"{too_large}; in 8 bits they do, or {split}"
        return LaunchPlan("8-bit", 1, _passes(memory, 1, fit), "nsc merge ... --weights int8", why)
    if not shards:
        return LaunchPlan("none", 1, 0, None, f"{too_large}, in 8 bits neither; {split}")
    devices = max(shards, there)
    fit = memory.sharded(devices).samples_within(room)
    command = _torchrun(gpus, math.ceil(devices / gpus)) + " --shard"
    return LaunchPlan(
        "sharded", devices, _passes(memory, devices, fit), command, f"{too_large}; {split}, there are {there}"
    )


def _passes(memory: Memory, devices: int, fit: int) -> int:
    return math.ceil(math.ceil(memory.samples / devices) / max(fit, 1))


def _torchrun(gpus: int, nodes: int) -> str:
    across = f"--nnodes {nodes} --rdzv_endpoint HOST:PORT --rdzv_backend c10d " if nodes > 1 else ""
    return f"torchrun {across}--nproc_per_node {gpus} -m nsc merge ..."
