"""A process that is killed inside a step loses that step and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap

from orchestra.memory import MemoryManager
from orchestra.tasks import TaskState
from orchestra.workflow import WorkflowEngine

CRASH = """
    import asyncio, os, sys
    from orchestra.agents import AgentRegistry
    from orchestra.memory import MemoryManager
    from orchestra.orchestration_worker_pool import QueueWorkerPool
    from orchestra.orchestrator import Orchestrator

    async def main(crash):
        agents, log = AgentRegistry(), os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        async def planner(task):
            return [{"action": "work", "args": {"n": n}} for n in range(5)]
        async def work(task):
            os.write(log, b"%d\\n" % task.input["n"])
            if crash and task.input["n"] == 3:
                print("in step 3", flush=True)
                await asyncio.sleep(60)
            return task.input["n"]
        agents.register("planner", planner)
        agents.register("work", work)
        orchestrator = Orchestrator(None, MemoryManager(), QueueWorkerPool("p"), agents=agents)
        await orchestrator.process_incoming_task("t1", {"type": "report"})

    asyncio.run(main(sys.argv[2] == "crash"))
"""


async def test_after_a_kill_only_the_step_in_flight_runs_again(manager, redis_url, tmp_path):
    program, log = tmp_path / "program.py", tmp_path / "log"
    program.write_text(textwrap.dedent(CRASH))
    with subprocess.Popen([sys.executable, program, log, "crash"], stdout=subprocess.PIPE, text=True) as crashing:
        assert await asyncio.to_thread(crashing.stdout.readline) == "in step 3\n"
        os.kill(crashing.pid, signal.SIGKILL)
    engine = WorkflowEngine(MemoryManager(manager))
    state = await engine.load_workflow_state("t1")
    assert [step.state.value for step in state.steps] == ["completed"] * 3 + ["running", "pending"]
    await asyncio.to_thread(subprocess.run, [sys.executable, program, log, "resume"], check=True, timeout=30)
    state = await engine.load_workflow_state("t1")
    assert state.status is TaskState.COMPLETED
    assert log.read_text().split() == ["0", "1", "2", "3", "3", "4"]
    assert [step.attempt for step in state.steps] == [1, 1, 1, 2, 1]
