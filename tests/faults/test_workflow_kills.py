"""SIGKILL at every marked point of a workflow, fifty seeded times: it ends right, and nothing that was committed repeats.

Every seed has a workflow of its own: six steps as a graph, carried by an orchestrator and a worker process. One of them
dies at a marked point; another takes its place, and dies too in every third seed. Agents note each call in the event log
of the workflow, so calls and commits have one order.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest

from orchestra.memory import MemoryManager
from orchestra.tasks import TaskState
from orchestra.workflow import StepState, WorkflowEngine

PROGRAM = Path(__file__).with_name("_workflow_worker.py")
SEEDS = range(50)
AT_ONCE = 4
PATIENCE = 120.0
POINTS = {
    "before planning": 1,
    "after planning": 1,
    "initialised, not sent": 1,
    "begun, agent not called": 6,
    "in the agent": 6,
    "agent returned, not committed": 6,
    "committed, next not sent": 6,
    "next sent, not settled": 6,
    "workflow ended, not settled": 1,
}
"""Marked points, and how often a process that does everything alone passes each at least."""
OF_ORCHESTRATOR = ("before planning", "after planning", "initialised, not sent")
EXPECTED = {"a": [], "b": [0], "c": [0], "d": [1], "e": [1, 2], "f": [3, 4]}


class Zygote:
    """The process that forks the others."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.killed: Counter[str] = Counter()
        self.names: dict[int, str] = {}
        self._waiting: dict[str, list[asyncio.Future[int]]] = {}
        self._ends: dict[int, asyncio.Future[tuple[int, int]]] = {}
        self._reading = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for line in self.process.stdout:
            told = json.loads(line)
            if "started" in told:
                pid = told["started"]
                self._ends[pid] = asyncio.get_running_loop().create_future()
                waiter = self._waiting[f"{told['role']} {told['name']}"].pop(0)
                if not waiter.done():
                    waiter.set_result(pid)
            else:
                self._ends[told["ended"]].set_result((told["signal"], told["code"]))

    async def start(self, role: str, name: str, **order) -> int:
        future = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(f"{role} {name}", []).append(future)
        line = json.dumps({"role": role, "name": name, "serve": True, **order})
        self.process.stdin.write(line.encode() + b"\n")
        return await future

    async def ended(self, pid: int) -> tuple[int, int]:
        """Signal and exit code of a process that has ended."""
        return await asyncio.shield(self._ends[pid])

    def end(self, pid: int, how: int = signal.SIGKILL) -> None:
        if not self._ends[pid].done():
            with contextlib.suppress(ProcessLookupError):  # it has ended, and that is not read yet
                os.kill(pid, how)

    async def close(self) -> None:
        for pid in self._ends:
            self.end(pid)
        self.process.stdin.close()
        await self.process.wait()
        self._reading.cancel()


@pytest.fixture
async def zygote(redis_url):
    process = await asyncio.create_subprocess_exec(
        sys.executable, PROGRAM, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    made = Zygote(process)
    yield made
    await made.close()


async def carry(zygote: Zygote, name: str, seed: int) -> str:
    """Let processes die and others take over until the workflow has ended; the point at which the first one died."""
    rng = random.Random(seed)
    point = list(POINTS)[seed % len(POINTS)]
    order = {"point": point, "hit": rng.randint(1, POINTS[point])}
    alone = point in OF_ORCHESTRATOR or rng.random() < 0.5  # the orchestrator runs the steps, too
    if alone:
        first = await zygote.start("orchestrator", name, **order)
    else:
        waiting = await zygote.start("orchestrator", name, serve=False)
        first = await zygote.start("worker", name, **order)
    assert await zygote.ended(first) == (signal.SIGKILL, 0), (seed, point)
    again = {}
    if seed % 3 == 0:
        again = {"point": rng.choice(list(POINTS)), "hit": rng.randint(1, 3)}
    second = await zygote.start("worker", name, **again)
    if alone:
        waiting = await zygote.start("orchestrator", name)
    while await first_of(zygote, waiting, second) == second:
        second = await zygote.start("worker", name)
    assert await zygote.ended(waiting) == (0, 0), (seed, point)
    zygote.end(second, signal.SIGTERM)
    by = await zygote.ended(second)
    assert by in ((0, 0), (signal.SIGKILL, 0), (signal.SIGTERM, 0)), (seed, point)  # the last: it had hardly begun
    return point


async def first_of(zygote: Zygote, one: int, other: int) -> int:
    """Which of two processes has ended."""
    ends = {pid: asyncio.ensure_future(zygote.ended(pid)) for pid in (one, other)}
    await asyncio.wait(ends.values(), return_when=asyncio.FIRST_COMPLETED)
    found = one if ends[one].done() else other
    for waiter in ends.values():
        waiter.cancel()
    return found


async def check(manager, name: str) -> None:
    """The workflow ended right; each step was committed once, and no agent was called for it after that."""
    engine = WorkflowEngine(MemoryManager(manager, namespace=name))
    state = await engine.load_workflow_state(name)
    assert state.status is TaskState.COMPLETED, state.error
    assert [step.state for step in state.steps] == [StepState.COMPLETED] * 6
    assert {step.id: step.result["of"] for step in state.steps} == EXPECTED
    assert [step.result["step"] for step in state.steps] == list(range(6))
    assert state.workflow_context["final_output"] == state.steps[5].result
    events = [event async for event in engine.events(name)]
    kinds = Counter(event.kind for event in events)
    assert (kinds["workflow.started"], kinds["workflow.completed"]) == (1, 1)
    committed, called = [], Counter()
    for event in events:
        if event.kind == "step.completed":
            committed.append(event.step)
        elif event.kind == "agent.call":
            assert event.step not in committed, f"step {event.step} of {name} ran again after its commit"
            called[event.step] += 1
    assert sorted(committed) == sorted(called) == list(range(6))
    assert max(called.values()) <= 3, called
    assert not await manager.client.exists(f"late:{name}")


@pytest.mark.slow
async def test_killed_at_every_point_a_workflow_ends_right_and_repeats_nothing_committed(zygote, manager):
    turns, points = asyncio.Semaphore(AT_ONCE), Counter()

    async def one(seed: int) -> None:
        async with turns:
            points[await carry(zygote, f"kill{seed}", seed)] += 1
            await check(manager, f"kill{seed}")

    async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
        for seed in SEEDS:
            group.create_task(one(seed))
    assert set(points) == set(POINTS)
    assert points.total() == len(SEEDS)
