"""Clocks that are wrong: the server's jumps, a worker's is days off (rows F1 to F5).

The server's clock is shifted by ``clock_shim.c``, preloaded into it; time passes at its own pace in all processes.
"""

from __future__ import annotations

import ast
import asyncio
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

import orchestra
from orchestra._delivery import DONE
from orchestra.agents import AgentRegistry
from orchestra.connections import ConnectionManager
from orchestra.dispatcher import Dispatcher
from tests.faults._checks import until
from tests.faults._lease_tools import TalkingWorker, age, events, pending, queue_for
from tests.waiting import settled

SOURCE = Path(__file__).with_name("clock_shim.c")
HOUR, DAY = 3600, 86_400


@pytest.fixture(scope="session")
def shim(tmp_path_factory):
    """The compiled shim."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler: the clock of another process cannot be shifted")
    built = tmp_path_factory.mktemp("shim") / "clock_shim.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O2", "-o", built, SOURCE], check=True)
    return built


class Clock:
    """The shift of one process's wall clock; ``env`` preloads it."""

    def __init__(self, shim, path):
        self._path = path
        self.jump(0.0)
        self.env = {"LD_PRELOAD": str(shim), "CLOCK_SHIM": str(path)}

    def jump(self, seconds):
        """Be ``seconds`` ahead of true time from now on; negative: behind."""
        with open(self._path, "r+b" if self._path.exists() else "wb") as file:
            file.write(struct.pack("=q", round(seconds * 1e6)))


@pytest.fixture
def clock(shim, tmp_path):
    return Clock(shim, tmp_path / "offset")


@pytest.fixture
def shifted_server(clock, make_server, monkeypatch):
    """A server on ``clock``."""
    with monkeypatch.context() as patch:
        for name, value in clock.env.items():
            patch.setenv(name, value)
        return make_server()


async def redis_time(client):
    seconds, micros = await client.time()
    return seconds + micros / 1e6


async def test_the_shim_shifts_the_server_and_nothing_else(shifted_server, clock):
    """F1, F2: what the other tests stand on."""
    async with ConnectionManager(shifted_server.url) as manager:
        before = await redis_time(manager.client)
        clock.jump(HOUR)
        assert HOUR <= await redis_time(manager.client) - before < HOUR + 60
        clock.jump(-HOUR)
        assert -HOUR <= await redis_time(manager.client) - before < -HOUR + 60


async def test_f1_a_forward_jump_takes_nothing_from_live_owners(shifted_server, clock):
    """F1: the server's clock jumps by an hour: every idle time looks like a dead owner's, and nobody is robbed."""
    started, gate = [], asyncio.Event()
    agents = AgentRegistry()

    async def hold(task):
        started.append(task.id)
        await gate.wait()

    agents.register("hold", hold)
    async with ConnectionManager(shifted_server.url) as one, ConnectionManager(shifted_server.url) as two:
        owner, thief = queue_for(one, 4000), queue_for(two, 4000)
        await owner.produce_many([{"id": f"t{n}", "type": "hold"} for n in range(30)])
        with events("queue.quiet", "queue.reclaimed") as seen:
            async with Dispatcher(owner, agents=agents):
                await until(lambda: len(started) == 30)
                async with Dispatcher(thief, agents=agents):
                    await until(lambda: thief._upkeep._ticked_at)
                    thief._upkeep._quiet_until = owner._upkeep._quiet_until = 0.0
                    seen.clear()
                    clock.jump(HOUR)
                    await until(lambda: [facts["reason"] for _, facts in seen].count("clock_jump") == 2)
                    gate.set()
                    stats = await settled(owner)
        assert sorted(started) == sorted({f"t{n}" for n in range(30)}), "each ran once"
        assert {name for name, _ in seen} == {"queue.quiet"}
        assert stats.counters == {"produced": 30, "completed": 30}
        await owner.close()
        await thief.close()


