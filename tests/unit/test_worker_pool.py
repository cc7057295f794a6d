"""The worker pool: its queue, its limits, its end, and how workers find work."""

from __future__ import annotations

import asyncio
import math
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra import orchestration_worker_pool as pools
from orchestra import telemetry
from orchestra.errors import ConfigurationError, WorkerPoolError
from orchestra.orchestration_worker_pool import Histogram, OrchestrationWorkerPoolConfig, QueueWorkerPool
from orchestra.tasks import Outcome, TaskPriority
from orchestra.testing import MockWorkerPool


def config(concurrency=4, **more) -> OrchestrationWorkerPoolConfig:
    return OrchestrationWorkerPoolConfig(workers=concurrency, max_concurrent_tasks=concurrency, **more)


@pytest.fixture
async def make_pool():
    """A function that makes pools, which are shut down after the test."""
    made = []

    def make(concurrency=4, **more) -> QueueWorkerPool:
        made.append(QueueWorkerPool("unit", config(concurrency, **more)))
        return made[-1]

    yield make
    for pool in made:
        await pool.shutdown(wait=False)


async def soon(future, seconds=2.0):
    """The result of ``future``, which must come: a hang is a failure, not a wait."""
    async with asyncio.timeout(seconds):
        return await future


async def ticks(count=20):
    """Let every callback that is due have its turn."""
    for _ in range(count):
        await asyncio.sleep(0)


class Gate:
    """Jobs that run until they are let go."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self.running = self.most = self.cancelled = 0

    async def job(self, value=None):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.opened.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.running -= 1
        return value


@pytest.fixture
async def gate():
    return Gate()


async def double(value):
    return 2 * value


# -- submitting


async def test_submit_gives_a_future_of_the_result(make_pool):
    pool = make_pool()
    futures = [await pool.submit(double, n) for n in range(10)]
    assert await soon(asyncio.gather(*futures)) == [2 * n for n in range(10)]


async def test_what_a_job_raises_its_future_raises_and_the_pool_goes_on(make_pool):
    async def bad():
        raise ValueError("no luck")

    pool = make_pool(1)
    with pytest.raises(ValueError, match="no luck"):
        await soon(await pool.submit(bad))
    assert await soon(await pool.submit(double, 4)) == 8
    assert (pool.metrics.failed, pool.metrics.completed) == (1, 1)


async def test_a_function_that_is_not_async_fails_its_own_future_only(make_pool):
    pool = make_pool(1)
    with pytest.raises(TypeError):
        await soon(await pool.submit(lambda: 3))
    assert await soon(await pool.submit(double, 4)) == 8


async def test_the_most_urgent_job_first_and_equals_in_order(make_pool, gate):
    pool, order = make_pool(1), []

    async def note(name):
        order.append(name)

    blocker = await pool.submit(gate.job)
    await ticks()
    jobs = [("low", TaskPriority.LOW), ("n1", TaskPriority.NORMAL), ("n2", TaskPriority.NORMAL)]
    jobs += [("critical", TaskPriority.CRITICAL), ("high", TaskPriority.HIGH), ("plain", TaskPriority.NORMAL)]
    futures = [await pool.submit(note, name, priority=priority) for name, priority in jobs]
    gate.opened.set()
    await soon(asyncio.gather(blocker, *futures))
    assert order == ["critical", "high", "n1", "n2", "plain", "low"]


async def test_a_full_queue_refuses_at_once(make_pool, gate):
    pool = make_pool(1, max_queue_size=2)
    await pool.submit(gate.job)
    await ticks()
    for _ in range(2):
        await pool.submit(gate.job)
    with pytest.raises(WorkerPoolError, match="2 jobs queued, its max_queue_size"):
        await pool.submit(gate.job)
    assert (pool.metrics.rejected, pool.metrics.submitted, pool.get_queue_size()) == (1, 3, 2)


async def test_submit_waits_for_room_as_long_as_it_is_told_to(make_pool, gate):
    pool = make_pool(1, max_queue_size=1)
    await pool.submit(gate.job)
    await ticks()
    await pool.submit(gate.job)
    with pytest.raises(WorkerPoolError):
        await pool.submit(double, 1, timeout=0.01)
    waiting = [asyncio.ensure_future(pool.submit(double, n, timeout=None)) for n in range(3)]
    await ticks()
    assert not any(task.done() for task in waiting)
    gate.opened.set()
    assert [await soon(await soon(task)) for task in waiting] == [0, 2, 4]


async def test_cancelling_a_submit_that_waits_for_room_submits_nothing(make_pool, gate):
    pool = make_pool(1, max_queue_size=1)
    await pool.submit(gate.job)
    await ticks()
    await pool.submit(gate.job)
    waiting = asyncio.ensure_future(pool.submit(double, 1, timeout=None))
    await ticks()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    gate.opened.set()
    await soon(pool.join())
    assert pool.metrics.submitted == 2


async def test_submitters_that_wait_for_room_are_told_of_the_shutdown(make_pool, gate):
    pool = make_pool(1, max_queue_size=1)
    await pool.submit(gate.job)
    await ticks()
    await pool.submit(gate.job)
    waiting = asyncio.ensure_future(pool.submit(double, 1, timeout=None))
    await ticks()
    await pool.shutdown(wait=False)
    with pytest.raises(WorkerPoolError, match="shut down"):
        await soon(waiting)


# -- cancelling a future


async def test_a_future_cancelled_before_its_turn_never_runs(make_pool, gate):
    pool, ran = make_pool(1), []

    async def note():
        ran.append(1)

    blocker = await pool.submit(gate.job)
    await ticks()
    future = await pool.submit(note)
    future.cancel()
    gate.opened.set()
    await soon(blocker)
    await soon(pool.join())
    assert not ran
    assert pool.metrics.cancelled == 1


async def test_cancelling_the_future_of_a_running_job_cancels_the_job_only(make_pool, gate):
    pool = make_pool(1)
    first, second = await pool.submit(gate.job), await pool.submit(double, 3)
    await ticks()
    first.cancel()
    assert await soon(second) == 6
    assert (gate.cancelled, pool.metrics.cancelled, pool.metrics.completed) == (1, 1, 1)
    assert pool.get_active_workers() == 1, "the same worker goes on"


async def test_a_cancel_that_comes_as_the_job_ends_does_not_hit_the_next_job(make_pool):
    """The callback of the cancelled future runs a turn later: by then the worker may run somebody else's job."""
    pool, end, let_go = make_pool(1), asyncio.Event(), asyncio.Event()

    async def short():
        await end.wait()

    async def innocent():
        await let_go.wait()
        return "ran"

    first, second = await pool.submit(short), await pool.submit(innocent)
    await ticks()
    end.set()  # the job's step is scheduled now, the cancellation's callback behind it
    first.cancel()
    await ticks()
    let_go.set()
    assert await soon(second) == "ran"


