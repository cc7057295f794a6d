"""Group B, what an operator does to the server: flushed, destroyed, forgotten, paused, blocked, disconnected, overwritten.

Also the table of error replies against what a live server says.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time

import pytest
import redis

from orchestra._redis.errors import _ADVICE
from orchestra._redis.wire import pack, reply_code, reply_error
from orchestra.connections import ConnectionManager
from orchestra.errors import ForkedProcessError, StoreAuthError, StoreError, StoreFullError, StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import Fleet, Witness, admin_of, calls_of, no_spin, quiet_afterwards, until


async def _blocked(admin):
    """Until a reader waits in a blocking read."""

    async def seen():
        return (await admin.info("clients"))["blocked_clients"] > 0

    await until(seen)


@pytest.mark.parametrize("fault", ["flushall", "del", "unlink_all", "destroy", "destroy_all"])
async def test_b14_streams_and_groups_that_vanish_under_a_blocked_reader_come_back(make_server, fault):
    """B14: 7.0 says UNBLOCKED, 7.2 and later NOGROUP: the group is made again at 0, one event, no hot loop."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url) as fleet, admin_of(server) as admin:
        await fleet.send(5)
        await fleet.drained()
        await _blocked(admin)
        with Witness() as witness, no_spin():
            lanes = fleet.queue.keys.lanes
            before = await calls_of(admin, "xreadgroup", "xgroup|create")
            if fault == "flushall":
                await admin.flushall()
                fleet.acked.clear()
                fleet.attempts.clear()
            elif fault in {"del", "unlink_all"}:
                await admin.unlink(*(lanes if fault == "unlink_all" else lanes[2:3]))
            else:
                destroy = admin.pipeline(transaction=True)  # one moment, hence one report
                for lane in lanes if fault == "destroy_all" else lanes[2:3]:
                    destroy.xgroup_destroy(lane, "workers")
                await destroy.execute()
            lost = len(lanes) if fault in {"flushall", "unlink_all", "destroy_all"} else 1
            await until(lambda: witness.events["queue.group_recreated"] >= lost)
            ids = await fleet.send(20)
            await until(lambda: set(ids) <= set(fleet.attempts))
            await fleet.assert_settled()
            await _blocked(admin)
            after = await calls_of(admin, "xreadgroup", "xgroup|create")
        assert witness.events["queue.group_recreated"] == lost, witness.events
        assert witness.events["queue.data_loss_suspected"] == (0 if "destroy" in fault else 1), witness.events
        reads, groups = (b - a for a, b in zip(before, after, strict=True))
        assert reads < 60
        assert groups <= 12
        assert 1 <= len(witness.lines) <= 3, witness.lines


async def test_b14_a_group_that_was_destroyed_reads_what_waited_meanwhile(make_server):
    """B14: the group comes back at 0, not at $: what was added while there was none is delivered."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url, workers=0) as fleet, admin_of(server) as admin:
        await fleet.queue.consume("c", 1, 0)
        for lane in fleet.queue.keys.lanes:
            await admin.xgroup_destroy(lane, "workers")
        await fleet.send(8)
        found = await fleet.queue.consume("c", 100, 5000)
        found += await fleet.queue.consume("c", 100, 0)
        assert {task["id"] for _, task in found} == fleet.acked
        assert all(await fleet.queue.acknowledge_many([message_id for message_id, _ in found]))
        assert (await fleet.queue.stats()).adds_up


async def test_b15_forgotten_scripts_are_sent_again_in_place(make_server):
    """B15: SCRIPT FLUSH every few milliseconds under load with failures, delays and results: nothing lost or repeated."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url, workers=2) as fleet, admin_of(server) as admin:
        loads = [fleet.load(60), fleet.load(30, fail=1), fleet.load(30, delay=0.05), fleet.load(20, want_results=True)]
        loads = [asyncio.create_task(load) for load in loads]
        flushes = 0
        while not all(load.done() for load in loads) or flushes < 20:
            await admin.script_flush()
            flushes += 1
            await asyncio.sleep(0.01)
        assert not fleet.unknown
        records = await asyncio.gather(
            *[fleet.queue.wait_result(i, 30) for i in await fleet.send(5, want_results=True)]
        )
        assert {record["outcome"] for record in records} == {"completed"}
        await fleet.assert_settled(retries=300)


# Paused and blocked


@contextlib.asynccontextmanager
async def _busy(server):
    """A script that runs until it is killed."""
    async with admin_of(server) as one:
        running = asyncio.create_task(one.eval("while true do end", 0))

        async def busy():
            return b"BUSY" in await asyncio.to_thread(server.ask, b"PING")

        await until(busy)
        try:
            yield
        finally:
            assert await asyncio.to_thread(server.ask, b"SCRIPT KILL") == b"+OK\r\n"
            with pytest.raises(redis.ResponseError, match=r"killed|Error running script"):
                await running