async def test_f1_a_jump_between_tick_and_reclaim_is_seen_by_the_script(shifted_server, clock):
    """F1: even a reclaim whose tick was still in the old time takes nothing; delayed tasks come early by the jump."""
    async with ConnectionManager(shifted_server.url) as manager:
        owner, thief = queue_for(manager, 4000), queue_for(manager, 4000)
        await owner.produce({"id": "t", "type": "x"})
        (delivery,) = await owner.read("owner", 1, 100)
        await owner.produce({"id": "later", "type": "x", "delay": HOUR / 2})
        await thief.maintain("thief", 0)
        clock.jump(HOUR)
        assert await thief.reclaim("thief", 10, 4000) == []
        work = await thief.maintain("thief", 10)
        assert work.deliveries == []
        assert thief.now() == pytest.approx(await redis_time(manager.client), abs=1.0)
        (early,) = await thief.read("thief", 10, 100)
        assert early.header.id == "later", "stated: due times are the server's"
        assert await owner.settle([(delivery, DONE)]) == []
        assert await thief.settle([(early, DONE)]) == []
        await settled(owner)
        await owner.close()
        await thief.close()


async def test_f2_a_backward_jump_delays_and_loses_nothing(shifted_server, clock):
    """F2: reclaim and promotion wait for as long as the clock went back; ids grow; new work is not affected."""
    clock.jump(0)
    async with ConnectionManager(shifted_server.url) as manager:
        queue, thief = queue_for(manager, 4000), queue_for(manager, 4000)
        await queue.produce_many([{"id": name, "type": "x"} for name in ("held", "waiting")])
        await queue.produce({"id": "delayed", "type": "x", "delay": 0.05})
        (held,) = await queue.read("owner", 1, 100)
        await age(manager.client, queue, 3600)
        await thief.maintain("thief", 0)
        with events("queue.quiet", "queue.promoted") as seen:
            clock.jump(-2 * HOUR)
            work = await thief.maintain("thief", 0)
            assert [facts.get("reason") for _, facts in seen] == ["clock_jump"], "and not promoted early"
            assert 0 < work.next_in <= 1.0
        await queue.produce_many([{"id": f"new{n}", "type": "x"} for n in range(3)])
        await queue.produce({"id": "soon", "type": "x", "delay": 0.05})
        found = await thief.read("thief", 10, 100)
        assert [d.header.id for d in found] == ["waiting", "new0", "new1", "new2"]
        stamps = [tuple(map(int, d.entry.split(b"-"))) for d in found]
        assert stamps == sorted(stamps)

        async def promoted():
            await thief.maintain("thief", 0)
            return await thief.read("thief", 10, 1)

        (soon,) = await until(promoted)
        assert soon.header.id == "soon", "its delay began after the jump"
        assert await thief.reclaim("thief", 10, 4000) == [], "the delivery lies in the future now"
        assert {idle for _, who, idle, _ in await pending(manager.client, queue) if who == b"owner"} == {0}
        assert await thief.settle([(d, DONE) for d in (*found, soon)]) == []
        clock.jump(0)
        await thief.maintain("thief", 0)
        (delayed,) = await until(promoted)
        assert delayed.header.id == "delayed"
        (again,) = await thief.reclaim("thief", 10, 4000)
        assert (again.entry, again.deliveries) == (held.entry, 2)
        assert await thief.settle([(d, DONE) for d in (delayed, again)]) == []
        assert await queue.settle([(held, DONE)]) == [held]
        assert (await settled(queue)).counters["completed"] == 7
        await queue.close()
        await thief.close()


