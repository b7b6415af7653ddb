"""Options and fixtures of the benchmarks. Every benchmark that passes is kept in benchmarks/results/<device>.json."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import record
import timing

PASSED = pytest.StashKey[bool]()
WRITTEN = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --base FOLDER, --dense and --results FOLDER."""
    parser.addoption("--base", help="folder of SmolLM2-135M; default: random weights of its shapes (the same times)")
    parser.addoption("--dense", action="store_true", help="measure the dense formulations of merging methods too")
    parser.addoption("--results", type=Path, default=record.HERE / "results", help="folder for the numbers")


@pytest.fixture(scope="session")
def made() -> dict[str, Any]:
    """Return what the numbers of this run are made with."""
    return record.provenance()


@pytest.fixture(scope="session")
def copy_gb_per_s() -> float:
    """Return GB/s of a large device copy in this run, bytes read and written."""
    return timing.copy_gb_per_s()


@pytest.fixture(autouse=True)
def kept(request: pytest.FixtureRequest, pytestconfig: pytest.Config, made: dict[str, Any]) -> Iterator[None]:
    """Write the number of a benchmark as soon as it has passed."""
    yield
    benchmark = request.node.funcargs.get("benchmark")
    if benchmark is None or benchmark.stats is None or not request.node.stash.get(PASSED, False):
        return
    file = pytestconfig.getoption("results") / record.file_name()
    now = {**made, "load_average": os.getloadavg()[0]}  # a CPU's times are only as good as the machine was quiet
    entry = record.entry(request.node.nodeid, benchmark.group, benchmark.extra_info, benchmark.stats.stats, now)
    record.keep([entry], file)
    pytestconfig.stash[WRITTEN] = file


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """Note on the test itself whether it passed, where its fixtures can see it."""
    outcome = yield
    if call.when == "call":
        item.stash[PASSED] = outcome.get_result().passed


def pytest_terminal_summary(config: pytest.Config, terminalreporter: Any) -> None:
    """Say where the numbers are."""
    if WRITTEN in config.stash:
        terminalreporter.write_line(f"numbers in {config.stash[WRITTEN]}")