async def test_b16_a_script_that_blocks_the_server_delays_but_repeats_nothing(make_server):
    """B16: BUSY: a typed error inside, patience outside; leases last, nothing runs twice, one log line each."""
    server = make_server("--busy-reply-threshold", "50")
    async with quiet_afterwards(server), Fleet(server.url, workers=2, lease_ms=10_000) as fleet:
        await fleet.send(20, sleep=0.5)
        await until(lambda: len(fleet.seen) == 20)
        link = await fleet.queue._commands()
        with Witness() as witness, no_spin():
            async with _busy(server):
                sending = asyncio.create_task(fleet.send(10))
                wire = await link.wire()
                with pytest.raises(StoreUnavailableError, match="SCRIPT KILL") as caught:
                    await wire.call("GET", "x")
                assert reply_code(caught.value) == "BUSY"
                await asyncio.sleep(0.8)
                assert not sending.done()
            await sending
            stats = await fleet.assert_settled()
        assert stats.counters.get("reclaimed", 0) == 0
        assert len(witness.lines) < 12, witness.lines


async def test_b16_a_pause_below_the_lease_costs_no_lease(make_server):
    """B16: CLIENT PAUSE ALL, CLIENT PAUSE WRITE, DEBUG SLEEP for half a lease: no reclaim, nothing runs twice."""
    servers = [make_server() for _ in range(3)]

    async def pause(server, how):
        async with Fleet(server.url, workers=2, lease_ms=1600) as fleet, admin_of(server) as admin:
            await fleet.send(20, sleep=2.5)
            await until(lambda: len(fleet.seen) == 20)
            pausing = asyncio.create_task(_pause(admin, how, 0.8))
            await fleet.send(10)
            await pausing
            stats = await fleet.assert_settled()
            assert stats.counters.get("reclaimed", 0) == 0
            assert stats.counters.get("duplicates", 0) == 0

    async with quiet_afterwards(servers[0]), asyncio.TaskGroup() as group:
        for server, how in zip(servers, ("all", "write", "sleep"), strict=True):
            group.create_task(pause(server, how))


async def test_b16_a_pause_beyond_the_lease_repeats_at_most_what_ran(make_server):
    """B16: a pause longer than the lease: each task still ends exactly once; late settles change nothing."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url, workers=2, lease_ms=600) as fleet, admin_of(server) as admin:
        await fleet.send(20, sleep=1.0)
        await until(lambda: len(fleet.seen) == 20)
        pausing = asyncio.create_task(_pause(admin, "all", 1.5))
        await fleet.send(10)
        await pausing
        await fleet.assert_settled(repeats=20)


async def _pause(admin, how, seconds):
    if how == "sleep":
        await admin.execute_command("DEBUG", "SLEEP", seconds)
    else:
        await admin.execute_command("CLIENT", "PAUSE", int(seconds * 1000), how.upper())


# Connections


async def test_b17_every_connection_is_killed_again_and_again(make_server):
    """B17: CLIENT KILL of each connection in turn, then of all, under load, the lease thread's and the subscriber's too."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Fleet(server.url, workers=2, lease_ms=3000) as fleet,
        admin_of(server) as admin,
    ):
        await fleet.queue.wait_result((await fleet.send(1, want_results=True))[0], 30)  # who waits subscribes
        loads = [asyncio.create_task(fleet.load(40, want_results=True)), asyncio.create_task(fleet.load(3, sleep=4))]
        killed = set()
        turn = 0
        kinds = {"orchestra", "orchestra:commands", "orchestra:reader", "subscriber"}
        while not all(load.done() for load in loads) or turn < 30 or not kinds <= killed:
            victims = [row for row in await admin.client_list() if row["name"] != "admin"]
            if turn % 5 == 4:
                await admin.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            elif victims:
                victim = victims[turn % len(victims)]
                killed.add("subscriber" if "P" in victim["flags"] or victim["sub"] != "0" else victim["name"])
                await admin.execute_command("CLIENT", "KILL", "ID", victim["id"])
            turn += 1
            await asyncio.sleep(0.02)
        with contextlib.suppress(Exception):
            await admin.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        record = await fleet.queue.wait_result((await fleet.send(1, want_results=True))[0], 30)
        assert record["outcome"] == "completed"
        assert not fleet.unknown
        await fleet.assert_settled()


