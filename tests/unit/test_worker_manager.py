"""The worker manager: sampling what may fail, and a recommendation that settles."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest

from orchestra import telemetry
from orchestra.errors import ConfigurationError
from orchestra.worker_manager import WorkerManager


class Pool:
    name = "pool"

    def __init__(self, size=4, running=0, queued=0):
        self.size, self.running, self.queued = size, running, queued
        self.error: Exception | None = None
        self.looks = 0

    def get_active_workers(self):
        self.looks += 1
        if self.error:
            raise self.error
        return self.size

    def get_queue_size(self):
        return self.queued

    def get_running_tasks(self):
        return self.running


class Queue:
    def __init__(self, depth=0):
        self.depth = depth
        self.error: Exception | None = None

    async def get_queue_depth(self):
        if self.error:
            raise self.error
        return self.depth


async def advice(pool, queue=None, samples=3, **settings):
    manager = WorkerManager(pool, queue=queue, **settings)
    for _ in range(samples):
        await manager.sample()
    return manager.evaluate()


class TestRecommendation:
    async def test_more_when_busy_and_work_waits(self):
        got = await advice(Pool(size=4, running=4, queued=1))
        assert (got.current, got.recommended, got.change, got.samples) == (4, 5, 1, 3)
        assert "100% busy" in got.reason

    async def test_at_most_double(self):
        got = await advice(Pool(size=4, running=4, queued=500))
        assert got.recommended == 8

    async def test_not_beyond_the_maximum(self):
        got = await advice(Pool(size=4, running=4, queued=500), max_workers=6)
        assert got.recommended == 6
        assert "max_workers=6" in got.reason

    async def test_the_queue_counts_as_backlog(self):
        got = await advice(Pool(size=4, running=4), Queue(depth=104))
        assert (got.recommended, got.backlog) == (8, 100)

    async def test_what_runs_here_is_not_backlog(self):
        got = await advice(Pool(size=4, running=4), Queue(depth=4))
        assert (got.recommended, got.backlog) == (4, 0)

    async def test_one_quiet_moment_is_enough_not_to_grow(self):
        pool = Pool(size=4, running=4, queued=9)
        manager = WorkerManager(pool)
        await manager.sample()
        pool.queued = 0
        await manager.sample()
        assert manager.evaluate().change == 0

    async def test_less_when_idle(self):
        got = await advice(Pool(size=10, running=1))
        assert got.recommended == 5
        assert "1 of 10 busy" in got.reason

    async def test_not_below_the_minimum(self):
        got = await advice(Pool(size=4, running=0), min_workers=3)
        assert got.recommended == 3
        assert "min_workers=3" in got.reason

    async def test_one_busy_moment_is_enough_not_to_shrink(self):
        pool = Pool(size=10, running=0)
        manager = WorkerManager(pool)
        await manager.sample()
        pool.running = 6
        await manager.sample()
        pool.running = 0
        await manager.sample()
        assert manager.evaluate().change == 0

    @pytest.mark.parametrize("running", range(21))
    async def test_settles(self, running):
        """Following the advice under a constant load ends at a size for which nothing is recommended any more."""
        pool, sizes = Pool(size=20), []
        for _ in range(20):
            pool.running = min(running, pool.size)
            pool.queued = running - pool.running
            got = await advice(pool)
            sizes.append(got.recommended)
            pool.size = got.recommended
        assert len(set(sizes[10:])) == 1
        assert sizes[-1] >= running

    async def test_an_empty_pool(self):
        got = await advice(Pool(size=0, running=0, queued=5))
        assert (got.current, got.recommended) == (0, 1)

    async def test_concurrency_of_the_pool_is_its_size(self):
        pool = Pool(size=2, running=8, queued=3)
        pool.concurrency = 8
        got = await advice(pool)
        assert (got.current, got.recommended, got.utilisation) == (8, 11, 1.0)

    async def test_nothing_without_samples(self):
        manager = WorkerManager(Pool())
        assert manager.evaluate() is None
        assert manager.last_recommendation is None

    async def test_history_is_bounded(self):
        manager = WorkerManager(Pool(), history_size=3)
        for _ in range(10):
            await manager.sample()
            manager.evaluate()
        assert len(manager.history) == 3
        assert manager.last_recommendation is manager.history[-1]

    async def test_told(self, caplog):
        seen = []
        detach = telemetry.attach(lambda *event: seen.append(event), "manager.recommendation")
        try:
            with caplog.at_level(logging.INFO, "orchestra.worker_manager"):
                await advice(Pool(size=4, running=4, queued=1))
                await advice(Pool(size=4, running=2))
        finally:
            detach()
        assert [(event[1], event[2]["pool"]) for event in seen] == [
            ({"current": 4, "recommended": 5}, "pool"),
            ({"current": 4, "recommended": 4}, "pool"),
        ]
        assert [record.message.split(":")[0] for record in caplog.records] == ["pool pool"]


class TestErrors:
    async def test_a_pool_that_raises_is_survived_and_said_once(self, caplog):
        pool = Pool()
        manager = WorkerManager(pool)
        assert await manager.sample() is not None
        pool.error = RuntimeError("broken")
        assert [await manager.sample() for _ in range(3)] == [None] * 3
        assert (manager.errors, str(manager.last_error)) == (3, "broken")
        assert len(caplog.records) == 1
        pool.error = None
        assert await manager.sample() is not None
        assert manager.last_error is None

    async def test_a_queue_that_raises_does_not_hide_the_pool(self, caplog):
        queue = Queue()
        queue.error = ConnectionError("gone")
        manager = WorkerManager(Pool(running=2), queue=queue)
        for _ in range(3):
            sample = await manager.sample()
            assert (sample.running, sample.depth) == (2, None)
        assert manager.errors == 3
        assert len(caplog.records) == 1

    async def test_cancellation_is_not_swallowed(self):
        class Stuck(Queue):
            async def get_queue_depth(self):
                await asyncio.Event().wait()

        task = asyncio.ensure_future(WorkerManager(Pool(), queue=Stuck()).sample())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("monitor_interval", bad) for bad in (0, -1, math.nan, True, "15")),
            *(("scale_check_interval", bad) for bad in (0, math.inf, None)),
            *(("min_workers", bad) for bad in (-1, 1.0, True)),
            *(("max_workers", bad) for bad in (0, 2**40)),
            ("scale_up_at", 1.5),
            ("scale_down_at", 0.8),
            ("history_size", 0),
        ],
    )
    def test_bad_settings(self, field, value):
        with pytest.raises(ConfigurationError) as caught:
            WorkerManager(Pool(), **{field: value})
        assert caught.value.field == field
        assert repr(value) in str(caught.value)

    def test_bounds_that_cross(self):
        with pytest.raises(ConfigurationError, match="at least min_workers"):
            WorkerManager(Pool(), min_workers=5, max_workers=4)

    def test_what_cannot_be_observed(self):
        with pytest.raises(TypeError, match="worker_pool"):
            WorkerManager(object())
        with pytest.raises(TypeError, match="queue"):
            WorkerManager(Pool(), queue=object())


class TestService:
    async def test_samples_and_evaluates_until_stopped(self):
        pool = Pool(size=4, running=4, queued=2)
        manager = WorkerManager(pool, monitor_interval=0.001, scale_check_interval=0.005, queue=Queue())
        assert not manager.healthy
        async with asyncio.timeout(5):
            assert await manager.start() is manager
            assert manager.healthy
            assert manager.last_sample is not None
            while manager.last_recommendation is None:
                await asyncio.sleep(0.001)
            assert manager.last_recommendation.recommended == 6
            pool.error = RuntimeError("broken")
            errors = manager.errors
            while manager.errors < errors + 3:
                await asyncio.sleep(0.001)
            assert not manager.healthy
            pool.error = None
            while not manager.healthy:
                await asyncio.sleep(0.001)
        await manager.start()
        await manager.stop()
        await manager.stop()
        looks = pool.looks
        await asyncio.sleep(0.01)
        assert pool.looks == looks
        assert not manager.running

    async def test_as_the_specification_writes_it(self):
        manager = WorkerManager(worker_pool=Pool(), monitor_interval=15, scale_check_interval=60)
        await manager.start()
        await manager.stop()
        assert manager.last_sample.active == 4
