"""Many workers that become free in one turn of the event loop: none is forgotten, and they do not all look for the next."""

from __future__ import annotations

import asyncio
import time

import pytest

from orchestra import orchestration_worker_pool as pools
from orchestra._pool.slots import MORE
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool


class Counting(QueueWorkerPool):
    """Counts how often a worker was too late for its turn, and how often one was woken."""

    def __init__(self, workers):
        super().__init__("turns", OrchestrationWorkerPoolConfig(workers=workers, max_concurrent_tasks=workers))
        self.late = self.woken = 0

    async def _breathe(self):
        self.late += 1
        return await super()._breathe()

    async def _rest(self, slot):
        await super()._rest(slot)
        self.woken += 1


class Waves:
    """``waves`` times ``width`` items that all wait for the gate of their wave."""

    def __init__(self, width, waves, *, tells):
        self.width, self.left, self.ended = width, width * waves, 0
        self.running = 0
        self.most = 0
        self.gate = asyncio.Event()
        self.done = asyncio.Event()
        if tells:
            self.waiting = lambda: self.left

    def start_nowait(self, slot, until):
        if not self.left:
            return None
        self.left -= 1
        slot.source, slot.item = self, self.left
        return self.run()

    async def run(self):
        gate = self.gate
        self.running += 1
        self.most = max(self.most, self.running)
        if self.running == self.width:
            self.gate = asyncio.Event()
            self.running = 0
            gate.set()
        await gate.wait()
        self.ended += 1
        if not self.left and self.ended % self.width == 0:
            self.done.set()


@pytest.mark.parametrize("tells", [True, False], ids=["a source that tells", "one that does not"])
@pytest.mark.parametrize("turn", [0.0, 1e-4, 0.002, 1e9], ids=["no turn", "short", "usual", "endless"])
async def test_every_item_of_every_wave_runs_whatever_a_turn_lasts(monkeypatch, turn, tells):
    monkeypatch.setattr(pools, "TURN", turn)
    width, waves = 200, 5
    source = Waves(width, waves, tells=tells)
    async with Counting(width) as pool:
        pool.attach(source)
        pool.wake()
        async with asyncio.timeout(60):
            await source.done.wait()
        pool.detach(source)
        assert (source.left, source.ended, source.most) == (0, width * waves, width)


async def test_being_late_does_not_cost_as_much_as_there_are_workers(monkeypatch):
    """One worker waits for the next turn; if all did, each item would cost as many looks as there are workers."""
    monkeypatch.setattr(pools, "TURN", 0.0)  # every item takes longer than a turn
    width, waves = 300, 6
    source = Waves(width, waves, tells=True)
    async with Counting(width) as pool:
        pool.attach(source)
        pool.wake()
        async with asyncio.timeout(60):
            await source.done.wait()
        pool.detach(source)
        assert pool.late < 30 * width * waves, "one item fits a turn, and each turn wakes as many as might have fit"


async def test_a_lone_item_wakes_nobody_else():
    source = Waves(1, 1, tells=True)
    async with Counting(10) as pool:
        pool.attach(source)
        for _ in range(5):
            source.left, source.done = 1, asyncio.Event()
            pool.wake()
            async with asyncio.timeout(60):
                await source.done.wait()
        assert pool.get_active_workers() == 1, "there was nothing for another worker"
        pool.detach(source)


async def test_the_one_that_waits_for_the_turn_may_be_cancelled(monkeypatch):
    """The others still get their turn: whoever is left runs everything."""
    monkeypatch.setattr(pools, "TURN", 0.0)
    ran = []

    class Plain:
        left = 2000

        def waiting(self):
            return self.left

        def start_nowait(self, slot, until):
            if not self.left:
                return None
            self.left -= 1
            slot.source, slot.item = self, self.left
            return self.run(slot.item)

        async def run(self, item):
            await asyncio.sleep(0)
            ran.append(item)

    source = Plain()
    async with Counting(50) as pool:
        pool.attach(source)
        pool.wake()
        cancelled, items = 0, source.left
        async with asyncio.timeout(60):
            while source.left:
                await asyncio.sleep(0)
                if source.left < 100 and cancelled < 5:
                    source.left, items = source.left + 500, items + 500
                leaders = [slot for slot in pool.slots if slot.item is None and slot.waiter is None]
                if pool._turning and leaders and cancelled < 5:
                    cancelled += leaders[0].task.cancel()
            while pool.get_running_tasks():
                await asyncio.sleep(0)
        pool.detach(source)
        assert cancelled == 5
        assert len(ran) == items


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize("how", ["begin", "wake"])
async def test_who_follows_a_worker_whose_agent_cancelled_it(how, waits):
    """The wake-up that the worker held is not lost: what waits behind that agent runs, though nobody calls again."""

    class Jobs:
        def __init__(self, *names):
            self.names, self.ran, self.idle = list(names), [], asyncio.Event()

        def waiting(self):
            return len(self.names)

        def start_nowait(self, slot, until):
            if not self.names:
                self.idle.set()
                return None
            slot.source, slot.item = self, self.names.pop(0)
            self.ran.append(slot.item)
            if slot.item != "first":
                return self.run()
            slot.task.cancel()
            return self.run() if waits else MORE

        async def run(self):
            await asyncio.sleep(0)

    jobs = Jobs()
    async with Counting(1) as pool:
        pool.attach(jobs)
        pool.wake()
        await jobs.idle.wait()
        await asyncio.sleep(0)
        jobs.names += ["first", "second", "third"]
        asyncio.get_running_loop().call_soon(getattr(pool, how))
        async with asyncio.timeout(20):
            while len(jobs.ran) < 3:
                await asyncio.sleep(0.001)
        pool.detach(jobs)
    assert jobs.ran == ["first", "second", "third"]


async def test_the_loop_has_its_turn_between_bursts(monkeypatch):
    """A timer fires while hundreds of workers have something to do that never ends."""
    monkeypatch.setattr(pools, "TURN", 0.001)
    stopped = asyncio.Event()

    class Endless:
        def start_nowait(self, slot, until):
            if stopped.is_set():
                return None
            slot.source, slot.item = self, 1
            return self.run()

        async def run(self):
            spun = time.monotonic() + 0.0001
            while time.monotonic() < spun:
                pass
            await asyncio.sleep(0)

    async with Counting(200) as pool:
        pool.attach(Endless())
        pool.wake()
        asyncio.get_running_loop().call_later(0.05, stopped.set)
        async with asyncio.timeout(60):
            await stopped.wait()
        assert stopped.is_set()