async def test_a_job_that_raises_cancelled_error_itself_costs_nobody_else_anything(make_pool):
    async def gives_up():
        raise asyncio.CancelledError

    pool = make_pool(1)
    first, second = await pool.submit(gives_up), await pool.submit(double, 5)
    with pytest.raises((asyncio.CancelledError, WorkerPoolError)):
        await soon(first)
    assert await soon(second) == 10


async def test_a_job_that_survives_its_cancellation_leaves_no_trace_on_the_worker(make_pool):
    """A count of cancellations left on the worker's task would break every TaskGroup that runs there later."""
    pool, started = make_pool(1), asyncio.Event()

    async def stubborn():
        try:
            started.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return "finished anyway"

    async def failing_group():
        async with asyncio.TaskGroup() as group:
            group.create_task(asyncio.sleep(60))
            group.create_task(boom())

    async def boom():
        raise ValueError("inside")

    future = await pool.submit(stubborn)
    await started.wait()
    future.cancel()
    await ticks()
    assert [slot.task.cancelling() for slot in pool.slots] == [0]
    with pytest.raises(ExceptionGroup):
        await soon(await pool.submit(failing_group))


# -- shutdown


async def test_shutdown_lets_queued_and_running_jobs_finish(make_pool, gate):
    pool = make_pool(2)
    futures = [await pool.submit(gate.job, n) for n in range(6)]
    ending = asyncio.ensure_future(pool.shutdown(wait=True, timeout=5.0))
    await ticks()
    assert not ending.done()
    with pytest.raises(WorkerPoolError, match="is shut down; make a new one"):
        await pool.submit(double, 1)
    gate.opened.set()
    await soon(ending)
    assert [future.result() for future in futures] == list(range(6))
    assert (pool.get_active_workers(), pool.metrics.rejected) == (0, 1)


