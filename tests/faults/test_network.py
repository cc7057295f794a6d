"""Group C, the network between client and server: late, lost, cut, damaged, silent, refused and flapping.

All through the proxy; what the reply reader does with every single byte is in test_network_bytes.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orchestra._redis.link import Link
from orchestra._redis.wire import pack
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreError, StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import Fleet, Witness, admin_of, load_scripts, no_spin, quiet_afterwards, until
from tests.faults.proxy import Proxy

HASTY = {"timeout": 0.5, "connect_timeout": 0.5}


# Whose reply is it


async def test_c1_a_late_reply_reaches_nobody(make_server):
    """C1: replies beyond the deadline, which then arrive: the connection is gone, every caller has his own or an error."""
    server = make_server()
    async with quiet_afterwards(server), Proxy(server.url) as proxy:
        async with ConnectionManager(proxy.url, **HASTY) as manager:
            link = Link(manager, "commands", "tasks")
            late = errors = 0

            async def ask(nonce):
                nonlocal errors
                try:
                    (reply,) = await link.send(pack((("ECHO", nonce),)), 1, 0.3)
                except StoreUnavailableError:
                    errors += 1
                else:
                    assert reply == nonce.encode()

            for turn in range(4):
                await link.wire()
                proxy.delay_reply("ECHO", nth=7, seconds=0.6)
                await asyncio.gather(*[ask(f"{turn}.{n}") for n in range(20)])
                late += 1
                await asyncio.gather(*[ask(f"{turn}.again.{n}") for n in range(20)])
            assert errors >= late
            await link.close()


async def test_c1_a_produce_whose_reply_is_late_adds_one_entry(make_server):
    """C1: the reply to a produce comes after the deadline: the repeat finds the first entries and answers their ids."""
    server = make_server()
    async with quiet_afterwards(server), Proxy(server.url) as proxy, Fleet(server.url) as fleet:
        manager = ConnectionManager(proxy.url, **HASTY)
        producer = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        await producer.get_queue_depth()
        delayed = {"type": "work", "delay": 0.5}
        calls = {
            "produce_many": [{"type": "work"}] * 3,
            "produce": [delayed] * 3,
            "produce_one": [{"id": "own", "type": "work"}],
        }
        for script, tasks in calls.items():
            late = proxy.delay_reply(script, seconds=1.2)
            ids = await producer.produce_many(tasks)
            assert late.fired
            assert len(set(ids)) == len(tasks)
        await producer.close()
        await manager.close()
        stats = await fleet.drained()
        assert stats.counters["produced"] == stats.counters["completed"] == 7
        assert len(fleet.seen) == 7


async def test_c2_cancelling_while_the_reply_is_in_flight_leaves_the_shared_connection_in_step(make_server):
    """C2: cancelled callers, at any moment of the round trip: everybody else gets his own reply, on the same connection."""
    server = make_server()
    rng = random.Random(2)
    async with quiet_afterwards(server), Proxy(server.url) as proxy, ConnectionManager(proxy.url) as manager:
        link = Link(manager, "commands", "tasks")
        await link.wire()
        accepted = proxy.accepted
        proxy.delay(0.005, jitter=0.005)

        async def ask(nonce):
            (reply,) = await link.send(pack((("ECHO", nonce),)), 1)
            assert reply == nonce.encode()
            return nonce

        cancelled = 0
        for turn in range(15):
            callers = [asyncio.create_task(ask(f"{turn}.{n}")) for n in range(20)]
            await asyncio.sleep(rng.uniform(0, 0.03))
            victims = rng.sample(callers, 10)
            for victim in victims:
                victim.cancel()
            ends = await asyncio.gather(*callers, return_exceptions=True)
            cancelled += sum(isinstance(end, asyncio.CancelledError) for end in ends)
            assert all(isinstance(end, str | asyncio.CancelledError) for end in ends), ends
        assert cancelled
        assert proxy.accepted == accepted, "no connection was lost"
        await link.close()


# Damaged on the way


@pytest.mark.parametrize("name", ["XREADGROUP", "take", "complete_result", "produce", "promote"])
async def test_c3_c4_the_whole_survives_damaged_replies(make_server, name):
    """C3 C4: a reply cut or damaged on its way, through the whole: connection dropped, each task ends exactly once."""
    server = make_server()
    room = 8 if name == "take" else 50  # small reads go through the script
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, lease_ms=1500, concurrency=room) as fleet,
    ):
        await fleet.send(5, want_results=True)
        await fleet.drained()
        for turn, (fault, at) in enumerate(itertools.product(("fin", "rst", "corrupt"), (0, 4))):
            if fault == "corrupt":
                rule = proxy.corrupt_reply(name, offset=at, put=b"\xff")
            else:
                rule = proxy.truncate_reply(name, keep=at, how=fault)
            if name == "XREADGROUP":
                for _ in range(50):  # a blocking read happens only when nothing is there
                    await fleet.send(1, want_results=True)
                    if rule.fired:
                        break
                    await asyncio.sleep(0.05)
            else:
                await fleet.send(20, want_results=True, delay=0.01 * (turn % 3))
            await rule.wait(30)
        await fleet.assert_settled()


# Silence


@pytest.mark.parametrize("fault", ["fin down", "fin up", "black hole"])
async def test_c5_silence_is_noticed_by_the_deadline_in_blocked_reads_too(make_server, fault):
    """C5: half-closed and black-holed connections: each is replaced within its deadline, and work goes on."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, lease_ms=4000, manage=HASTY) as fleet,
    ):
        await fleet.send(5)
        await fleet.drained()
        commands = await fleet.queue._commands()
        old = fleet.wire("reader"), fleet.wire("commands"), await commands.wire()
        began = time.monotonic()
        if fault == "black hole":
            proxy.stall("down")
        else:
            proxy.half_close(fault.split()[1])
        sending = asyncio.create_task(fleet.send(5))
        await until(lambda: all(wire.closed for wire in old), 30)
        assert time.monotonic() - began < 20, "a block of 1 s and a deadline of 0.5 s"
        await proxy.heal(lose=True)
        await sending
        await fleet.send(5)
        await fleet.assert_settled()


