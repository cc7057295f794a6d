"""What a sender may rely on when ``produce`` has returned: replicas and disks that answer, are stopped, or are gone.

Servers talk to each other over loopback; faults are signals to processes of our own and commands to them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

import pytest

from orchestra import App, Durability
from orchestra._redis import server_settings
from orchestra.connections import ConnectionManager
from orchestra.errors import (
    ConfigurationError,
    DurabilityError,
    QueueFullError,
    StoreUnavailableError,
    UnsafeServerError,
)
from orchestra.task_queue import RedisStreamTaskQueue
from tests.conftest import free_port
from tests.faults._checks import until

SHORT = 0.3
AMPLE = 20.0


def tasks(count, prefix="t"):
    return [{"id": f"{prefix}{n}", "type": "x"} for n in range(count)]


def queue_on(manager, durability, **options):
    return RedisStreamTaskQueue("tasks", "workers", manager=manager, durability=durability, **options)


@pytest.fixture
def family(make_server):
    """A master and two replicas that are in touch; ends with every replica running."""
    port = free_port()
    quick = ("--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0")
    master = make_server("--port", str(port), "--bind", "127.0.0.1", *quick)
    replicas = [
        make_server("--port", str(free_port()), "--bind", "127.0.0.1", "--replicaof", "127.0.0.1", str(port))
        for _ in range(2)
    ]
    end = time.monotonic() + 30
    while master.ask(b"INFO replication").count(b"state=online") < 2:
        assert time.monotonic() < end, "the replicas do not come up"
        time.sleep(0.02)
    yield master, replicas
    for replica in replicas:
        if replica.process.poll() is None:
            os.kill(replica.pid, signal.SIGCONT)


async def produced(server):
    async with ConnectionManager(server.url) as manager:
        return (await RedisStreamTaskQueue("tasks", "workers", manager=manager).stats()).live


# -- replicated(n)


async def test_replicated_waits_for_as_many_replicas_as_it_says(family):
    """D2, D3: a stopped replica is missed within the timeout, nothing is added twice, and it heals by itself."""
    master, replicas = family
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(2, AMPLE))
        ids = await queue.produce_many(tasks(3))
        os.kill(replicas[0].pid, signal.SIGSTOP)
        impatient = queue_on(manager, f"replicated(2, timeout={SHORT})")
        began = time.monotonic()
        with pytest.raises(DurabilityError, match="were added and may run, but only 1 of 2 replicas") as missed:
            await impatient.produce_many([*tasks(3), *tasks(2, "new")])
        assert time.monotonic() - began >= SHORT
        error = missed.value
        assert (error.wanted, error.reached, error.mode) == (2, 1, "replicated")
        assert list(error.message_ids[:3]) == ids
        assert (await queue.stats()).live == 5, "the tasks have been added"
        one = queue_on(manager, Durability.replicated(1, AMPLE))
        assert await one.produce_many(tasks(2, "new")) == list(error.message_ids[3:]), "one replica is in touch"
        os.kill(replicas[0].pid, signal.SIGCONT)
        assert await queue.produce_many(tasks(2, "new")) == list(error.message_ids[3:]), (
            "sent again: the same, and safe"
        )
        assert (await queue.stats()).live == 5
        for each in (queue, impatient, one):
            await each.close()


async def test_a_replica_that_is_gone_is_missed_by_every_way_to_send(family):
    master, replicas = family
    for replica in replicas:
        replica.kill()
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(1, SHORT))
        singles = await asyncio.gather(*(queue.produce({"type": "x"}) for _ in range(3)), return_exceptions=True)
        assert {(type(error), error.reached, len(error.message_ids)) for error in singles} == {(DurabilityError, 0, 1)}
        assert len({error.message_ids for error in singles}) == 3, "each is told its own id"
        with pytest.raises(DurabilityError) as mixed:
            await queue.submit([*tasks(1), {"type": "x"}, *tasks(1, "other")])
        assert len(set(mixed.value.message_ids)) == 3
        began = time.monotonic()
        with pytest.raises(DurabilityError) as many:
            await queue.produce_many([{"type": "x"} for _ in range(5000)])
        assert len(set(many.value.message_ids)) == 5000, "after one miss, the rest is added without waiting"
        assert time.monotonic() - began < 10 * SHORT + AMPLE
        assert (await queue.stats()).live == 3 + 3 + 5000
        await queue.close()


@pytest.mark.parametrize("own_ids", [True, False])
async def test_a_repeat_after_a_lost_reply_waits_again(family, own_ids):
    """A17: WAIT covers what its own connection wrote. The repeat, on a new one, adds nothing and must wait all the same."""
    master, replicas = family
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(2, 2.0))
        await queue.produce_many(tasks(1, "first"))  # the connection is open
        os.kill(replicas[1].pid, signal.SIGSTOP)
        sending = asyncio.create_task(queue.produce_many(tasks(2) if own_ids else [{"type": "x"} for _ in range(2)]))

        async def waits():
            rows = await manager.client.client_list()
            return next((row for row in rows if row["name"].endswith(":durable") and row["cmd"] == "wait"), None)

        row = await until(waits)
        await manager.client.execute_command("CLIENT", "KILL", "ID", row["id"])
        with pytest.raises(DurabilityError) as missed:
            await sending
        assert (missed.value.reached, len(missed.value.message_ids)) == (1, 2)
        assert (await queue.stats()).live == 3, "the repeat added nothing"
        os.kill(replicas[1].pid, signal.SIGCONT)
        await queue.close()


async def test_what_was_replicated_survives_the_loss_of_the_master(family):
    """D2: with replicated(1) an acknowledged task is on the replica that takes over, if that one is chosen."""
    master, replicas = family
    replicas[1].kill()
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(1, AMPLE))
        for start in range(0, 300, 100):
            await queue.produce_many([{"id": f"t{n}", "type": "x"} for n in range(start, start + 100)])
        master.kill()
        with pytest.raises(StoreUnavailableError):
            await queue_on(manager, "accepted", patience=0.0).produce({"type": "x"})
        await queue.close()
    assert replicas[0].ask(b"REPLICAOF NO ONE") == b"+OK\r\n"
    assert await produced(replicas[0]) == 300


# -- fsynced


async def waits_for_disk(manager):
    return await manager.supports("WAITAOF")


@pytest.mark.parametrize("fsync", ["everysec", "always"])
async def test_what_is_fsynced_survives_kill_9(make_server, fsync):
    """B1: after kill -9 and a restart every task that was answered is there."""
    server = make_server("--appendonly", "yes", "--appendfsync", fsync)
    async with ConnectionManager(server.url) as manager:
        queue = queue_on(manager, Durability.fsynced(AMPLE), patience=0.0)
        if fsync == "everysec" and not await waits_for_disk(manager):
            with pytest.raises(ConfigurationError, match="appendfsync is everysec: CONFIG SET appendfsync always"):
                await queue.produce({"type": "x"})
            assert (await queue.stats()).live == 0
            return
        ids = await asyncio.gather(*(queue.produce({"type": "x"}) for _ in range(50)))
        ids += await queue.produce_many([{"type": "x", "delay": n % 2} for n in range(50)])
        server.kill()
        await queue.close()
    server.start()
    await until(lambda: server.ask(b"PING")[:1] == b"+")  # it has loaded its file
    assert await produced(server) == len(ids)


async def test_fsynced_needs_an_append_only_file(make_server):
    server = make_server()
    async with ConnectionManager(server.url) as manager:
        queue = queue_on(manager, "fsynced")
        with pytest.raises(ConfigurationError, match="setting appendonly is no: CONFIG SET appendonly yes"):
            await queue.produce({"type": "x"})
        assert (await queue.stats()).live == 0, "it was not sent"
        server.ask(b"CONFIG SET appendonly yes")
        server.ask(b"CONFIG SET appendfsync always")
        assert await queue.produce({"type": "x"}), "asked again, it looks again"
        server.kill()  # it is rewriting its file, and would take its time to end
        await queue.close()


async def test_a_disk_that_is_too_slow_is_missed(make_server):
    """With fsync every second, a millisecond is too short; the tasks are there and sending them again is safe."""
    server = make_server("--appendonly", "yes", "--appendfsync", "everysec")
    async with ConnectionManager(server.url) as manager:
        if not await waits_for_disk(manager):
            pytest.skip("WAITAOF came with Redis 7.2")
        hasty, calm = queue_on(manager, Durability.fsynced(0.001)), queue_on(manager, Durability.fsynced(AMPLE))
        missed = 0
        for n in range(3):
            try:
                await hasty.produce({"id": f"t{n}", "type": "x"})
            except DurabilityError as error:
                missed += 1
                assert (error.reached, error.wanted) == (0, 1)
                assert await calm.produce({"id": f"t{n}", "type": "x"}) == error.message_ids[0]
        assert missed >= 2
        server.ask(b"CONFIG SET appendonly no")
        with pytest.raises(DurabilityError, match="appendonly"):
            await calm.produce({"type": "x"})
        assert (await calm.stats()).live == 4
        await hasty.close()
        await calm.close()


# -- the way it is sent


async def test_waiting_blocks_no_other_work_and_is_shared(family):
    """Calls that come while one waits share the next wait; the connection for commands is not held up."""
    master, replicas = family
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(2, 3.0))
        await queue.produce({"type": "x"})
        before = (await manager.client.info("commandstats"))["cmdstat_wait"]["calls"]
        os.kill(replicas[0].pid, signal.SIGSTOP)
        sends = [asyncio.create_task(queue.produce_many([{"type": "x"}, {"type": "x"}])) for _ in range(40)]
        await until(lambda: queue.get_queue_depth())
        async with asyncio.timeout(2.0):
            assert (await queue.stats()).dead == 0
        os.kill(replicas[0].pid, signal.SIGCONT)
        assert len({message_id for ids in await asyncio.gather(*sends) for message_id in ids}) == 80
        waits = (await manager.client.info("commandstats"))["cmdstat_wait"]["calls"] - before
        assert waits <= 10, "40 calls shared their waits"
        await queue.close()


async def test_refusals_and_forgotten_scripts_pass_through(family):
    master, _ = family
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(2, AMPLE), max_length=4)
        for n in range(3):
            await manager.client.script_flush()
            await queue.produce({"id": f"t{n}", "type": "x"})
        both = await asyncio.gather(
            queue.produce_many(tasks(5, "many")), queue.produce_many(tasks(1, "one")), return_exceptions=True
        )
        assert isinstance(both[0], QueueFullError)
        assert len(both[1]) == 1
        assert (await queue.stats()).live == 4
        await queue.close()
        rows = await manager.client.client_list()
        assert [row for row in rows if row["name"].endswith(":durable")] == [], "the connection was given back"


async def test_a_cancelled_produce_leaves_the_sender_in_order(family):
    master, replicas = family
    async with ConnectionManager(master.url) as manager:
        queue = queue_on(manager, Durability.replicated(2, AMPLE))
        await queue.produce({"type": "x"})
        os.kill(replicas[0].pid, signal.SIGSTOP)
        sends = [asyncio.create_task(queue.produce_many(tasks(1, f"c{n}"))) for n in range(3)]
        await until(lambda: queue.stats())
        for send in sends[::2]:
            send.cancel()
        os.kill(replicas[0].pid, signal.SIGCONT)
        await asyncio.gather(*sends, return_exceptions=True)
        assert [send.cancelled() for send in sends] == [True, False, True]
        assert sends[1].result() == await queue.produce_many(tasks(1, "c1"))
        await queue.close()
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "orchestra:durable"]


async def test_an_app_follows_it(family):
    master, replicas = family
    for replica in replicas:
        replica.kill()
    app = App("shop", master.url, durability=Durability.replicated(1, SHORT))

    @app.agent
    async def noop() -> None:
        return None

    with pytest.raises(DurabilityError):
        await noop.send()
    assert (await app.queue.stats()).live == 1
    await app.close()


# -- production mode


@pytest.fixture
def unwarned(monkeypatch):
    monkeypatch.setattr(server_settings, "_warned", set())


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
async def test_production_refuses_a_server_that_evicts(make_server, policy, monkeypatch, unwarned):
    """B9, B10: refused in production mode, however it was chosen."""
    server = make_server("--appendonly", "yes", "--maxmemory-policy", policy)
    for manager in (
        ConnectionManager(server.url, production=True),
        ConnectionManager(f"{server.url}?production=yes", production=False),
    ):
        with pytest.raises(UnsafeServerError, match=f"maxmemory-policy is {policy}.*CONFIG SET") as refused:
            await manager.connect()
        assert (refused.value.field, refused.value.value, refused.value.expected) == (
            "maxmemory-policy",
            policy,
            "noeviction",
        )
        assert not manager.connected
    monkeypatch.setenv("ORCHESTRA_PRODUCTION", "1")
    with pytest.raises(UnsafeServerError):
        await App("shop", server.url).connect()
    async with ConnectionManager(server.url, production=False):
        pass
    monkeypatch.setenv("ORCHESTRA_PRODUCTION", "0")
    async with ConnectionManager(server.url):
        pass
    assert b"name=orchestra" not in server.ask(b"CLIENT LIST"), "what was refused is closed"


async def test_one_warning_for_a_server(make_server, caplog, unwarned):
    """B9: outside production mode."""
    server = make_server("--maxmemory-policy", "allkeys-random")
    with caplog.at_level(logging.WARNING, "orchestra.connections"):
        for _ in range(3):
            async with ConnectionManager(server.url):
                pass
    (warning,) = [record.message for record in caplog.records]
    assert "maxmemory-policy is allkeys-random, expected noeviction" in warning
    assert "appendonly" not in warning, "that is a choice, not a mistake"


async def test_production_refuses_what_keeps_nothing_and_what_takes_nothing(family, make_server):
    _, replicas = family
    with pytest.raises(UnsafeServerError, match="role is replica") as refused:
        await ConnectionManager(replicas[0].url, production=True).connect()
    assert any("appendonly is no" in fault for fault in refused.value.faults), "every fault is said"
    closed = make_server("--appendonly", "yes")
    closed.ask(b"ACL SETUSER few on >pw ~* +@all -info")
    few = f"unix://few:pw@{closed.socket}"
    with pytest.raises(UnsafeServerError, match="INFO"):
        await ConnectionManager(few, production=True).connect()
    async with ConnectionManager(few, production=False) as manager:
        assert await manager.ping() > 0
    good = ConnectionManager(closed.url, production=True)
    assert await good.connect() is good
    await good.close()


def test_what_is_neither_yes_nor_no_is_refused(monkeypatch):
    monkeypatch.setenv("ORCHESTRA_PRODUCTION", "perhaps")
    with pytest.raises(ConfigurationError, match="ORCHESTRA_PRODUCTION must be 1 or 0"):
        ConnectionManager("redis://h")
    assert ConnectionManager("redis://h", production=True).production
    with pytest.raises(ConfigurationError, match="production"):
        ConnectionManager("redis://h?production=maybe")