async def test_shutdown_without_waiting_cancels_and_no_future_hangs(make_pool, gate):
    pool = make_pool(2)
    futures = [await pool.submit(gate.job) for _ in range(5)]
    await ticks()
    await soon(pool.shutdown(wait=False))
    for future in futures:
        with pytest.raises((asyncio.CancelledError, WorkerPoolError)):
            await soon(future)
    assert gate.cancelled == 2
    assert (pool.get_active_workers(), pool.get_queue_size(), pool.get_running_tasks()) == (0, 0, 0)


async def test_shutdown_cancels_what_is_left_after_its_timeout(make_pool, gate):
    pool = make_pool(1, shutdown_timeout=0.01)
    futures = [await pool.submit(gate.job) for _ in range(2)]
    await ticks()
    await soon(pool.shutdown(wait=True))
    assert all(future.cancelled() for future in futures)


async def test_the_future_of_a_job_that_ignores_its_cancellation_does_not_hang(make_pool):
    pool, release = make_pool(1), asyncio.Event()

    async def stubborn():
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    future = await pool.submit(stubborn)
    await ticks()
    try:
        await soon(pool.shutdown(wait=False), 3.0)
        with pytest.raises((asyncio.CancelledError, WorkerPoolError)):
            await soon(future, 0.5)
    finally:
        release.set()
        await ticks()


async def test_a_job_may_shut_its_own_pool_down(make_pool, gate):
    pool = make_pool(2)

    async def last():
        await pool.shutdown(wait=False)
        return "said"

    other = await pool.submit(gate.job)
    assert await soon(await pool.submit(last)) == "said"
    await ticks()
    assert other.cancelled()
    assert pool.get_active_workers() == 0, "its worker ends too"


async def test_a_closed_pool_keeps_no_idle_workers_for_a_source(make_pool):
    async def job():
        pass

    pool, source = make_pool(2), Items(3, job)
    await pool.shutdown()
    pool.attach(source)
    pool.wake()
    await soon(source.done.wait())
    await ticks()
    assert pool.get_active_workers() == 0


async def test_shutdown_twice_and_of_an_unused_pool(make_pool):
    unused, used = make_pool(), make_pool()
    await soon(unused.shutdown())
    await soon(await used.submit(double, 1))
    for _ in range(2):
        await soon(used.shutdown())
    assert used.get_active_workers() == 0


async def test_a_pool_is_a_context_that_waits_for_its_jobs():
    async with QueueWorkerPool("context", config(2)) as pool:
        future = await pool.submit(double, 21)
    assert future.result() == 42
    assert "context 0/2 running, 0 queued" in repr(pool)


# -- size


async def test_never_more_at_once_than_the_smaller_limit():
    gate = Gate()
    limits = OrchestrationWorkerPoolConfig(workers=8, max_concurrent_tasks=3)
    async with QueueWorkerPool("limits", limits) as pool:
        futures = [await pool.submit(gate.job) for _ in range(20)]
        await ticks()
        assert (gate.running, pool.get_running_tasks(), pool.get_queue_size()) == (3, 3, 17)
        gate.opened.set()
        await soon(asyncio.gather(*futures))
    assert gate.most == 3


async def test_growing_starts_what_waits(make_pool, gate):
    pool = make_pool(2)
    for _ in range(10):
        await pool.submit(gate.job)
    await ticks()
    assert gate.running == 2
    pool.resize(5)
    await ticks()
    assert (gate.running, pool.get_active_workers()) == (5, 5)
    gate.opened.set()
    await soon(pool.join())
    assert gate.most == 5


async def test_shrinking_ends_surplus_workers_after_their_present_job(make_pool):
    pool, gates = make_pool(6), [Gate() for _ in range(8)]
    for gate in gates:
        await pool.submit(gate.job)
    await ticks()
    pool.resize(2)
    await ticks()
    assert pool.get_running_tasks() == 6, "what runs is not interrupted"
    for gate in gates[:4]:
        gate.opened.set()
    await ticks()
    assert (pool.get_running_tasks(), pool.get_active_workers()) == (2, 2)
    for gate in gates:
        gate.opened.set()
    await soon(pool.join())
    assert pool.get_active_workers() == 2, "only the surplus ends"
    assert pool.metrics.completed == 8


