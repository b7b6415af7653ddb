"""The numbers of this machine, in <device>.json, and what each of them was made with.

Every benchmark that passes is written as soon as it is done, so that a run cut short keeps what it had. Entries of
earlier runs stay until they are measured again.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
STATS = ("median", "min", "max", "mean", "stddev", "iqr", "rounds")  # seconds, but for the last


@lru_cache(maxsize=1)
def device_name() -> str:
    """Return the name of the GPU that torch sees, or else of the CPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    from cpuinfo import get_cpu_info

    return f"CPU {get_cpu_info().get('brand_raw') or platform.machine()}"


def file_name() -> str:
    """Return the name of this device's file of numbers; that of a CPU says the number of threads."""
    threads = "" if torch.cuda.is_available() else f" {torch.get_num_threads()} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device_name()}{threads}".lower()).strip("-")
    return f"{slug}.json"


def commit() -> str:
    """Return what git says, or COMMIT where a copy of the tree comes without its history."""
    git = ["git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        told = subprocess.run(git, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:
        told = ""
    return os.environ.get("COMMIT") or told or "unknown"


def provenance() -> dict[str, Any]:
    """Return what a number depends on beside the code that it names."""
    return {
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **({"cuda": torch.version.cuda or torch.version.hip} if torch.cuda.is_available() else {}),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "peft")},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def entry(name: str, group: str | None, extra_info: dict[str, Any], stats: Any, made: dict[str, Any]) -> dict[str, Any]:
    """Return one number: its name, its times in seconds (without the single rounds), and the rates that follow."""
    seconds = {field: getattr(stats, field) for field in STATS}
    return {
        "fullname": name,
        "group": group,
        "extra_info": extra_info | rates(extra_info, seconds["median"]),
        "stats": seconds,
        "made": made,
    }


def rates(info: dict[str, Any], seconds: float) -> dict[str, float]:
    """Return GB/s, the fraction of the copy's, and TFLOP/s, from what ``info`` counts and a time."""
    found = {}
    if "bytes" in info:
        found["gb_per_s"] = info["bytes"] / seconds / 1e9
    if "bytes" in info and "copy_gb_per_s" in info:
        found["fraction_of_copy"] = found["gb_per_s"] / info["copy_gb_per_s"]
    if "flops" in info:
        found["tflop_per_s"] = info["flops"] / seconds / 1e12
    return found


def add_earlier(entries: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Return new entries, and those of ``file`` that were not measured again, in the order of their names."""
    earlier = json.loads(file.read_text())["benchmarks"] if file.is_file() else []
    merged = {entry["fullname"]: entry for entry in [*earlier, *entries]}
    return [merged[name] for name in sorted(merged)]


def keep(entries: list[dict[str, Any]], file: Path) -> None:
    """Add entries to ``file``, which is never seen half written."""
    lines = ",\n".join(map(json.dumps, add_earlier(entries, file)))
    text = f'{{"benchmarks": [\n{lines}\n]}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_suffix(".partial")
    draft.write_text(text)
    draft.replace(file)
