"""Fixtures and the final table of the benchmarks. ``python -m pytest benchmarks --benchmark-enable --benchmark-only``.

Without ``--benchmark-enable`` every workload runs once and tiny, as a check that it works.
"""

from __future__ import annotations

import gc
import os

import pytest

from benchmarks import _beside
from benchmarks._server import TRANSPORT, Server, awake_cores
from benchmarks._table import QUICK, Comparisons, machine

SPIN = os.environ.get("ORCHESTRA_BENCH_SPIN", "") not in ("", "0")
COMPARISONS = Comparisons()


def pytest_configure(config):
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.fixture(scope="session")
def server():
    """A private server for all workloads, and cores that do not halt where that is asked for."""
    gc.collect()
    gc.freeze()  # the collector should see the workloads' objects, not pytest's
    with awake_cores(SPIN):
        server = Server()
        COMPARISONS.server = f"redis-server {server.version} on {TRANSPORT}{', cores kept awake' if SPIN else ''}"
        yield server
        server.stop()
    gc.unfreeze()


@pytest.fixture
def empty(server):
    """The server without data."""
    server.flush()
    return server


@pytest.fixture(scope="session")
def comparisons():
    return COMPARISONS


@pytest.fixture
def scale(benchmark):
    """Picks a size by how thorough the run is: ``scale(full, quick, smoke)``."""
    return lambda full, quick, smoke: smoke if benchmark.disabled else quick if QUICK else full


def pytest_terminal_summary(terminalreporter, config):
    micro = [bench for bench in _measured(config) if "ratio" in bench.extra_info or "ns" in bench.extra_info]
    if not COMPARISONS.rows and not micro and not _beside.LINES:
        return
    write = terminalreporter.write_line
    terminalreporter.section("orchestra beside the raw ceiling of the same run")
    write(machine(COMPARISONS.server or "no server"))
    for line in COMPARISONS.table() if COMPARISONS.rows else ():
        write(line)
    for bench in micro:
        write(f"{bench.name}: " + ", ".join(f"{key} {value}" for key, value in bench.extra_info.items()))
    for line in _beside.table() if _beside.LINES else ():
        write(line)
    if _measured(config) and COMPARISONS.rows:
        COMPARISONS.write_json()


def _measured(config):
    session = getattr(config, "_benchmarksession", None)
    return session.benchmarks if session is not None else []