async def test_shrinking_an_idle_pool_leaves_workers_for_the_next_job(make_pool):
    pool, gate = make_pool(10), Gate()
    futures = [await pool.submit(gate.job) for _ in range(10)]
    await ticks()
    gate.opened.set()
    await soon(asyncio.gather(*futures))
    assert pool.get_active_workers() == 10
    pool.resize(3)
    await ticks()
    assert pool.get_active_workers() == 3
    for n in range(20):
        assert await soon(await pool.submit(double, n)) == 2 * n
    assert pool.get_active_workers() == 3


async def test_resizing_up_and_down_while_jobs_run_loses_none(make_pool):
    pool, running, over = make_pool(4), 0, 0

    async def job(n):
        nonlocal running, over
        running += 1
        over = max(over, running - limit)
        await ticks(n % 3)
        running -= 1
        return n

    limit = 40  # the largest there ever was: what ran before a shrink may run on
    futures = [await pool.submit(job, n) for n in range(300)]
    for size in (40, 1, 7, 2, 30, 1):
        pool.resize(size)
        await ticks(5)
    assert await soon(asyncio.gather(*futures)) == list(range(300))
    assert over == 0
    await ticks()
    assert pool.get_active_workers() == 1


async def test_resize_tells_and_refuses_nonsense(make_pool):
    pool, told = make_pool(4), []
    detach = telemetry.attach(
        lambda name, measurements, metadata: told.append((measurements, metadata)), "pool.resized"
    )
    try:
        pool.resize(9)
        with pytest.raises(
            ConfigurationError, match="concurrency must be a whole number of tasks from 1 to 100000, got 0"
        ):
            pool.resize(0)
    finally:
        detach()
    assert told == [({"old": 4, "new": 9}, {"pool": "unit"})]
    assert pool.concurrency == 9


# -- metrics


async def test_metrics_add_up(make_pool, gate):
    pool = make_pool(2, max_queue_size=3)

    async def bad():
        raise ValueError

    running = [await pool.submit(gate.job) for _ in range(2)]
    await ticks()
    assert (pool.metrics.active_workers, pool.metrics.running_tasks, pool.metrics.queued_tasks) == (2, 2, 0)
    queued = [await pool.submit(bad), await pool.submit(double, 1), await pool.submit(double, 2)]
    assert pool.metrics.queued_tasks == 3
    with pytest.raises(WorkerPoolError):
        await pool.submit(double, 3)
    queued[2].cancel()
    running[0].cancel()
    gate.opened.set()
    await asyncio.gather(*running, *queued, return_exceptions=True)
    await soon(pool.join())
    metrics = pool.metrics
    assert (metrics.submitted, metrics.completed, metrics.failed, metrics.cancelled, metrics.rejected) == (
        5,
        2,
        1,
        2,
        1,
    )
    assert metrics.submitted == metrics.completed + metrics.failed + metrics.cancelled
    assert (metrics.running_tasks, metrics.queued_tasks) == (0, 0)
    assert pool.wait_times.count == pool.run_times.count == 4, "a job that never ran has no times"


def test_histogram_percentiles_are_exact_to_15_percent():
    times = Histogram()
    assert times.percentile(0.5) == times.mean == 0.0
    values = [1e-6 * 1.02**n for n in range(1200)]
    for value in values:
        times.add(value)
    assert times.count == 1200
    assert times.total == pytest.approx(sum(values))
    for q in (0.0, 0.01, 0.25, 0.5, 0.9, 0.99, 1.0):
        exact = values[max(1, math.ceil(q * 1200)) - 1]
        assert exact <= times.percentile(q) * 1.0001
        assert times.percentile(q) <= exact * 1.15
    assert times.percentile(1.0) == values[-1]
    assert sys.getsizeof(times) <= 2048


