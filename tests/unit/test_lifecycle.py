"""The start/stop contract: any order, any number of times, and no background loop that dies silently."""

from __future__ import annotations

import asyncio

import pytest

from orchestra import _lifecycle
from orchestra.testing import Recorder


class Log(_lifecycle.Service):
    def __init__(self, fail=None):
        super().__init__()
        self.log = []
        self.fail = fail
        self.gate = None

    async def _start(self):
        self.log.append("start")
        if self.gate is not None:
            await self.gate.wait()
        if self.fail == "start":
            self.spawn("doomed", self.forever)
            raise RuntimeError("cannot start")

    async def _stop(self):
        self.log.append("stop")
        if self.fail == "stop":
            raise RuntimeError("cannot stop")

    async def forever(self):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.log.append("cancelled")
            raise


@pytest.fixture
def quick(monkeypatch):
    """Restarts without waiting."""
    monkeypatch.setattr(_lifecycle.Reconnect, "next", lambda self: setattr(self, "failures", self.failures + 1) or 0.0)


async def test_starting_and_stopping_twice():
    service = Log()
    assert not service.running
    assert await service.start() is service
    await service.start()
    assert service.running
    await service.stop()
    await service.stop()
    assert not service.running
    assert service.log == ["start", "stop"]


async def test_stopping_what_was_never_started():
    service = Log()
    await service.stop()
    assert service.log == []


async def test_starting_again():
    service = Log()
    for _ in range(2):
        async with service:
            assert service.running
    assert service.log == ["start", "stop"] * 2


async def test_stopping_while_it_starts():
    service = Log()
    service.gate = asyncio.Event()
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    stopping = asyncio.create_task(service.stop())
    await asyncio.sleep(0)
    assert service.log == ["start"], "a stop waits for the start"
    service.gate.set()
    await asyncio.gather(starting, stopping)
    assert service.log == ["start", "stop"]
    assert not service.running


async def test_starting_concurrently_starts_once():
    service = Log()
    await asyncio.gather(*(service.start() for _ in range(3)))
    assert service.log == ["start"]
    await asyncio.gather(*(service.stop() for _ in range(3)))
    assert service.log == ["start", "stop"]


async def test_a_failed_start_leaves_nothing_running():
    service = Log(fail="start")
    with pytest.raises(RuntimeError, match="cannot start"):
        await service.start()
    assert not service.running
    assert not service._loops
    await service.stop()
    assert "stop" not in service.log


async def test_a_cancelled_start_leaves_nothing_running():
    service = Log()
    service.gate = asyncio.Event()
    starting = asyncio.create_task(service.start())
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert not service.running


async def test_a_failed_stop_still_ends_the_loops():
    service = await Log(fail="stop").start()
    service.spawn("loop", service.forever)
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="cannot stop"):
        await service.stop()
    assert service.log == ["start", "stop", "cancelled"]
    assert not service.running


async def test_loops_end_with_the_service():
    service = await Log().start()
    tasks = [service.spawn(f"loop {i}", service.forever) for i in range(3)]
    assert tasks[0].get_name() == "orchestra:loop 0"
    await asyncio.sleep(0)
    await service.stop()
    assert all(task.cancelled() for task in tasks)
    assert service.log.count("cancelled") == 3


async def test_a_loop_may_stop_its_own_service():
    service = await Log().start()
    done = asyncio.Event()

    async def stops():
        await service.stop()
        done.set()

    service.spawn("stopper", stops)
    async with asyncio.timeout(5):
        await done.wait()
    assert not service.running


async def test_a_loop_that_returns_is_done():
    service = await Log().start()
    runs = []

    async def once():
        runs.append(1)

    await service.spawn("once", once)
    assert runs == [1]
    await service.stop()


async def test_a_loop_that_raises_is_told_and_restarted(quick, caplog):
    service = await Log().start()
    runs = []

    async def flaky():
        runs.append(1)
        if len(runs) < 4:
            raise ValueError(f"run {len(runs)}")

    with Recorder("service.loop_failed") as recorder:
        await service.spawn("flaky", flaky)
    assert len(runs) == 4
    events = recorder.of("service.loop_failed", loop="flaky")
    assert [event.measurements["failures"] for event in events] == [1, 2, 3]
    assert [str(event.metadata["error"]) for event in events] == ["run 1", "run 2", "run 3"]
    assert len([r for r in caplog.records if r.exc_info and r.message == "background loop flaky failed"]) == 3
    await service.stop()


async def test_a_loop_that_keeps_failing_fails_the_service(quick):
    failures = []

    class Watched(Log):
        def failed(self, name, error):
            super().failed(name, error)
            failures.append((name, str(error)))

    service = await Watched().start()
    runs = []

    async def broken():
        runs.append(1)
        raise ValueError("always")

    await service.spawn("broken", broken)
    assert failures == [("broken", "always")]
    assert len(runs) == _lifecycle.MAX_RESTARTS + 1
    assert str(service._failure) == "always"
    await service.stop()
    await service.start()
    assert service._failure is None, "a new start is a new chance"
    await service.stop()