async def test_c5_a_subscription_that_went_silent_is_replaced(make_server, monkeypatch):
    """C5: the subscriber's connection is black-holed: results are still found, and a new subscription takes over."""
    from orchestra._queue import replies

    monkeypatch.setattr(replies, "LOOK_AGAIN", 0.3)
    monkeypatch.setattr(replies, "SILENCE", 0.6)
    server = make_server()
    async with quiet_afterwards(server), Proxy(server.url) as proxy, Fleet(server.url, produce_url=proxy.url) as fleet:
        (first,) = await fleet.send(1, want_results=True)
        await fleet.queue.wait_result(first, 30)
        async with admin_of(server) as admin:

            async def subscribers():
                return [row["id"] for row in await admin.client_list() if row["sub"] != "0"]

            (old,) = await until(subscribers)
            proxy.stall("down", role="orchestra")

            async def given_up():
                return old not in await subscribers()

            await until(given_up)
            await proxy.heal(lose=True)
            (new,) = await until(subscribers)
            assert new != old
        (second,) = await fleet.send(1, want_results=True)
        assert (await fleet.queue.wait_result(second, 30))["outcome"] == "completed"
        await fleet.assert_settled()


# Connecting


@pytest.mark.parametrize("fault", ["refuse", "hang up", "hang"])
async def test_c6_connects_are_few_while_nobody_answers(make_server, monkeypatch, fault):
    """C6: refused, accepted and closed, accepted and silent: full jitter, bounded connects, one log line an outage."""
    attempts = []
    real = ConnectionManager.open_wire

    async def counted(self, role, **options):
        attempts.append((self, role, time.monotonic()))
        return await real(self, role, **options)

    monkeypatch.setattr(ConnectionManager, "open_wire", counted)
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, lease_ms=5000, manage=HASTY) as fleet,
    ):
        await fleet.send(5)
        await fleet.drained()
        attempts.clear()
        with Witness() as witness, no_spin():
            accepted = proxy.accepted
            if fault == "refuse":
                await proxy.refuse()
            elif fault == "hang up":
                proxy.accept_then_close()
            else:
                proxy.stall("both")
            proxy.reset()
            sending = [asyncio.create_task(fleet.send(1)) for _ in range(30)]
            await asyncio.sleep(1.5)
            tried, accepted = list(attempts), proxy.accepted - accepted
            await proxy.heal(lose=True)
            await asyncio.gather(*sending)
            await fleet.assert_settled()
        assert tried
        for link in {(manager, role) for manager, role, _ in tried}:
            count = sum(row[:2] == link for row in tried)
            assert count <= 25, f"{count} attempts of {link[1]}"
        assert accepted <= 80
        assert len(witness.lines) <= 10, witness.lines