@given(st.lists(st.floats(0.0, 1e5), max_size=50), st.lists(st.floats(0.0, 1e5), max_size=50))
def test_histograms_merge_and_subtract(first, second):
    one, both = Histogram(), Histogram()
    for value in first:
        one.add(value)
        both.add(value)
    mark = both.copy()
    for value in second:
        both.add(value)
    lately = both.since(mark)
    assert (lately.count, lately.total) == (len(second), pytest.approx(sum(second), abs=1e-6 * (1 + sum(first))))
    one.merge(lately)
    assert (one.values == both.values).all()
    assert one.count == int(one.values.sum()) == len(first) + len(second)
    assert mark.count == len(first), "a copy counts by itself"


def test_a_histogram_refuses_what_is_no_number():
    times = Histogram()
    with pytest.raises(ValueError, match="a duration must be a number of seconds, got nan"):
        times.add(float("nan"))
    assert times.count == 0
    for bad in (-0.1, 1.1, float("nan"), "0.5"):
        with pytest.raises(ConfigurationError, match=r"percentile\(q\) must be a number"):
            times.percentile(bad)


async def test_metrics_hold_percentiles_of_waiting_and_running(make_pool, gate):
    pool = make_pool(1)
    futures = [await pool.submit(gate.job) for _ in range(3)]
    gate.opened.set()
    await soon(asyncio.gather(*futures))
    facts = pool.metrics.as_dict()
    assert (facts["submitted"], facts["completed"], facts["running_tasks"], facts["queued_tasks"]) == (3, 3, 0, 0)
    for name in ("wait_times", "run_times"):
        assert facts[name]["count"] == 3
        assert 0.0 < facts[name]["p50"] <= facts[name]["p95"] <= facts[name]["p99"] <= facts[name]["max"]


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 1e9])
def test_histogram_takes_what_lies_beyond_its_buckets(seconds):
    times = Histogram()
    times.add(seconds)
    assert times.count == 1
    assert 0.0 <= times.percentile(0.5) <= min(seconds, 4e5)


# -- kinds of jobs


async def test_a_full_kind_blocks_no_other_and_keeps_its_order(make_pool):
    pool, order, gates = make_pool(4, per_type={"pdf": 2}), [], {}

    async def job(name):
        order.append(name)
        gates[name] = asyncio.Event()
        await gates[name].wait()

    for n in range(5):
        await pool.submit(job, f"pdf{n}", kind="pdf")
    for n in range(3):
        await pool.submit(job, f"text{n}", kind="text")
    await pool.submit(job, "plain")
    await ticks()
    assert order == ["pdf0", "pdf1", "text0", "text1"]
    assert (pool.get_running_tasks(), pool.get_queue_size(), pool.metrics.queued_tasks) == (4, 5, 5)
    gates["text0"].set()
    await ticks()
    assert order[4:] == ["text2"]
    gates["pdf0"].set()
    await ticks()
    assert order[5:] == ["pdf2"], "it was there before plain"
    for name in ("text1", "text2"):
        gates[name].set()
    await ticks()
    assert order[6:] == ["plain"], "two pdf run"
    for name in ("pdf1", "pdf2", "pdf3", "pdf4"):
        gates[name].set()
        await ticks()
    assert order[7:] == ["pdf3", "pdf4"]
    gates["plain"].set()
    await soon(pool.join())
    assert pool.metrics.completed == 9


async def test_urgent_jobs_of_a_full_kind_go_first_when_there_is_room(make_pool, gate):
    pool, order = make_pool(4, per_type={"k": 1}), []

    async def note(name):
        order.append(name)

    blocker = await pool.submit(gate.job, kind="k")
    await ticks()
    for name, priority in (("low", 3), ("n1", 2), ("n2", 2), ("high", 1)):
        await pool.submit(note, name, kind="k", priority=priority)
        await ticks()
    gate.opened.set()
    await soon(blocker)
    await soon(pool.join())
    assert order == ["high", "n1", "n2", "low"]


async def test_a_kind_stays_within_its_limit_through_failures_and_cancellations(make_pool):
    pool, running, most = make_pool(8, per_type={"k": 3}), 0, 0

    async def job(n):
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await ticks(n % 4)
            if n % 5 == 0:
                raise ValueError
        finally:
            running -= 1

    futures = [await pool.submit(job, n, kind="k") for n in range(200)]
    for n in range(0, 200, 7):
        futures[n].cancel()
        await ticks(1)
    await soon(asyncio.gather(*futures, return_exceptions=True), 10.0)
    await soon(pool.join())
    assert most == 3
    assert pool.get_queue_size() == 0
    metrics = pool.metrics
    assert metrics.submitted == metrics.completed + metrics.failed + metrics.cancelled == 200