@pytest.mark.parametrize("days", [3, -3])
async def test_f3_a_worker_whose_clock_is_days_off_works_as_any_other(
    redis_url, manager, clock, tmp_path, days, monkeypatch
):
    """F3: leases, due times, retries and deadlines follow the server's clock: the worker's wall clock does not matter."""
    clock.jump(days * DAY)
    with monkeypatch.context() as patch:
        for name, value in clock.env.items():
            patch.setenv(name, value)
        worker = TalkingWorker(redis_url, 1500, tmp_path / "flag")
    queue = queue_for(manager, 1500)
    try:
        await queue.maintain("here", 0)
        tasks = [
            {"id": "now", "type": "wait"},
            {"id": "delayed", "type": "wait", "delay": 0.5},
            {"id": "in time", "type": "wait", "deadline": queue.now() + HOUR},
            {"id": "too late", "type": "wait", "deadline": queue.now() - 1.0},
        ]
        tasks = [{**task, "id": task["id"].replace(" ", "-")} for task in tasks]
        began = asyncio.get_running_loop().time()
        await queue.produce_many(tasks, want_results=True)
        await worker.says("started", id="now")
        (delayed,) = await worker.says("started", id="delayed")
        assert delayed["at"] - began >= 0.5
        await worker.says("started", id="in-time")
        assert (await queue.wait_result("too-late", 60))["reason"] == "deadline_missed"
        assert await queue.reclaim("thief", 10, 1500) == [], "its leases are kept"
        (tmp_path / "flag").touch()
        stats = await settled(queue)
        assert stats.counters == {"produced": 4, "completed": 3, "dead": 1}
        assert worker.heard("queue.quiet") == worker.heard("cancelled") == []
    finally:
        worker.end()
    await queue.close()


WALL_CLOCK = {
    "_agents/context.py": 1,  # agents that are called by hand, without a queue whose clock would count
    "_queue/base.py": 1,  # BaseTaskQueue.now: queues without a shared clock
    "_queue/upkeep.py": 1,  # until the first tick has told the server's
    "cli": None,  # shown to people
}


def test_f4_durations_are_never_wall_clock():
    """F4: DST, leap seconds and slewing cannot matter: the product reads the wall clock where no duration comes from it."""
    package = Path(orchestra.__file__).parent
    counts = {}
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in {"time.time", "time.time_ns", "datetime.now"}:
                name = "cli" if "cli" in path.parts else path.relative_to(package).as_posix()
                counts[name] = counts.get(name, 0) + 1
    assert {name: count for name, count in counts.items() if WALL_CLOCK.get(name, 0) != count and name != "cli"} == {}
    assert set(WALL_CLOCK) - {"cli"} <= set(counts), "rows that are no longer needed"


async def test_f5_a_lock_that_a_jump_ended_early_is_caught_by_its_fence(shifted_server, clock):
    """F5: times to live are not monotonic in Redis: the fences are."""
    async with ConnectionManager(shifted_server.url) as one, ConnectionManager(shifted_server.url) as two:
        first, second = queue_for(one), queue_for(two)
        guarded = []

        def write(fence):
            if guarded and fence < guarded[-1]:
                raise PermissionError(fence)
            guarded.append(fence)

        async with await first.get_lock("x", 30) as old:
            write(old_fence := old.fence)
            clock.jump(HOUR)
            async with await second.get_lock("x", 30, wait=30) as new:
                assert new.fence > old_fence
                write(new.fence)
                with pytest.raises(PermissionError):
                    write(old_fence)
                assert await old.release() is False
                write(new.fence)
        await first.close()
        await second.close()


async def test_f5_a_jump_over_the_dedup_window_repeats_at_most(shifted_server, clock):
    """F5: what is forgotten early costs a second task, never a lost one; within the window it costs nothing."""
    async with ConnectionManager(shifted_server.url) as manager:
        queue = queue_for(manager, dedup_window=3600.0)
        first = await queue.produce({"id": "a", "type": "x"})
        clock.jump(HOUR / 2)
        assert await queue.produce({"id": "a", "type": "x"}) == first
        clock.jump(3 * HOUR)
        again = await queue.produce({"id": "a", "type": "x"})
        assert again != first
        found = await queue.read("c", 10, 100)
        assert [d.message_id for d in found] == [first, again]
        assert await queue.settle([(d, DONE) for d in found]) == []
        assert (await settled(queue)).counters == {"produced": 2, "duplicates": 1, "completed": 2}
        await queue.close()