async def test_c6_many_workers_come_back_one_after_another(make_server, monkeypatch):
    """C6: eight workers lose the server at once: their attempts to connect are spread by jitter, and all come back."""
    attempts = []
    real = ConnectionManager.open_wire

    async def counted(self, role, **options):
        attempts.append((id(self), time.monotonic()))
        return await real(self, role, **options)

    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, workers=8, lease_ms=5000) as fleet,
    ):
        await fleet.send(20)
        await fleet.drained()
        monkeypatch.setattr(ConnectionManager, "open_wire", counted)
        attempts.clear()
        await proxy.refuse()
        proxy.reset()
        workers = {id(manager) for manager, _, _ in fleet.workers}
        await until(lambda: workers <= {worker for worker, _ in attempts})
        await asyncio.sleep(1.0)
        await proxy.heal()
        await fleet.send(50)
        await fleet.assert_settled()
        second = {}
        for worker, moment in attempts:
            second.setdefault(worker, []).append(moment)
        gaps = {worker: [b - a for a, b in zip(row, row[1:], strict=False)] for worker, row in second.items()}
        firsts = [row[0] for row in gaps.values() if row]
        assert len(firsts) >= 6
        assert max(firsts) - min(firsts) > 0.005, "no jitter"
        assert len({round(gap, 4) for gap in firsts}) >= 4, "in step"


# Executed, but the reply was lost


@pytest.mark.parametrize("script", ["complete", "complete_result", "retry", "dead_letter"])
async def test_c8_c9_a_settle_whose_reply_is_lost_is_repeated_without_effect(make_server, script):
    """C8 C9: settle, retry and dead-letter executed, reply lost, repeated: one entry, one letter, nothing runs again."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, produce_url=server.url, lease_ms=10_000) as fleet,
        admin_of(server) as admin,
    ):
        await load_scripts(admin)
        facts = {"fail": 1} if script == "retry" else {"fail": 9} if script == "dead_letter" else {}
        wanted = script in {"complete_result", "dead_letter"}
        rules = [proxy.drop_reply(script, nth=n, how=how) for n, how in ((1, "rst"), (2, "fin"))]
        ids = await fleet.send(6, want_results=wanted, lanes=(2,), **facts)
        for rule in rules:
            await rule.wait(60)
        stats = await fleet.assert_settled(retries=6 * min(3, facts.get("fail", 0)))
        expected = {"complete": 1, "complete_result": 1, "retry": 2, "dead_letter": 4}[script]
        assert dict(fleet.attempts) == dict.fromkeys(ids, expected)
        ended = "dead" if script == "dead_letter" else "completed"
        assert stats.counters[ended] == 6
        letters = await fleet.queue.read_dlq()
        assert len(letters) == (6 if script == "dead_letter" else 0)
        assert len({letter.task_data["id"] for letter in letters}) == len(letters)
        if wanted:
            for task_id in ids:
                assert (await fleet.queue.wait_result(task_id, 30))["outcome"] == ended


WORKER = """
    import asyncio, os, sys
    from orchestra.agents import AgentRegistry
    from orchestra.connections import ConnectionManager
    from orchestra.dispatcher import Dispatcher
    from orchestra.task_queue import RedisStreamTaskQueue

    async def work(task):
        print("ran", task.id, flush=True)
        return "the result"

    async def main():
        agents = AgentRegistry()
        agents.register("work", work)
        manager = ConnectionManager(sys.argv[1])
        await Dispatcher(RedisStreamTaskQueue("tasks", "workers", 1000, manager=manager), agents=agents).run()

    asyncio.run(main())
