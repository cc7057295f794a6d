"""What one needs to test code that uses orchestra: a queue in memory, time by hand, agents by script, events to wait for.

Shipped for users and used by orchestra's own tests. Nothing here imports a test framework, and nothing sleeps::

    clock = ManualClock()
    queue = InMemoryTaskQueue(clock=clock)
    await queue.produce({"type": "report", "delay": 3600.0})
    clock.advance(3600.0)
    ((message_id, task),) = await queue.consume("test")
"""

from orchestra.memory_queue import InMemoryTaskQueue
from orchestra.testing.agents import (
    HangingAgent,
    ScriptedAgent,
    SimulatedCrash,
    StubbornAgent,
    block,
    crash,
    fail,
    fail_times,
    hang,
    ignore_cancellation,
    succeed,
)
from orchestra.testing.clock import ManualClock
from orchestra.testing.events import Recorded, Recorder
from orchestra.testing.mocks import AsyncLockMock, MockAgent, MockAgentFactory, MockWorkerPool, Submitted
from orchestra.testing.queue import MockTaskQueue
from orchestra.testing.redis import MockRedis

__all__ = [
    "AsyncLockMock",
    "HangingAgent",
    "InMemoryTaskQueue",
    "ManualClock",
    "MockAgent",
    "MockAgentFactory",
    "MockRedis",
    "MockTaskQueue",
    "MockWorkerPool",
    "Recorded",
    "Recorder",
    "ScriptedAgent",
    "SimulatedCrash",
    "StubbornAgent",
    "Submitted",
    "block",
    "crash",
    "fail",
    "fail_times",
    "hang",
    "ignore_cancellation",
    "succeed",
]