async def test_jobs_that_stepped_aside_end_with_the_pool(make_pool, gate):
    pool = make_pool(4, per_type={"k": 1}, max_queue_size=3)
    futures = [await pool.submit(gate.job, kind="k")]
    await ticks()
    futures += [await pool.submit(gate.job, kind="k") for _ in range(3)]
    await ticks()
    with pytest.raises(WorkerPoolError, match="3 jobs queued"):
        await pool.submit(gate.job)
    await soon(pool.shutdown(wait=False))
    assert all(future.cancelled() for future in futures)
    assert pool.get_queue_size() == 0


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        *(({"timeout": bad}, "submit(timeout)") for bad in (-1, float("nan"), float("inf"), "1", True)),
        *(({"priority": bad}, "submit(priority)") for bad in (1.5, "high", None, True)),
        *(({"kind": bad}, "submit(kind)") for bad in (1, b"k", ["k"])),
    ],
)
async def test_bad_arguments_of_submit_are_named(make_pool, arguments, field):
    pool = make_pool()
    with pytest.raises(ConfigurationError) as caught:
        await pool.submit(double, 1, **arguments)
    assert caught.value.field == field
    assert repr(next(iter(arguments.values()))) in str(caught.value)
    assert pool.metrics.submitted == 0


@pytest.mark.parametrize(
    "bad", [{"k": 0}, {"k": -1}, {"k": 1.5}, {"k": True}, {"k": 10**6}, {"": 1}, {3: 1}, ["k"], None]
)
def test_bad_limits_of_kinds_are_named(bad):
    with pytest.raises(ConfigurationError, match=r"OrchestrationWorkerPoolConfig\.per_type"):
        OrchestrationWorkerPoolConfig(per_type=bad)


def test_limits_of_kinds_are_copied():
    limits = {"k": 1}
    made = OrchestrationWorkerPoolConfig(per_type=limits)
    limits["k"] = 5
    assert made.per_type == {"k": 1}
    with pytest.raises(TypeError):
        made.per_type["k"] = 2


# -- sources and the baton


class Items:
    """A source of ``count`` items that run ``job``; remembers which worker ran how many."""

    def __init__(self, count, job) -> None:
        self.left, self.job = count, job
        self.done = asyncio.Event()
        self.by_worker: Counter[int] = Counter()
        self._open = count

    def start_nowait(self, slot, until):
        if not self.left:
            return None
        slot.source, slot.item = self, self.left
        self.left -= 1
        return self.run_item(slot.item, slot)

    async def run_item(self, item, slot) -> None:
        assert slot.item == item
        self.by_worker[id(slot)] += 1
        await self.job()
        self._open -= 1
        if not self._open:
            self.done.set()


@pytest.fixture
def no_turn_limit(monkeypatch):
    monkeypatch.setattr(pools, "TURN", 1e9)


async def test_a_burst_of_sync_jobs_is_run_by_few_workers(make_pool, no_turn_limit):
    async def job():
        pass

    pool, source = make_pool(100), Items(1000, job)
    pool.attach(source)
    pool.wake()
    await soon(source.done.wait())
    assert len(source.by_worker) == 1, "the first worker never suspends, so the baton finds nothing left"
    assert pool.get_active_workers() <= 2


async def test_jobs_that_suspend_spread_over_all_workers(make_pool, gate):
    pool, source = make_pool(1000), Items(1000, gate.job)
    pool.attach(source)
    pool.wake()
    async with asyncio.timeout(5.0):
        while gate.running < 1000:
            await asyncio.sleep(0)
    assert len(source.by_worker) == pool.get_active_workers() == 1000
    gate.opened.set()
    await soon(source.done.wait())