"""


async def test_a4_a_worker_killed_after_its_settle_was_executed_causes_no_second_run(make_server):
    """A4: the settle's reply is swallowed and the worker killed: the task is done, its result readable, not run again."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(server.url, workers=0, lease_ms=1000) as fleet,
    ):
        swallowed = proxy.drop_reply("complete_result", how="stay")
        (one,) = await fleet.send(1, want_results=True)
        command = [sys.executable, "-c", textwrap.dedent(WORKER), proxy.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
            try:
                assert await asyncio.to_thread(worker.stdout.readline) == f"ran {one}\n"
                await swallowed.wait(60)
            finally:
                worker.send_signal(signal.SIGKILL)
        record = await fleet.queue.wait_result(one, 30)
        assert (record["outcome"], record["value"]) == ("completed", "the result")
        async with Fleet(server.url, lease_ms=1000, name="other") as others:
            await others.send(3)
            await asyncio.sleep(1.5)  # a lease and a half: what was not settled would be taken over
            stats = await others.drained()
            assert len(others.attempts) == 3
        assert stats.counters["completed"] == stats.counters["produced"] == 4
        assert stats.counters.get("reclaimed", 0) == 0


# Slow and shaky


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["latency", "slow bytes"])
async def test_c10_latency_and_slow_bytes_cost_speed_and_no_lease(make_server, mode):
    """C10: 200 ms with jitter, or 20 kB a second: everything arrives, no lease is lost, nothing runs twice."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, workers=2, lease_ms=3000) as fleet,
    ):
        await fleet.send(5)
        await fleet.drained()
        if mode == "latency":
            proxy.delay(0.1, jitter=0.05)
        else:
            proxy.slow(20_000)
        await asyncio.gather(fleet.send(4, sleep=3.0), *[fleet.send(20) for _ in range(4)])
        await until(lambda: len(fleet.attempts) == 89)
        stats = await fleet.drained()
        assert stats.counters.get("reclaimed", 0) == 0
        assert stats.counters.get("duplicates", 0) == 0
        await proxy.heal()
        await fleet.assert_settled()


@pytest.mark.slow
async def test_c12_a_flapping_link_makes_progress_and_leaks_nothing(make_server):
    """C12: 300 ms up, 300 ms down, seven times: progress in every cycle or two, bounded log, nothing left behind."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Proxy(server.url) as proxy,
        Fleet(proxy.url, workers=2, lease_ms=2000, manage=HASTY) as fleet,
    ):
        await fleet.send(5)
        await fleet.drained()
        loads = [asyncio.create_task(fleet.load(60, size=5)) for _ in range(3)]
        done = []
        with Witness() as witness, no_spin(0.8):
            for _ in range(7):
                await proxy.refuse()
                proxy.reset()
                await asyncio.sleep(0.3)
                await proxy.heal()
                await asyncio.sleep(0.3)
                done.append(len(fleet.seen))
            assert len(proxy.connections) <= 30
            await asyncio.gather(*loads)
            await fleet.assert_settled(repeats=30)
        assert done[-1] > 5, "progress while it flaps"
        assert len(witness.lines) <= 60, witness.lines


async def test_store_errors_are_what_callers_see_when_patience_ends(make_server):
    """C6: patience over: one StoreUnavailableError that says what to do, chained to its cause, never a bare OSError."""
    server = make_server()
    async with quiet_afterwards(server), ConnectionManager(server.url) as manager:
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager, patience=0.3)
        await queue.get_queue_depth()
        server.kill()
        for attempt in (lambda: queue.produce({"type": "work"}), queue.stats, queue.read_dlq, queue.purge_dlq):
            with pytest.raises(StoreUnavailableError, match="Is the server running there|repeat what may be repeated"):
                await attempt()
        with pytest.raises(TimeoutError, match="no result after"):
            await queue.wait_result("x", 0.3)
        with contextlib.suppress(StoreError):
            await queue.close()
