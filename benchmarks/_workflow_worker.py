"""The processes of the workflow benchmark: ``python -m benchmarks._workflow_worker MODE URL WORKFLOWS STEPS``.

``lead`` starts the workflows, runs steps, waits until all have ended and writes one JSON line; ``help`` only runs steps,
until killed. Says ``ready`` on stderr. Every workflow is a chain whose steps refer to the one before: what travels is a
reference and a small result, and every step is committed to Redis before the next may begin.
"""

from __future__ import annotations

import asyncio
import cProfile
import json
import os
import pstats
import sys
import time

from benchmarks._worker import run_loop
from orchestra._process import set_heap_aside
from orchestra._workflow.driver import Driver
from orchestra._workflow.runner import StepRunner
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.memory import MemoryManager
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.workflow import WorkflowEngine

NAME = "bench"
CONCURRENCY = 256


def plan(steps: int) -> list[dict]:
    """A chain: every step gets the number of the one before and returns the next."""
    chain = [{"action": "count", "args": {"n": 0}}]
    return chain + [{"action": "count", "args": {"n": {"$ref": f"{i}.n"}}} for i in range(steps - 1)]


async def main(mode: str, url: str, workflows: int, steps: int) -> None:
    calls, agents = 0, AgentRegistry()

    @agents.agent("count")
    async def count(task):
        nonlocal calls
        calls += 1
        return {"n": task.input["n"] + 1}

    async with ConnectionManager(url) as manager:
        queue = RedisStreamTaskQueue(NAME, "workers", manager=manager)
        engine = WorkflowEngine(MemoryManager(manager, namespace=NAME))
        runner = StepRunner(engine, queue, agents=agents)
        async with Dispatcher(queue, agents=agents, workflows=runner, max_concurrent_dispatch=CONCURRENCY):
            set_heap_aside()
            sys.stderr.write("ready\n")
            if mode == "help":
                await asyncio.Event().wait()
            sys.stdin.readline()
            print(json.dumps(await _lead(Driver(engine, queue), manager, workflows, steps)), flush=True)
        await queue.close()


async def _lead(driver: Driver, manager: ConnectionManager, workflows: int, steps: int) -> dict:
    chain, began, cpu = plan(steps), time.monotonic(), time.process_time()
    ids = [f"w{number}" for number in range(workflows)]
    await asyncio.gather(*(driver.start("bench", plan=chain, id=name) for name in ids))
    started = time.monotonic()
    while (await manager.client.xlen(_ended(driver))) < workflows:
        await asyncio.sleep(0.01)
    ended = time.monotonic()
    cpu = time.process_time() - cpu
    states = [await driver.engine.load_workflow_state(name) for name in (ids[0], ids[-1])]
    outputs = [state.workflow_context.get("final_output") for state in states]
    return {"start_s": started - began, "run_s": ended - began, "cpu_s": cpu, "outputs": outputs}


def _ended(driver: Driver) -> str:
    from orchestra._keys import WorkflowKeys

    return WorkflowKeys(driver.namespace).ended


if __name__ == "__main__":
    todo = main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    if os.environ.get("ORCHESTRA_BENCH_PROFILE"):
        with cProfile.Profile() as profile:
            run_loop(todo)
        pstats.Stats(profile, stream=sys.stderr).sort_stats(os.environ["ORCHESTRA_BENCH_PROFILE"]).print_stats(60)
    else:
        run_loop(todo)