async def test_submitted_jobs_spread_the_same_way(make_pool, gate):
    pool = make_pool(50)
    futures = [pool.submit_nowait(gate.job) for _ in range(50)]
    async with asyncio.timeout(5.0):
        while gate.running < 50:
            await asyncio.sleep(0)
    assert pool.get_active_workers() == 50
    gate.opened.set()
    await soon(asyncio.gather(*futures))


async def test_the_turn_budget_lets_other_callbacks_run(make_pool):
    """Jobs that never suspend must not keep I/O and timers waiting until the last of them is done."""
    loop, turns = asyncio.get_running_loop(), 0

    async def job():
        end = loop.time() + 0.0002
        while loop.time() < end:
            pass

    def count():
        nonlocal turns
        turns += 1
        if not source.done.is_set():
            loop.call_soon(count)

    pool, source = make_pool(10), Items(100, job)
    loop.call_soon(count)
    pool.attach(source)
    pool.wake()
    await soon(source.done.wait())
    assert turns >= 3, "20 ms of work in turns of 2 ms, some of which a busy machine takes away"


async def test_an_attached_source_goes_before_the_pools_own_queue_until_detached(make_pool, gate):
    pool, order = make_pool(1), []

    async def note(name):
        order.append(name)

    blocker = await pool.submit(gate.job)
    await ticks()
    own = await pool.submit(note, "own")
    source = Items(2, lambda: note("source"))
    pool.attach(source)
    gate.opened.set()
    await soon(asyncio.gather(blocker, own))
    assert order == ["source", "source", "own"]
    pool.detach(source)
    pool.detach(source)
    source.left = 1
    pool.wake()
    await ticks()
    assert source.left == 1


async def test_a_source_that_breaks_costs_one_worker_and_the_rest_is_done(make_pool, caplog):
    class Broken(Items):
        async def run_item(self, item, slot) -> None:
            if item == 3:
                raise RuntimeError("broken source")
            await super().run_item(item, slot)

    async def job():
        await asyncio.sleep(0)

    pool, source = make_pool(1), Broken(5, job)
    source._open = 4
    pool.attach(source)
    pool.wake()
    await soon(source.done.wait())
    assert "a worker of pool unit ended" in caplog.text
    assert pool.get_running_tasks() == 0


async def test_an_interruption_tells_the_source_why(make_pool):
    pool, seen = make_pool(1), []

    class Interruptible(Items):
        async def run_item(self, item, slot) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                seen.append(slot.why)

    source = Interruptible(2, None)
    pool.attach(source)
    pool.wake()
    await ticks()
    (slot,) = pool.slots
    slot.interrupt(Outcome.TIMED_OUT)
    slot.interrupt(Outcome.RELEASED)
    await ticks()
    assert seen == [Outcome.TIMED_OUT], "the first reason counts"
    assert (pool.get_running_tasks(), slot.why) == (1, None), "the next item starts without it"
    assert slot.task.cancelling() == 0


async def test_the_mock_pool_runs_what_it_remembers():
    async with MockWorkerPool() as pool:
        assert await soon(await pool.submit(double, 3)) == 6
        assert [(job.func, job.args, job.future.result()) for job in pool.submitted] == [(double, (3,), 6)]
        pool.fail_with = WorkerPoolError("full")
        with pytest.raises(WorkerPoolError, match="full"):
            await pool.submit(double, 3)


# -- configuration


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("workers", 0),
        ("workers", 100_001),
        ("workers", 1.5),
        ("workers", True),
        ("workers", "4"),
        ("max_queue_size", -1),
        ("max_queue_size", None),
        ("max_concurrent_tasks", 0),
        ("max_concurrent_tasks", 1_000_000),
        ("shutdown_timeout", -0.1),
        ("shutdown_timeout", float("nan")),
        ("shutdown_timeout", float("inf")),
        ("shutdown_timeout", "30"),
    ],
)
def test_a_bad_setting_is_named(setting, value):
    with pytest.raises(ConfigurationError) as caught:
        OrchestrationWorkerPoolConfig(**{setting: value})
    assert caught.value.field == f"OrchestrationWorkerPoolConfig.{setting}"
    assert caught.value.value is value
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("name", ["", "with space", "x" * 65, 7, None])
def test_a_bad_name_is_refused(name):
    with pytest.raises(ConfigurationError, match="pool name must be 1 to 64 characters"):
        QueueWorkerPool(name)
