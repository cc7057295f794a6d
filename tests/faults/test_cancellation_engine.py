"""J1, J3, J4: cancellation at every await of what runs: pools, dispatchers, connections, the front door.

See ``test_cancellation.py``, which does the same to the operations of a queue.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap

import pytest
import pytest_asyncio

from orchestra._delivery import DONE
from orchestra.agents import AgentRegistry
from orchestra.app import App
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.orchestration_worker_pool import OrchestrationWorkerPoolConfig, QueueWorkerPool
from tests.faults._awaits import (
    at_every_await,
    cancelled_at,
    cancelled_inside,
    judge,
    new_tasks,
    open_files,
    our_threads,
    until,
)
from tests.faults._bench import HOW, NEEDS_PROC, bench_on, serial, some

pytestmark = NEEDS_PROC


@pytest_asyncio.fixture
async def bench(redis_url):
    async with bench_on(redis_url) as made:
        yield made


# --- pool


@HOW
@pytest.mark.parametrize("full", [False, True])
async def test_pool_submit(bench, how, full):
    """J1: a cancelled submit has queued its job or not; the pool runs on."""
    pool = QueueWorkerPool("p", OrchestrationWorkerPoolConfig(workers=1, max_concurrent_tasks=1, max_queue_size=1))
    gates, ran = [], []

    async def job(gate, number):
        ran.append(number)
        await gate.wait()

    async def prepare():
        await pool.join()
        gates.append(gate := asyncio.Event())  # of this round alone: the timer below may fire in a later one
        if full:
            await pool.submit(job, gate, "running")
            await until(pool.get_running_tasks, "a running job")
            await pool.submit(job, gate, "queued")
            asyncio.get_running_loop().call_later(0.005, gate.set)
        return lambda: pool.submit(job, gate, "mine", timeout=30)

    async for _, run in at_every_await(prepare, how=how):
        gates[-1].set()
        await pool.join()
        assert pool.get_queue_size() == pool.get_running_tasks() == 0
        assert run.cancelled or "mine" in ran
    await pool.shutdown()
    assert pool.metrics.submitted == pool.metrics.completed == len(ran)


@HOW
@pytest.mark.parametrize("wait", [True, False])
async def test_pool_shutdown(bench, how, wait):
    """J1: shut down again after a cancelled shutdown: no slot, no job and no future is left."""
    pools: list[QueueWorkerPool] = []
    futures: list[asyncio.Future] = []

    async def job():
        await asyncio.sleep(0.002)

    async def prepare():
        pool = QueueWorkerPool("p", OrchestrationWorkerPoolConfig(workers=2, max_concurrent_tasks=2))
        pools[:] = [pool]
        futures[:] = [await pool.submit(job) for _ in range(5)]
        await asyncio.sleep(0)
        return lambda: pool.shutdown(wait=wait)

    before = asyncio.all_tasks()
    for k in range(1, 50):
        make = await prepare()
        run = await cancelled_at(make, k, how)
        judge(run, f"{how} at await {k}")
        await pools[0].shutdown(wait=wait)
        await until(lambda: not pools[0].slots, "the end of every worker")
        assert all(future.done() for future in futures)
        assert not new_tasks(before, all_of_them=True)
        if not run.fired:
            break
    else:
        raise AssertionError("never completed")


# --- dispatcher


def counting_agents(seen: list, seconds: float = 0.0) -> AgentRegistry:
    agents = AgentRegistry()

    async def agent(task):
        seen.append(task.id)
        await asyncio.sleep(seconds)

    agents.register("x", agent)
    return agents


@HOW
async def test_dispatcher_start(bench, how):
    """J1: a cancelled start leaves nothing running; started again, it works."""
    seen: list[str] = []
    agents = counting_agents(seen)
    made: list[Dispatcher] = []

    async def prepare():
        made[:] = [Dispatcher(bench.queue, agents=agents)]
        return made[0].start

    before = asyncio.all_tasks()
    for k in range(1, 80):
        run = await cancelled_at(await prepare(), k, how)
        judge(run, f"{how} at await {k}")
        if run.fired:
            assert not made[0].running
            await until(lambda: not new_tasks(before, all_of_them=True), "the end of the loops")
            await until(lambda: our_threads() == [], "the end of the lease thread")
        task = some(1)[0]
        await bench.queue.produce(task)
        await made[0].start()
        await until(lambda task=task: task["id"] in seen, "the run of a task")
        await made[0].stop()
        await bench.empty()
        await until(lambda: not new_tasks(before, all_of_them=True), "the end of the loops")
        if not run.fired:
            break
    else:
        raise AssertionError("never completed")
    assert our_threads() == []
    await bench.in_step()


@HOW
async def test_dispatcher_stop(bench, how):
    """J1: stop, cancelled; stopped again, no loop, thread, slot or delivery is left, and nothing is lost."""
    await _stop_cancelled(bench, how)


async def test_dispatcher_stop_cancelled_twice(bench):
    """J3: a second cancellation while stop cleans up."""
    for again in (1, 3):
        await _stop_cancelled(bench, "now", again)


async def _stop_cancelled(bench, how: str, again: int = 0) -> None:
    seen: list[str] = []
    agents = counting_agents(seen, 0.002)
    before = asyncio.all_tasks()
    for k in range(1, 120):
        queue = bench.make()
        dispatcher = Dispatcher(queue, agents=agents, max_concurrent_dispatch=2)
        tasks = some(6)
        await queue.produce_many(tasks)
        await dispatcher.start()
        await until(lambda tasks=tasks: tasks[0]["id"] in seen, "the first run")
        run = await cancelled_inside(dispatcher.stop, lambda wrap, of=dispatcher: _around_stop(of, wrap), k, how, again)
        judge(run, f"{how} at await {k}, again {again}")
        await dispatcher.stop()
        assert not dispatcher.running
        await until(lambda: our_threads() == [], f"the end of the lease thread (k={k})")
        await until(lambda: not new_tasks(before, all_of_them=True), f"the end of the loops (k={k})")
        assert not [slot for slot in dispatcher.pool.slots if slot.source is dispatcher]
        assert dispatcher.scheduler.get_queue_size() == 0
        await _finish(bench, seen, tasks)
        await queue.close()
        if not run.fired:
            return
    raise AssertionError("never completed")


def _around_stop(dispatcher, wrap) -> None:
    """stop() has its work done in a task of its own, so that a cancellation cannot interrupt the cleaning up."""
    real = dispatcher._stop
    dispatcher._stop = lambda: wrap(real())


async def _finish(bench, seen: list[str], tasks: list[dict]) -> None:
    """Take over what the stopped dispatcher left pending, and run what has not been run."""
    await bench.queue.settle([(delivery, DONE) for delivery in await bench.queue.reclaim("heir", 100, 0)])
    left = await bench.queue.consume("heir", 100, 0)
    await bench.queue.acknowledge_many([message_id for message_id, _ in left])
    await bench.empty()
    seen += [task["id"] for _, task in left]
    assert {task["id"] for task in tasks} <= set(seen) | {task["id"] for _, task in left}


# --- connections and the front door


@HOW
async def test_connecting(redis_url, how):
    """J1: connect and close of a manager; what is open on the server is what is in use."""
    watcher = await ConnectionManager(redis_url).connect()
    files = open_files()
    made: list[ConnectionManager] = []

    async def fresh():
        made[:] = [ConnectionManager(redis_url)]
        return made[0].connect

    async for _, _run in at_every_await(fresh, how=how):
        await made[0].connect()
        assert await made[0].client.echo("x") == b"x"
        await made[0].close()
        await until(lambda: open_files() <= files, "closing every descriptor")

    async def used():
        made[:] = [await ConnectionManager(redis_url).connect()]
        await made[0].open_wire("test")
        made[0].sync_client().ping()
        return made[0].close

    async for _, _run in at_every_await(used, how=how):
        await made[0].close()
        await until(lambda: open_files() <= files, "closing every descriptor")

    async def wire():
        made[:] = [await ConnectionManager(redis_url).connect()]
        return lambda: made[0].open_wire("test")

    async for _, _run in at_every_await(wire, how=how):
        await (await made[0].open_wire("test")).call("PING")
        await made[0].close()
        await until(lambda: open_files() <= files, "closing every descriptor")
    await watcher.close()


@HOW
async def test_queue_close(bench, how):
    """J1: close, cancelled; closed again, it holds no connection, and the queue may be used again."""
    queues: list = []

    async def prepare():
        queue = bench.make()
        queues[:] = [queue]
        await queue.submit(some(1), want_results=True)
        (message,) = await queue.consume("c", 1, 5000)
        await queue.acknowledge(message[0])
        return queue.close

    before, files = asyncio.all_tasks(), open_files()
    for k in range(1, 50):
        run = await cancelled_at(await prepare(), k, how)
        judge(run, f"{how} at await {k}")
        await queues[0].close()
        await until(lambda: not new_tasks(before, all_of_them=True), "the end of the listener")
        await until(lambda: open_files() <= files + 1, "closing the connections")  # one pooled connection may stay
        if not run.fired:
            return
    raise AssertionError("never completed")


@HOW
async def test_send_and_result(redis_url, how):
    """J1: send and Run.result; asked again, the result is there."""
    app = App("app", redis_url)

    @app.agent
    async def double(n: int) -> int:
        return 2 * n

    runs: list = []
    async with app, app.worker(concurrency=2):

        async def sending():
            return lambda: double.using(key=f"k{next(serial)}").send(21)

        async for _, run in at_every_await(sending, how=how):
            assert run.cancelled or await run.value.result(30) == 42

        async def waiting():
            runs[:] = [await double.send(4)]
            return lambda: runs[0].result(30)

        async for _, _run in at_every_await(waiting, how=how):
            assert await runs[0].result(30) == 8
        stats = await until(lambda: _settled(app.queue), "the end of every task")
        assert stats.adds_up
    await until(lambda: our_threads() == [], "the end of the lease thread")


async def _settled(queue):
    stats = await queue.stats()
    return stats if not stats.live else None


@pytest.mark.parametrize("how", ["now", "done"])
async def test_worker_of_an_app(redis_url, how):
    """J1: ``async with app.worker()``, cancelled while it starts, runs and stops: nothing stays behind."""
    app = App("app", redis_url)
    done = []

    @app.agent
    async def work(n: int) -> None:
        done.append(n)

    async with app:
        await work.send(0)
        before = asyncio.all_tasks()

        async def whole():
            async with app.worker(concurrency=2):
                await asyncio.sleep(0)

        for k in range(1, 120):
            run = await cancelled_at(whole, k, how)
            judge(run, f"{how} at await {k}")
            await until(lambda: our_threads() == [], f"the end of the lease thread (k={k})")
            await until(lambda: not new_tasks(before, all_of_them=True), f"the end of the loops (k={k})")
            if not run.fired:
                break
        else:
            raise AssertionError("never completed")
        async with app.worker(concurrency=2):
            await work.send(1)
            await until(lambda: 1 in done, "a run after all that")


# --- garbage


GARBAGE = """
    import asyncio, gc, os
    from orchestra import App

    app = App("app", os.environ["ORCHESTRA_REDIS_URL"])

    @app.agent
    async def double(n: int) -> int:
        await asyncio.sleep(0.001)
        return 2 * n

    async def collect(stop):
        while not stop.is_set():
            gc.collect()
            await asyncio.sleep(0)

    async def main():
        gc.collect()
        gc.freeze()  # what was imported is not looked at again and again
        stop = asyncio.Event()
        collecting = asyncio.create_task(collect(stop))
        async with app, app.worker(concurrency=5):
            for start in range(0, 60, 20):
                runs = await double.send_many([{"n": n} for n in range(start, start + 20)])
                doomed = asyncio.create_task(runs[0].result())
                await asyncio.sleep(0)
                doomed.cancel()
                assert [await run.result(60) for run in runs] == [2 * n for n in range(start, start + 20)]
                await asyncio.gather(doomed, return_exceptions=True)
        stop.set()
        await collecting
        print("done", len(asyncio.all_tasks()))

    asyncio.run(main(), debug=True)
"""


def test_nothing_is_lost_to_the_garbage_collector(redis_url):
    """J4: gc.collect() in every iteration, ``-X dev``, warnings are errors: no task is destroyed while it is pending."""
    command = [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(GARBAGE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done 1\n"
    for sign in ("was destroyed", "never retrieved", "never awaited", "ResourceWarning", "Traceback"):
        assert sign not in done.stderr, done.stderr