async def test_b17_a_waiter_for_a_result_survives_an_outage(make_server):
    """B17: the server is away while somebody waits for a result: the wait goes on, it does not fail."""
    server = make_server("--appendonly", "yes")
    async with quiet_afterwards(server), Fleet(server.url, workers=0) as fleet:
        (one,) = await fleet.send(1, want_results=True)
        waiting = asyncio.create_task(fleet.queue.wait_result(one, 60))
        await until(lambda: fleet.queue._replies is not None and fleet.queue._replies._waiting)
        server.kill()
        await asyncio.sleep(0.3)
        await asyncio.to_thread(server.start)
        found = await fleet.queue.consume("c", 1, 10_000)
        await fleet.queue.acknowledge(found[0][0])
        assert (await waiting)["outcome"] == "completed"


@pytest.mark.parametrize("end", ["timeout", "close"])
async def test_b17_a_waiter_that_cannot_even_subscribe_is_told(make_server, end):
    """B17: the server says nothing while the first waiter subscribes: his timeout counts, and closing tells him."""
    server = make_server()
    async with ConnectionManager(server.url) as manager:
        queue = RedisStreamTaskQueue("quiet", "group", manager=manager)
        os.kill(server.pid, signal.SIGSTOP)
        try:
            waiting = asyncio.create_task(queue.wait_result("one", 0.3 if end == "timeout" else None))
            await asyncio.sleep(0.1)
            if end == "close":
                await queue.close()
            error = TimeoutError if end == "timeout" else StoreUnavailableError
            async with asyncio.timeout(1.5):
                with pytest.raises(error, match="has no result after" if end == "timeout" else "was closed"):
                    await waiting
        finally:
            os.kill(server.pid, signal.SIGCONT)
        await queue.close()


# Keys of the wrong type


