"""Processes of the kill test: ``python _workflow_worker.py`` imports everything once and forks one for each line it reads.

A line is JSON: ``role`` ("orchestrator" or "worker"), ``name`` (queue, namespace and workflow), ``serve``, ``point`` and
``hit``: the process kills itself with SIGKILL when it comes to that marked point for the ``hit``-th time. Answers are
JSON lines: ``{"started": pid, "role", "name"}``, ``{"ended": pid, "signal": number or 0, "code": exit code}``.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import select
import signal
import sys
import traceback

from orchestra._workflow import redis_store
from orchestra._workflow.driver import Driver
from orchestra._workflow.planning import Planning
from orchestra._workflow.runner import StepRunner
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.memory import MemoryManager
from orchestra.orchestration_worker_pool import QueueWorkerPool
from orchestra.orchestrator import Orchestrator
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.workflow import WorkflowEngine

SWEEP = 0.2
LEASE_MS = 10_000
"""Long enough for a busy machine; what a killed process held is adopted at once, as its death can be proved."""
PLAN = [
    {"id": "a", "action": "work", "args": {"of": []}},
    {"id": "b", "action": "work", "args": {"of": [{"$ref": "a.step"}]}, "depends_on": ["a"]},
    {"id": "c", "action": "work", "args": {"of": [{"$ref": "a.step"}]}, "depends_on": ["a"]},
    {"id": "d", "action": "work", "args": {"of": [{"$ref": "b.step"}]}, "depends_on": ["b"]},
    {"id": "e", "action": "work", "args": {"of": [{"$ref": "b.step"}, {"$ref": "c.step"}]}, "depends_on": ["b", "c"]},
    {"id": "f", "action": "work", "args": {"of": [{"$ref": "d.step"}, {"$ref": "e.step"}]}, "depends_on": ["d", "e"]},
]
"""Six steps; each returns its own index as ``step`` and what it was given."""


class Mark:
    """Dies at ``point`` when it is passed for the ``hit``-th time."""

    def __init__(self, point: str | None, hit: int) -> None:
        self.point, self.left = point, hit

    def __call__(self, point: str) -> None:
        if point == self.point:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


def mark_points(mark: Mark) -> None:
    """Pass the marked points where the product does."""
    plan, make, begin, finish, send = (
        Planning.plan,
        WorkflowEngine.initialize_workflow,
        WorkflowEngine.begin,
        WorkflowEngine.finish,
        Driver.send,
    )

    async def planned(self, task):
        mark("before planning")
        result = await plan(self, task)
        mark("after planning")
        return result

    async def made(self, *args, **kwargs):
        state = await make(self, *args, **kwargs)
        mark("initialised, not sent")
        return state

    async def begun(self, *args, **kwargs):
        result = await begin(self, *args, **kwargs)
        if result.verdict == "go":
            mark("begun, agent not called")
        return result

    async def finished(self, *args, **kwargs):
        mark("agent returned, not committed")
        moved = await finish(self, *args, **kwargs)
        mark("committed, next not sent")
        if moved.done and moved.status.value == "completed":
            mark("workflow ended, not settled")
        return moved

    async def sent(self, *args, **kwargs):
        await send(self, *args, **kwargs)
        mark("next sent, not settled")

    Planning.plan, WorkflowEngine.initialize_workflow, WorkflowEngine.begin = planned, made, begun
    WorkflowEngine.finish, Driver.send = finished, sent


async def main(order: dict) -> None:
    mark = Mark(order.get("point"), order.get("hit", 0))
    mark_points(mark)
    name, agents = order["name"], AgentRegistry()
    manager = ConnectionManager(os.environ["ORCHESTRA_REDIS_URL"])
    queue = RedisStreamTaskQueue(name, "workers", LEASE_MS, manager=manager, max_deliveries=10)
    memory = MemoryManager(manager, namespace=name)
    await manager.connect()
    redis = manager.client

    redis_store.GRACE_MS = int(SWEEP * 1000)
    engine = WorkflowEngine(memory)

    @agents.agent("planner")
    async def planner(task):
        return PLAN

    @agents.agent("work")
    async def work(task):
        step = task.metadata["workflow"]["step_index"]
        if not await engine.emit(name, "agent.call", {"fence": task.fence, "pid": os.getpid()}, step=step):
            await redis.rpush(f"late:{name}", step)
        mark("in the agent")
        return {"step": step, "of": task.input["of"], "fence": task.fence}

    if order["role"] == "worker":
        runner = StepRunner(engine, queue, agents=agents, sweep=SWEEP)
        dispatcher = Dispatcher(queue, agents=agents, workflows=runner, block_timeout_ms=200)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, dispatcher._stopped.set)
        await dispatcher.run()
    else:
        pool = QueueWorkerPool("steps")
        orchestrator = Orchestrator(queue, memory, pool, agents=agents, serve=order["serve"], sweep=SWEEP)
        await orchestrator.process_incoming_task(name, {"type": "report", "input": {"n": 1}})
        await pool.shutdown()
    await queue.close()
    await manager.close()


def say(**facts) -> None:
    os.write(1, json.dumps(facts).encode() + b"\n")


def fork(order: dict) -> None:
    pid = os.fork()
    if pid:
        say(started=pid, role=order["role"], name=order["name"])
        return
    code = 1
    if sys.platform == "linux":  # none of them outlives the test
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    try:
        asyncio.run(main(order))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def serve() -> None:
    buffer = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            more = os.read(0, 65536)
            if not more:
                return
            *lines, buffer = (buffer + more).split(b"\n")
            for line in lines:
                fork(json.loads(line))
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if not pid:
                break
            died = os.WIFSIGNALED(status)
            say(ended=pid, signal=os.WTERMSIG(status) if died else 0, code=0 if died else os.WEXITSTATUS(status))


if __name__ == "__main__":
    sys.stdout.flush()
    serve()
