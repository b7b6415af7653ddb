"""The devices a merge may run on, and which way of running it they allow."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nsc.checks import require_choice, require_positive


@dataclass(frozen=True)
class Hardware:
    """One device, by its datasheet.

    Attributes:
        flops: dense FLOP/s in 16 bits.
        flops_float32: FLOP/s in float32.
        bandwidth: bytes/s of its memory.
        memory: bytes.
    """

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
    """Return a device of the table, with some figures replaced.

    Args:
        name: one of HARDWARE.
        flops: FLOP/s in every dtype.
        bandwidth: bytes/s.
        memory: bytes.

    Returns:
        The device.

    Raises:
        NSCError: for an unknown name, or a figure that is not positive.
    """
    given = {"flops": flops, "flops_float32": flops, "bandwidth": bandwidth, "memory": memory}
    changes = {key: value for key, value in given.items() if value is not None}
    require_positive(changes)
    require_choice("hardware", name, HARDWARE)
    return replace(HARDWARE[name], **changes)
