"""Run the benchmarks of this machine and keep the numbers in benchmarks/results/<device>.json.

    python benchmarks/record.py [pytest arguments]

Entries of earlier runs stay until they are measured again; each says what it was made with.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from cpuinfo import get_cpu_info

HERE = Path(__file__).parent


def device_name() -> str:
    """The GPU that torch sees, or else the CPU."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU {get_cpu_info()['brand_raw']}"


def results_file() -> Path:
    """Where the numbers of this device are kept; those of a CPU by its number of threads."""
    threads = "" if torch.cuda.is_available() else f" {torch.get_num_threads()} threads"
    slug = re.sub(r"[^a-z0-9]+", "-", f"{device_name()}{threads}".lower()).strip("-")
    return HERE / "results" / f"{slug}.json"


def provenance() -> dict[str, Any]:
    """What a number depends on beside the code that it names."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=HERE, capture_output=True)
    return {
        "commit": commit.stdout.decode().strip() or "unknown",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def add_earlier(entries: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """New entries, and those of ``file`` that were not measured again, in the order of their names."""
    earlier = json.loads(file.read_text())["benchmarks"] if file.is_file() else []
    merged = {entry["fullname"]: entry for entry in [*earlier, *entries]}
    return [merged[name] for name in sorted(merged)]


if __name__ == "__main__":
    file = results_file()
    draft = file.with_suffix(".partial")  # pytest-benchmark empties its file when it starts
    os.chdir(HERE.parent)
    code = pytest.main(["-o", "testpaths=benchmarks", f"--benchmark-json={draft}", *sys.argv[1:]])
    if draft.is_file() and draft.stat().st_size:
        entries = json.loads(draft.read_text())["benchmarks"]
        file.write_text(json.dumps({"benchmarks": add_earlier(entries, file)}, indent=1) + "\n")
        print(f"results in {file}")
    draft.unlink(missing_ok=True)
    sys.exit(code)