async def test_b20_a_key_of_the_wrong_type_is_a_typed_error_and_heals(make_server):
    """B20: each key of the queue is overwritten while a worker runs: a typed error, no spin, and work after the repair."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url, patience=0.5) as fleet, admin_of(server) as admin:
        await fleet.send(4)
        await fleet.send(1, delay=0.01)
        await fleet.drained()
        keys = fleet.queue.keys
        for key in (keys.lanes[2], keys.delayed, keys.bodies, keys.counters, keys.consumers, *keys.dedup):
            with Witness() as witness, no_spin():
                before = sum(row["calls"] for row in (await admin.info("commandstats")).values())
                with contextlib.suppress(Exception):
                    await admin.rename(key, "kept")
                await admin.set(key, "a string")
                began = time.monotonic()
                result = (await asyncio.gather(fleet.send(4), return_exceptions=True))[0]
                assert isinstance(result, list) or (isinstance(result, StoreError) and "WRONGTYPE" in str(result)), (
                    result
                )
                await asyncio.sleep(max(0.0, 0.3 - (time.monotonic() - began)))
                spent = sum(row["calls"] for row in (await admin.info("commandstats")).values()) - before
                assert spent < 400, f"{spent} commands while {key} is wrong"
                await admin.delete(key)
                with contextlib.suppress(Exception):
                    await admin.rename("kept", key)
            assert len(witness.lines) < 10, witness.lines
            await fleet.send(4)
            await fleet.assert_settled()


# The table of errors


async def _refused(manager_or_url, *command, **options):
    async with ConnectionManager(manager_or_url, **options) as manager:
        return await _error_of(await manager.open_wire("x"), command)


async def _error_of(wire, command):
    """What ``command`` is refused with on ``wire``, which is closed."""
    try:
        await wire.call(*command)
    except StoreError as error:
        return error
    finally:
        await wire.aclose()
    raise AssertionError(f"{command} was not refused")


async def test_the_table_of_error_replies_is_what_a_live_server_says(make_server):
    """Each code that one server can be brought to answer is mapped as the table says, with advice."""
    server = make_server("--busy-reply-threshold", "50", "--save", "36000 1000000")
    found = {}
    async with quiet_afterwards(server), admin_of(server) as admin:
        await admin.set("string", "x")
        await admin.xadd("stream", {"a": "b"})
        found["WRONGTYPE"] = await _refused(server.url, "XADD", "string", "*", "a", "b")
        found["NOSCRIPT"] = await _refused(server.url, "EVALSHA", "0" * 40, 0)
        found["NOGROUP"] = await _refused(server.url, "XREADGROUP", "GROUP", "g", "c", "STREAMS", "stream", ">")
        found["BUSYGROUP"] = await _twice(server.url, "XGROUP", "CREATE", "stream", "g", "0")
        async with _busy(server):
            found["BUSY"] = await _refused_at_connect(server.url)
        await admin.config_set("maxmemory", 1)
        found["OOM"] = await _refused(server.url, "SET", "y", "x")
        await admin.config_set("maxmemory", 0)
        await admin.execute_command("REPLICAOF", "127.0.0.1", "1")
        found["READONLY"] = await _refused(server.url, "SET", "y", "x")
        await admin.config_set("replica-serve-stale-data", "no")
        found["MASTERDOWN"] = await _after_connect(server.url, "GET", "string")
        await admin.execute_command("REPLICAOF", "NO", "ONE")
        await admin.config_set("min-replicas-to-write", 1)
        found["NOREPLICAS"] = await _refused(server.url, "SET", "y", "x")
        await admin.config_set("min-replicas-to-write", 0)
        await admin.execute_command("ACL", "SETUSER", "bob", "on", ">pw", "~*", "+@all", "-get")
        bobs = server.url.replace("unix://", "unix://bob:pw@")
        found["NOPERM"] = await _refused(bobs, "GET", "string")
        found["WRONGPASS"] = await _refused_at_connect(server.url.replace("unix://", "unix://bob:no@"))
        await admin.config_set("requirepass", "s3cret")
        found["NOAUTH"] = await _refused_at_connect(server.url)
        await admin.config_set("requirepass", "")
        assert "s3cret" not in "".join(map(str, found.values()))
    for code, error in found.items():
        kind, advice = _ADVICE.get(code, (StoreError, ""))
        assert type(error) is kind, (code, error)
        assert reply_code(error) == code or code in {"WRONGPASS", "NOAUTH"}, (code, error)
        assert not advice or advice in str(error) or code in {"WRONGPASS", "NOAUTH"}, (code, error)
    assert isinstance(found["OOM"], StoreFullError)
    assert isinstance(found["NOPERM"], StoreAuthError)


async def _after_connect(url, *command):
    """The error of ``command`` on a connection that could be opened (a wire: redis-py asks more when it connects)."""
    from orchestra._redis.wire import Endpoint, Wire

    return await _error_of(await Wire.connect(Endpoint(path=url.removeprefix("unix://"), label="x")), command)


async def _twice(url, *command):
    async with ConnectionManager(url) as manager:
        wire = await manager.open_wire("x")
        await wire.call(*command)
        try:
            await wire.call(*command)
        except StoreError as error:
            return error
        finally:
            await wire.aclose()
    raise AssertionError


async def _refused_at_connect(url):
    try:
        async with ConnectionManager(url):
            pass
    except StoreError as error:
        return error
    raise AssertionError("the connection was accepted")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("MOVED 3999 127.0.0.1:6381", StoreError),
        ("ASK 3999 127.0.0.1:6381", StoreError),
        ("CLUSTERDOWN Hash slot not served", StoreUnavailableError),
        ("TRYAGAIN Multiple keys request during rehashing of slot", StoreUnavailableError),
        ("UNBLOCKED the stream key no longer exists", StoreError),
        ("LOADING Redis is loading the dataset in memory", StoreUnavailableError),
        ("MISCONF Errors writing to the AOF file: No space left on device", StoreUnavailableError),
        ("ERR max number of clients reached", StoreUnavailableError),
        ("EXECABORT Transaction discarded because of previous errors.", StoreError),
    ],
)
def test_codes_that_need_a_cluster_or_a_moment_are_mapped_from_their_texts(text, kind):
    """The rest of the table, from the texts of the sources; LOADING, MISCONF and UNBLOCKED also occur live in B7, B11, B14."""
    from orchestra._redis.wire import ReplyError

    error = reply_error(ReplyError(text), "here")
    assert type(error) is kind
    assert reply_code(error) == ("MAXCLIENTS" if "max number" in text else text.split()[0])


# Forks


async def test_a13_a_forked_child_gets_a_typed_error_and_closes_nothing(make_server):
    """A13: a child that uses its parent's wire or link is told so at once; the parent's connections live on."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url) as fleet:
        await fleet.send(5)
        link = await fleet.queue._commands()
        wire = await link.wire()
        reader = fleet.wire("reader")
        packed = pack((("SET", "child", "was here"),))

        def child():
            outcomes = []
            for attempt in (
                lambda: wire.send_nowait(packed, 1),
                lambda: _step(link.wire()),
                lambda: _step(link.send(packed, 1)),
                lambda: _step(link.patiently(lambda: link.send(packed, 1), 30.0)),
                lambda: reader.send_nowait(packed, 1),
                lambda: _step(wire.aclose()),
                wire.close,
            ):
                try:
                    attempt()
                    outcomes.append("ok")
                except ForkedProcessError:
                    outcomes.append("forked")
            return outcomes == ["forked"] * 5 + ["ok"] * 2

        pid = os.fork()
        if pid == 0:
            code = 1
            with contextlib.suppress(BaseException):
                code = 0 if child() else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not wire.closed
        assert (await link.send(pack((("EXISTS", "child"),)), 1)) == [0]
        await fleet.send(5)
        await fleet.assert_settled()


def _step(coroutine):
    """Run a coroutine that must end without waiting for anything."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    coroutine.close()
    raise AssertionError("it waits for something")
