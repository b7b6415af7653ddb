"""Options of the benchmarks, and what their JSON says beside the times."""

from __future__ import annotations

from typing import Any

import pytest
from record import provenance


def pytest_addoption(parser: pytest.Parser) -> None:
    """--base FOLDER."""
    parser.addoption("--base", help="folder of SmolLM2-135M; default: random weights of its shapes (the same times)")


def pytest_benchmark_update_json(output_json: dict[str, Any]) -> None:
    """Say what each number was made with, and leave out the single rounds."""
    made = provenance()
    for entry in output_json["benchmarks"]:
        entry["made"] = made
        entry["stats"].pop("data", None)
