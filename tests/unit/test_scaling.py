"""Scaling under simulated loads: time is a manual clock, servers are a list. Nothing sleeps."""

from __future__ import annotations

import asyncio
import math

import pytest

from orchestra import AgentRegistry, Dispatcher, telemetry
from orchestra._pool.scaling import Demand, Scaler, ScalingPolicy
from orchestra.errors import ConfigurationError
from orchestra.orchestration_worker_pool import Histogram, OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.testing import ManualClock, MockTaskQueue
from orchestra.worker_manager import WorkerManager


class Plant:
    """A pool of ``size`` servers, each of which keeps a task for ``run`` seconds; a queue before them."""

    name = "plant"

    def __init__(self, clock, size, run):
        self.clock, self.concurrency, self.run = clock, size, run
        self.run_times, self.wait_times = Histogram(), Histogram()
        self.queue: list[float] = []
        self.ends: list[float] = []
        self.sizes = [size]
        self._owed = 0.0

    def get_active_workers(self):
        return self.concurrency

    def get_queue_size(self):
        return len(self.queue)

    def get_running_tasks(self):
        return len(self.ends)

    def resize(self, size):
        self.concurrency = size
        self.sizes.append(size)

    def step(self, rate):
        """One second, with ``rate`` arrivals."""
        self.clock.advance(1.0)
        now = self.clock.monotonic()
        self.ends = [end for end in self.ends if end > now or self.run_times.add(self.run)]
        self._owed += rate
        self.queue += [now] * int(self._owed)
        self._owed %= 1
        while self.queue and len(self.ends) < self.concurrency:
            self.wait_times.add(now - self.queue.pop(0))
            self.ends.append(now + self.run)


async def simulate(load, *, size=1, run=2.0, every=10, **settings):
    """The plant and its manager after ``load``, a list of arrivals a second, one each second."""
    clock = ManualClock()
    plant = Plant(clock, size, run)
    manager = WorkerManager(
        plant, autoscale=True, clock=clock, **{"max_workers": 500, "cooldown_down": 60.0, **settings}
    )
    await manager.sample()
    for second, rate in enumerate(load, 1):
        plant.step(rate)
        await manager.sample()
        if second % every == 0:
            manager.apply(manager.evaluate())
    return plant, manager


def turns(sizes):
    """How often a series of sizes changes its direction."""
    signs = [math.copysign(1, b - a) for a, b in zip(sizes, sizes[1:], strict=False) if a != b]
    return sum(a != b for a, b in zip(signs, signs[1:], strict=False))


async def test_a_step_is_followed_in_a_few_evaluations_and_settled():
    """40 tasks/s of 2 s keep 80 busy: from 4 to 80 or more in steps of at most 2 are 5 evaluations."""
    _, manager = await simulate([1.0] * 60 + [40.0] * 600, size=4)
    sizes = [advice.recommended for advice in manager.history]
    step = 6
    assert min(sizes[step + 7 :]) >= 80, sizes
    assert turns(sizes) <= 1, "up, and down once when the backlog of the beginning is gone"
    settled = sizes[-20:]
    assert len(set(settled)) == 1
    assert 80 <= settled[0] <= 80 / 0.6 / 0.75, "near the target, and not below the load"
    last = manager.last_recommendation
    assert last.arrival_rate == pytest.approx(40.0, rel=0.01)
    assert last.throughput == pytest.approx(40.0, rel=0.01)
    assert last.run_time == pytest.approx(2.0)
    assert last.wait_p95 < 2e-6
    assert "40 tasks/s x 2 s = 80 busy at 60%" in last.reason


async def test_a_step_down_is_followed_after_the_cooldown_and_settled():
    plant, manager = await simulate([40.0] * 300 + [4.0] * 600, size=100)
    sizes = [advice.recommended for advice in manager.history]
    assert sizes[-1] <= math.ceil(8 / 0.6 / 0.75)
    assert sizes[-1] >= 8
    assert turns(sizes) <= 1
    assert len(set(sizes[-10:])) == 1
    assert max(a / b for a, b in zip(plant.sizes, plant.sizes[1:], strict=False)) <= 2.0, "max_step"


