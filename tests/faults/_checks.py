"""What the fault tests share: a small fleet under load, and the checks that hold after every fault.

A :class:`Fleet` is one producer and some workers, each with connections of its own, and remembers what was acknowledged
and what was run. :func:`quiet_afterwards` surrounds a test and looks for what it left behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import logging
import os
import threading
import time
from collections import Counter
from importlib import resources

import redis

from orchestra import telemetry
from orchestra._redis.wire import pack
from orchestra._scripts import script
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from orchestra.errors import StoreError
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Retry

PATIENT = 60.0
"""Seconds that a condition may take on a machine that is busy with other things."""


async def until(condition, seconds=PATIENT, every=0.01):
    """The first true value of ``condition()``, which may be a coroutine function; it may fail while Redis is away."""
    value, error = None, None
    try:
        async with asyncio.timeout(seconds):
            while not value:
                try:
                    value = condition()
                    if asyncio.iscoroutine(value):
                        value = await value
                except StoreError as failed:
                    error = failed
                if not value:
                    await asyncio.sleep(every)
    except TimeoutError:
        raise AssertionError(f"it did not happen within {seconds} s; last error: {error}") from error
    return value


class Fleet:
    """A producer and ``workers`` dispatchers on one queue; the agent ``work`` does what a task's input says.

    ``{"sleep": s}`` takes time, ``{"fail": n}`` fails n attempts, ``{"reject": True}`` ends dead.
    """

    def __init__(
        self, url, *, workers=1, lease_ms=60_000, concurrency=50, produce_url=None, manage=None, name="t", **options
    ):
        manage = manage or {}
        self.name = name
        self.options = {"patience": 20.0} | options
        self.lease_ms = lease_ms
        self.manager = ConnectionManager(produce_url or url, **manage)
        self.queue = self._queue(self.manager)
        self.acked: set[str] = set()
        self.unknown: set[str] = set()
        self.seen: list[str] = []
        self.attempts: Counter[str] = Counter()
        self.agents = AgentRegistry()
        self.agents.register("work", self._work, retry=Retry(max_retries=3, base=0.02, max_delay=0.02))
        self.workers = []
        for _ in range(workers):
            manager = ConnectionManager(url, **manage)
            queue = self._queue(manager)
            dispatcher = Dispatcher(
                queue, agents=self.agents, max_concurrent_dispatch=concurrency, block_timeout_ms=1000
            )
            self.workers.append((manager, queue, dispatcher))
        self._serial = itertools.count()

    def _queue(self, manager):
        return RedisStreamTaskQueue("tasks", "workers", self.lease_ms, manager=manager, **self.options)

    async def _work(self, task):
        facts = task.input or {}
        self.attempts[task.id] += 1
        self.seen.append(task.id)
        if facts.get("sleep"):
            await asyncio.sleep(facts["sleep"])
        if task.attempt <= facts.get("fail", 0):
            raise ValueError("as asked")
        return task.id

    def tasks(self, count, lanes=(2, 2, 0, 3), **facts):
        """``count`` new tasks, dealt out to ``lanes``."""
        return [
            {"id": f"{self.name}{n}", "type": "work", "input": facts, "priority": lanes[n % len(lanes)]}
            for n in self._ids(count)
        ]

    def _ids(self, count):
        return [next(self._serial) for _ in range(count)]

    async def send(self, count, *, delay=0.0, want_results=False, **facts):
        """Produce ``count`` tasks in one call and note whether it was acknowledged; returns their ids."""
        tasks = [task | ({"delay": delay} if delay else {}) for task in self.tasks(count, **facts)]
        ids = {task["id"] for task in tasks}
        try:
            await self.queue.produce_many(tasks, want_results=want_results)
        except StoreError:
            self.unknown |= ids
            raise
        self.acked |= ids
        return sorted(ids)

    async def load(self, calls, size=10, **facts):
        """A stream of calls; one whose outcome stayed unknown is counted as such."""
        for _ in range(calls):
            with contextlib.suppress(StoreError):
                await self.send(size, **facts)
            await asyncio.sleep(0.001)

    async def __aenter__(self):
        try:
            for _, _, dispatcher in self.workers:
                await dispatcher.start()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *exc):
        for _, _, dispatcher in self.workers:
            await dispatcher.stop()
        for manager, queue, _ in self.workers:
            await queue.close()
            await manager.close()
        await self.queue.close()
        await self.manager.close()
        self.agents.close()

    async def _ask(self, *command):
        link = await self.queue._commands()
        return (await link.patiently(lambda: link.send(pack((command,)), 1), 20.0))[0][0]

    def wire(self, role, worker=0):
        """The open wire of ``role`` of a worker."""
        manager = self.workers[worker][0]
        return next(w for w in manager._wires if not w.closed and w.endpoint.client_name.endswith(f":{role}"))

    @property
    def repeats(self):
        """How many executions there were beyond the first attempt of each task (retries asked for not counted)."""
        return sum(self.attempts.values()) - len(self.attempts)

    async def drained(self, seconds=PATIENT):
        """Until no task is live; the statistics then."""

        async def empty():
            stats = await self.queue.stats()
            return stats if stats.live == 0 else None

        return await until(empty, seconds)

    async def assert_settled(self, *, repeats=0, retries=0, may_be_lost=frozenset(), seconds=PATIENT):
        """Everything acknowledged is terminal exactly once, nothing is pending, the counters add up.

        ``may_be_lost`` was acknowledged within the declared window of loss.
        """
        stats = await self.drained(seconds)
        assert stats.adds_up, stats
        assert sum(stats.in_flight) == 0, stats
        count = stats.counters.get
        assert count("lost", 0) == 0, stats
        missing = self.acked - set(self.attempts) - may_be_lost
        assert not missing, f"acknowledged and never run: {sorted(missing)[:10]} of {len(missing)}"
        strangers = set(self.attempts) - self.acked - self.unknown
        assert not strangers, f"run and never sent: {sorted(strangers)[:10]}"
        ended = count("completed", 0) + count("dead", 0) + count("cancelled", 0)
        unknown = len(may_be_lost & set(self.attempts))
        assert len(self.attempts) - unknown <= ended <= len(self.attempts), (
            f"{ended} terminal, {len(self.attempts)} run: {stats}"
        )
        assert self.repeats <= repeats + retries, f"{self.repeats} repeats, {repeats + retries} explained"
        for lane in self.queue.keys.streams:
            if await self._ask("EXISTS", lane):
                assert (await self._ask("XPENDING", lane, "workers"))[0] == 0
                assert await self._ask("XLEN", lane) == 0
        keys = self.queue.keys
        permanent = {*keys.streams, keys.counters, keys.consumers, keys.dlq, keys.cancels}
        for key in await self._ask("KEYS", "orc:*"):
            assert key.decode() in permanent or await self._ask("PTTL", key) > 0, f"{key!r} has no time to live"
        return stats


def _open_files():
    return {fd: _target(fd) for fd in os.listdir("/proc/self/fd")}


def _target(fd):
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _held():
    """What this process holds now: asyncio tasks, threads of the product, sockets."""
    gc.collect()
    sockets = [target for target in _open_files().values() if target.startswith("socket:")]
    tasks = {task for task in asyncio.all_tasks() if not task.done()}
    threads = {thread for thread in threading.enumerate() if thread.name.startswith("orchestra")}
    return tasks, threads, len(sockets)


def _names_of_clients(server):
    with contextlib.closing(redis.Redis(unix_socket_path=server.socket)) as client:
        return [row["name"] for row in client.client_list() if row["name"].startswith("orchestra")]


@contextlib.asynccontextmanager
async def quiet_afterwards(server=None):
    """Within it, whatever is started must be ended: tasks, threads, sockets, and connections as ``server`` sees them."""
    tasks, threads, sockets = _held()
    yield
    end = time.monotonic() + 10
    while True:
        tasks_now, threads_now, sockets_now = _held()
        clients = _names_of_clients(server) if server is not None and server.process.poll() is None else []
        left = tasks_now - tasks, threads_now - threads, sockets_now - sockets, clients
        if not (left[0] or left[1] or left[2] > 0 or left[3]):
            return
        assert time.monotonic() < end, f"left behind: tasks {left[0]}, threads {left[1]}, {left[2]} sockets, {clients}"
        await asyncio.sleep(0.01)


class Witness(logging.Handler):
    """Counts log lines at WARNING and above, and events, while it is used as a context manager."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        self.events: Counter[str] = Counter()

    def emit(self, record):
        self.lines.append(f"{record.name}: {record.getMessage()}")

    def _count(self, name, measurements, metadata):
        self.events[name] += 1

    def __enter__(self):
        logging.getLogger("orchestra").addHandler(self)
        self._detach = telemetry.attach(self._count)
        return self

    def __exit__(self, *exc):
        self._detach()
        logging.getLogger("orchestra").removeHandler(self)


@contextlib.contextmanager
def no_spin(share=0.5):
    """Within it, this process uses at most ``share`` of one core (and a start-up allowance)."""
    wall, cpu = time.monotonic(), time.process_time()
    yield
    used, passed = time.process_time() - cpu, time.monotonic() - wall
    assert used <= share * passed + 0.3, f"{used:.2f} s of processor time in {passed:.2f} s"


@contextlib.asynccontextmanager
async def admin_of(server):
    """A client of the operator, past every proxy."""
    client = redis.asyncio.Redis(unix_socket_path=server.socket, protocol=2, client_name="admin")
    try:
        yield client
    finally:
        await client.aclose()


async def load_scripts(admin):
    """Let the server know every script, so that the first call of each is not answered with NOSCRIPT."""
    for file in resources.files("orchestra.lua").iterdir():
        if file.name.endswith(".lua"):
            await admin.script_load(script(file.name[:-4]).text)


async def calls_of(admin, *commands):
    """How often the server ran each of ``commands`` so far."""
    stats = await admin.info("commandstats")
    return [stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in commands]
