"""What committing one step of a workflow costs, by its place in the plan and by the size of the plan.

Owed: committing step 1,000 of a plan costs what committing step 1 costs: at most 1.25 times the server's time and the round
trip. Measured are ``begin`` and ``finish`` of steps 1, 10, 100 and 1,000 of sequential plans of 1,001 and of 10,000 steps.
Server time is what ``INFO commandstats`` counts for EVALSHA; the same step of many equal workflows is committed, in turns
with the others, so that what else the machine does falls on all of them.
Run: ``python -m pytest benchmarks/bench_workflow_commit.py --benchmark-enable -s``.
"""

from __future__ import annotations

import asyncio
import statistics
import time

import pytest

from benchmarks._server import Server, awake_cores
from orchestra.connections import ConnectionManager
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask
from orchestra.workflow import StepState, WorkflowEngine

OWED_RATIO = 1.25
PLACES = (1, 10, 100, 1_000)
SIZES = (1_001, 10_000)
"""One more than the last place: ending the workflow is no part of committing a step."""
COPIES = {1_001: 40, 10_000: 8}


async def prepare(engine: WorkflowEngine, size: int, copies: int) -> dict[int, list[str]]:
    """Workflows in which all steps before a place have ended, for each place."""
    plan = [{"action": "a", "args": {"n": n}} for n in range(size)]
    names: dict[int, list[str]] = {place: [] for place in PLACES}
    for place in PLACES:
        for copy in range(copies):
            name = f"{size}-{place}-{copy}"
            await engine.initialize_workflow(BaseTask(name, "t"), plan, driven=True)
            for index in range(place - 1):
                await engine.begin(name, index, 1, 1)
                await engine.finish(name, index, 1, StepState.COMPLETED, "r", fence=1)
            names[place].append(name)
    return names


async def server_us(manager: ConnectionManager) -> tuple[float, float]:
    """Microseconds and calls of EVALSHA so far."""
    stats = await manager.client.info("commandstats")
    row = stats.get("cmdstat_evalsha", {"usec": 0, "calls": 0})
    return row["usec"], row["calls"]


async def measure(url: str, size: int, copies: int) -> dict[int, tuple[float, float]]:
    """Median server µs and round trip µs of a commit (begin and finish), by place."""
    async with ConnectionManager(url) as manager:
        engine = WorkflowEngine(MemoryManager(manager, namespace="bench"))
        names = await prepare(engine, size, copies)
        cost: dict[int, list[tuple[float, float]]] = {place: [] for place in PLACES}
        for turn in range(len(names[1])):
            for place in PLACES[turn % 4 :] + PLACES[: turn % 4]:  # none of them always first
                name, before, began = names[place][turn], await server_us(manager), time.perf_counter()
                await engine.begin(name, place - 1, 1, 1)
                moved = await engine.finish(name, place - 1, 1, StepState.COMPLETED, "r", fence=1)
                spent, after = time.perf_counter() - began, await server_us(manager)
                assert moved.done
                assert after[1] - before[1] == 2
                cost[place].append((after[0] - before[0], spent * 1e6))
        return {place: tuple(map(statistics.median, zip(*rows, strict=True))) for place, rows in cost.items()}


@pytest.mark.parametrize("size", SIZES)
def test_a_commit_costs_the_same_anywhere(benchmark, size):
    server = Server()
    copies = 1 if benchmark.disabled else COPIES[size]
    try:
        with awake_cores(not benchmark.disabled):
            cost = benchmark.pedantic(lambda: asyncio.run(measure(server.url, size, copies)), rounds=1)
    finally:
        server.stop()
    print(f"\nplan of {size:,} steps: begin and finish of one step")
    first = cost[1]
    for place, (server_time, trip) in cost.items():
        ratios = server_time / first[0], trip / first[1]
        print(
            f"  step {place:>5,}: server {server_time:5.0f} µs ({ratios[0]:.2f}), round trips {trip:6.0f} µs ({ratios[1]:.2f})"
        )
        benchmark.extra_info[f"step {place}"] = [round(server_time, 1), round(trip, 1)]
    assert benchmark.disabled or cost[1_000][0] <= OWED_RATIO * first[0]