@pytest.mark.parametrize("period", [7, 20, 45])
async def test_a_sawtooth_is_not_chased(period):
    """A load that rises and falls within the cooldown: one size that fits its peaks."""
    teeth = [10.0 + 30.0 * (second % period) / period for second in range(900)]
    _, manager = await simulate(teeth, size=60)
    sizes = [advice.recommended for advice in manager.history]
    assert turns(sizes) <= 1, sizes
    assert len(set(sizes[-40:])) == 1
    assert manager.last_recommendation.backlog <= 40 * 2


async def test_a_burst_is_drained_in_the_time_wanted():
    plant, manager = await simulate([0.0] * 9 + [600.0] + [0.0] * 400, size=10, target_wait=20.0, cooldown_down=30.0)
    grown = max(plant.sizes)
    assert grown >= 600 * 2 / 20 / 1.5, "600 tasks of 2 s in 20 s are 60 servers"
    assert plant.queue == []
    assert manager.last_recommendation.recommended == 1
    assert turns([advice.recommended for advice in manager.history]) <= 1


async def test_a_bound_that_holds_is_named():
    _, manager = await simulate([40.0] * 100, size=4, max_workers=16)
    assert manager.last_recommendation.recommended == 16
    assert "held at max_workers=16" in manager.last_recommendation.reason


async def test_a_cooldown_that_holds_is_named():
    _, manager = await simulate([20.0] * 50, size=2, cooldown_up=25.0)
    sizes = [advice.recommended for advice in manager.history]
    assert sizes == [2, 4, 4, 4, 8], "25 s after the second evaluation"
    assert "held: cooling down for" in manager.history[2].reason


async def test_without_autoscale_nothing_is_resized():
    clock = ManualClock()
    plant = Plant(clock, 2, 2.0)
    manager = WorkerManager(plant, clock=clock)
    for _ in range(20):
        plant.step(10.0)
        await manager.sample()
    assert manager.evaluate().recommended == 4
    assert plant.sizes == [2]


async def test_a_resize_that_fails_is_survived_and_said(caplog):
    clock = ManualClock()
    plant = Plant(clock, 2, 2.0)

    def broken(_size):
        raise RuntimeError("no")

    plant.resize = broken
    manager = WorkerManager(plant, clock=clock, autoscale=True)
    for _ in range(10):
        plant.step(10.0)
        await manager.sample()
    assert manager.apply(manager.evaluate()) is False
    assert (manager.errors, str(manager.last_error)) == (1, "no")
    assert "cannot resize plant" in caplog.text


async def test_delayed_tasks_are_no_backlog():
    class Stats:
        live, waiting = 1000, (0, 0, 3, 0)

    class Queue:
        async def get_queue_depth(self):
            return 1000

        async def stats(self):
            return Stats

    manager = WorkerManager(Plant(ManualClock(), 4, 1.0), queue=Queue())
    sample = await manager.sample()
    assert (sample.depth, sample.waiting, sample.backlog) == (1000, 3, 3)


async def test_a_real_pool_grows_under_load_and_shrinks_after_it():
    """The service itself on a QueueWorkerPool: jobs that wait for an event, then nothing."""
    gate, told = asyncio.Event(), []
    pool = QueueWorkerPool("real", OrchestrationWorkerPoolConfig(workers=2))
    manager = WorkerManager(
        pool,
        monitor_interval=0.001,
        scale_check_interval=0.004,
        autoscale=True,
        max_workers=16,
        cooldown_down=0.0,
    )
    detach = telemetry.attach(lambda _name, sizes, _meta: told.append((sizes["old"], sizes["new"])), "pool.resized")
    try:
        async with pool, asyncio.timeout(20):
            futures = [await pool.submit(gate.wait) for _ in range(40)]
            async with manager:
                assert pool.measuring
                while pool.get_running_tasks() < 16:
                    await asyncio.sleep(0.001)
                gate.set()
                await asyncio.gather(*futures)
                while pool.concurrency > 1:
                    await asyncio.sleep(0.001)
            assert not pool.measuring
    finally:
        detach()
    assert told[:3] == [(2, 4), (4, 8), (8, 16)]
    assert told[-1][1] == 1
    assert pool.metrics.completed == 40


async def test_a_dispatchers_pool_is_scaled_by_what_its_tasks_take():
    gate, agents, queue = asyncio.Event(), AgentRegistry(), MockTaskQueue("scaled")

    async def agent(_task):
        await gate.wait()

    agents.register("t", agent)
    pool = QueueWorkerPool("dispatched", OrchestrationWorkerPoolConfig(workers=1))
    manager = WorkerManager(
        pool,
        monitor_interval=0.001,
        scale_check_interval=0.004,
        queue=queue,
        autoscale=True,
        max_workers=8,
        cooldown_down=0.0,
    )
    await queue.produce_many([{"type": "t"} for _ in range(40)])
    async with asyncio.timeout(20), pool:
        async with Dispatcher(queue, worker_pool=pool, max_concurrent_dispatch=8, agents=agents), manager:
            while pool.get_running_tasks() < 8:
                await asyncio.sleep(0.001)
            gate.set()
            while await queue.get_queue_depth() or pool.concurrency > 1:
                await asyncio.sleep(0.001)
        assert pool.run_times.count == 40
        assert max(advice.backlog for advice in manager.history) >= 30


# -- the decision by itself


def demand(**facts):
    return Demand(
        **{
            "at": 0.0,
            "size": 10,
            "load": 0.5,
            "peak_load": 0.5,
            "peak_running": 5,
            "backlog": 0,
            "waited": 0,
            "most_waited": 0,
            **facts,
        }
    )


def test_workers_that_are_slowed_down_by_what_they_share_are_counted_by_what_they_do():
    """Ten workers that end 2 tasks a second each where their run time promises 10: the backlog needs five times more."""
    scaler = Scaler(ScalingPolicy(target_wait=10.0, max_step=100.0))
    facts = {"load": 1.0, "backlog": 400, "waited": 100, "most_waited": 400, "arrival_rate": 20.0, "run_time": 0.1}
    size, _ = scaler.decide(demand(throughput=20.0, **facts))
    assert size == math.ceil(20 * 0.1 / 0.6 + 400 / 10 / 2)


def test_what_shrinks_was_enough_for_a_whole_cooldown():
    scaler = Scaler(ScalingPolicy(cooldown_down=100.0, max_step=10.0))
    quiet = {"load": 0.1, "peak_load": 0.1, "throughput": 1.0, "run_time": 1.0, "size": 50}
    sizes = [
        scaler.decide(demand(at=at, arrival_rate=rate, **quiet))[0]
        for at, rate in ((0.0, 24.0), (50.0, 3.0), (99.0, 3.0), (101.0, 3.0))
    ]
    assert sizes == [40, 40, 40, 5]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("min_workers", bad) for bad in (-1, 1.0, True, None)),
        *(("max_workers", bad) for bad in (0, 2**40, "8")),
        *(("target_utilisation", bad) for bad in (0, -0.1, 1.1, math.nan, math.inf, "0.5")),
        *(("target_wait", bad) for bad in (0, -1, math.nan, math.inf, None, 1e9)),
        *(("scale_up_at", bad) for bad in (0, 1.5, math.nan)),
        *(("scale_down_at", bad) for bad in (-0.1, 0.8, math.nan)),
        *(("max_step", bad) for bad in (1, 0, 101, math.nan, math.inf)),
        *(("cooldown_up", bad) for bad in (-1, math.nan, math.inf, 1e9)),
        *(("cooldown_down", bad) for bad in (-1, math.nan, math.inf, "60")),
    ],
)
def test_bad_settings(field, value):
    """Field, value and range; a table over all of the policy, through the manager that takes it."""
    with pytest.raises(ConfigurationError) as caught:
        WorkerManager(Plant(ManualClock(), 1, 1.0), **{field: value})
    assert caught.value.field == field
    assert repr(value) in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_autoscale_needs_a_pool_that_can_be_resized_and_sizes_that_it_takes():
    class Fixed:
        get_active_workers = get_queue_size = get_running_tasks = lambda self: 1

    with pytest.raises(TypeError, match=r"autoscale needs a worker_pool with resize\(\)"):
        WorkerManager(Fixed(), autoscale=True)
    with pytest.raises(ConfigurationError, match=r"min_workers must be .* from 1 to 100000, got 0"):
        WorkerManager(Plant(ManualClock(), 1, 1.0), autoscale=True, min_workers=0)
