"""Group B, the server as a process: killed, cut off from its disk, stopped, loading, rewriting its log."""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orchestra._delivery import DONE, Again, Bury
from orchestra.connections import ConnectionManager
from orchestra.errors import StoreUnavailableError
from orchestra.task_queue import RedisStreamTaskQueue
from tests.faults._checks import Fleet, Witness, admin_of, no_spin, quiet_afterwards, until

AOF = ("--appendonly", "yes", "--auto-aof-rewrite-percentage", "0")


@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_b1_a_killed_server_with_an_append_only_file_loses_nothing_acknowledged(make_server, policy):
    """B1: SIGKILL of redis-server under load, three times; nothing acknowledged is lost, nothing runs twice.

    With ``everysec`` a write may be held back while an fsync runs, though its reply went out (aof.c,
    flushAppendOnlyFile): what was acknowledged after the last look at an empty buffer is the declared window.
    """
    server = make_server(*AOF, "--appendfsync", policy)
    window, ended = set(), 0
    async with quiet_afterwards(server), Fleet(server.url, workers=2, lease_ms=30_000) as fleet:
        loads = [asyncio.create_task(fleet.load(40, fail=n)) for n in (0, 0, 1)]
        for share in (100, 400, 700):
            await until(lambda share=share: len(fleet.acked) >= share)
            sure, begun = set(fleet.acked), len(fleet.seen)
            if policy == "everysec":
                async with admin_of(server) as admin:
                    await until(lambda: _all_written(admin), every=0)
            server.kill()
            if policy == "everysec":
                window |= fleet.acked - sure
                ended += len(fleet.seen) - begun + 2 * 50
            await asyncio.to_thread(server.start)
        await asyncio.gather(*loads)
        assert not fleet.unknown, "the outages are shorter than the patience"
        failed_once = 400
        await fleet.assert_settled(retries=failed_once, repeats=ended, may_be_lost=frozenset(window))
        assert len(fleet.acked) - len(window) >= 600, "a window of milliseconds"


async def _all_written(admin):
    facts = await admin.info("persistence")
    return facts["aof_buffer_length"] == 0 and facts["aof_pending_bio_fsync"] == 0


# Power loss


class _Ledger:
    """Does one of everything to tasks, and knows how long the log was when each was acknowledged."""

    def __init__(self, server, queue):
        self.server, self.queue, self.marks = server, queue, []

    @property
    def log(self):
        (path,) = (self.server.dir / "appendonlydir").glob("*.incr.aof")
        return path

    async def note(self, *ids):
        self.marks.append((self.log.stat().st_size, ids))

    async def round(self, n):
        ids = [f"r{n}.{i}" for i in range(6)]
        await self.queue.produce_many([{"id": i, "type": "x"} for i in ids])
        await self.note(*ids)
        await self.queue.produce_many([{"id": f"r{n}.late", "type": "x", "delay": 900}])
        await self.note(f"r{n}.late")
        done, retried, released, dead, *_ = await self.queue.read("c", 6, 1000)
        await self.queue.settle(
            [(done, DONE), (retried, Again(900.0)), (released, Again(0.0, "released")), (dead, Bury("failed", 1, {}))]
        )
        await self.note()


async def _places(queue, admin):
    """Where each task is that can be seen: id → places."""
    from orchestra.serialization import decode_header

    places = {}
    for lane in queue.keys.streams:
        for _, fields in await admin.xrange(lane):
            places.setdefault(decode_header(fields[b"t"]).id, []).append("lane")
    for member in await admin.zrange(queue.keys.delayed, 0, -1):
        assert await admin.hexists(queue.keys.bodies, member), "delayed without its body"
        places.setdefault(member.decode(), []).append("delayed")
    for _, fields in await admin.xrange(queue.keys.dlq):
        places.setdefault(decode_header(fields[b"t"]).id, []).append("dead")
    return places


async def _assert_whole(server, size, marks):
    """After a restart from a log of ``size`` bytes: no half state, and nothing lost that was acknowledged before."""
    async with ConnectionManager(server.url) as manager, admin_of(server) as admin:
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        stats = await queue.stats()
        assert stats.adds_up, (size, stats)
        places = await _places(queue, admin)
        assert all(len(where) == 1 for where in places.values()), places
        known = {i for bucket in queue.keys.dedup for i in await admin.hkeys(bucket)}
        kept = {i for mark, ids in marks if mark <= size for i in ids}
        assert {i.encode() for i in kept} <= known, "an acknowledged task before the point of loss is gone"
        gone = len(known) - len(places)
        assert gone == stats.counters.get("completed", 0), "what is known and nowhere is completed"
        reader = "survivor"
        left = sum(stats.waiting) + sum(stats.in_flight)
        found = await queue.reclaim(reader, 1000, 0) + await queue.read(reader, 1000, 0)
        assert len(found) == left, "every task in a lane can still be handed out"
        assert await queue.settle([(delivery, DONE) for delivery in found]) == []
        assert (await queue.stats()).adds_up
        await queue.close()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["always", "everysec"])
async def test_b2_b3_power_loss_never_tears_a_script(make_server, policy):
    """B2 B3: the log cut at random places of its tail: what was acknowledged before the cut is there, nothing is half.

    With ``always`` no cut can lie before the last acknowledged write (the rounds after it stand for the page cache);
    with ``everysec`` the window is what was written since the last fsync.
    """
    server = make_server(*AOF, "--appendfsync", policy)
    async with ConnectionManager(server.url) as manager, admin_of(server) as admin:
        queue = RedisStreamTaskQueue("tasks", "workers", manager=manager)
        ledger = _Ledger(server, queue)
        for n in range(5):
            await ledger.round(n)
        if policy == "everysec":  # a write may be held back while an fsync runs
            await until(lambda: _all_written(admin))
            ledger.marks = [(ledger.log.stat().st_size, ids) for _, ids in ledger.marks]
        synced = ledger.log.stat().st_size
        sure = list(ledger.marks)
        for n in range(5, 10):
            await ledger.round(n)
        marks = ledger.marks if policy == "always" else sure
        await queue.close()
    server.kill()
    whole = server.dir / "whole"
    shutil.copytree(server.dir / "appendonlydir", whole)
    size = (whole / ledger.log.name).stat().st_size
    assert size > synced
    for seed in range(12):
        cut = random.Random(f"{policy}{seed}").randint(synced, size - 1)
        shutil.rmtree(server.dir / "appendonlydir")
        shutil.copytree(whole, server.dir / "appendonlydir")
        os.truncate(ledger.log, cut)
        await asyncio.to_thread(server.start)
        await until(lambda: server.ask(b"PING") == b"+PONG\r\n")
        await _assert_whole(server, cut, marks)
        server.kill()


# Not answering


async def test_b6_a_stopped_server_is_noticed_by_the_deadline_and_work_goes_on_afterwards(make_server):
    """B6: SIGSTOP of the server: TCP still takes bytes, so only deadlines notice; nothing hangs, nothing runs twice."""
    server = make_server()
    async with (
        quiet_afterwards(server),
        Fleet(server.url, lease_ms=5000, manage={"timeout": 0.4, "connect_timeout": 0.4}) as fleet,
    ):
        await fleet.send(20)
        await fleet.drained()
        hasty = RedisStreamTaskQueue("tasks", "workers", manager=fleet.manager, patience=0.0)
        reader = fleet.wire("reader")
        with Witness() as witness, no_spin():
            os.kill(server.pid, signal.SIGSTOP)
            try:
                began = time.monotonic()
                with pytest.raises(StoreUnavailableError):
                    await hasty.produce({"id": "hasty", "type": "work"})
                assert time.monotonic() - began < 20, "the deadline is 0.4 s"
                await until(lambda: reader.closed, 30)
                pending = asyncio.create_task(fleet.send(20))
                await until(lambda: any("tasks" in line for line in witness.lines))
            finally:
                os.kill(server.pid, signal.SIGCONT)
            fleet.unknown.add("hasty")
            await pending
            await fleet.assert_settled()
        assert len(witness.lines) < 12, witness.lines
        await hasty.close()


async def test_b7_a_loading_server_is_waited_for_without_a_storm(make_server):
    """B7: LOADING after a restart: bounded attempts with jitter, few connects, few log lines, no CPU spin."""
    server = make_server(*AOF, "--appendfsync", "everysec")
    async with quiet_afterwards(server), Fleet(server.url, workers=2) as fleet:
        await fleet.send(2000)
        await fleet.drained()
        server.kill()
        server.settings += ("--key-load-delay", "250", "--loading-process-events-interval-bytes", "1024")
        with Witness() as witness, no_spin():
            await asyncio.to_thread(server.start)
            assert b"LOADING" in server.ask(b"GET x"), "the log is too short to see it loading"
            sending = [asyncio.create_task(fleet.send(1)) for _ in range(50)]
            await until(lambda: b"LOADING" not in server.ask(b"GET x"), every=0.05)
            async with admin_of(server) as admin:
                said = await admin.info("stats")
            assert said["total_connections_received"] < 400, "50 callers and two workers made a storm"
            assert said["total_error_replies"] < 2000, "each caller backs off"
            await asyncio.gather(*sending)
            await fleet.assert_settled()
        assert len(witness.lines) <= 12, witness.lines


# The disk


SHIM = """
    #define _GNU_SOURCE
    #include <dlfcn.h>
    #include <errno.h>
    #include <stdlib.h>
    #include <sys/stat.h>
    #include <unistd.h>
    static ssize_t (*real)(int, const void *, size_t);
    ssize_t write(int fd, const void *data, size_t size) {
        struct stat s;
        if (!real) real = dlsym(RTLD_NEXT, "write");
        if (access(getenv("FULL_FLAG"), F_OK) == 0 && fstat(fd, &s) == 0 && S_ISREG(s.st_mode) && fd > 2) {
            errno = ENOSPC;
            return -1;
        }
        return real(fd, data, size);
    }
"""


@pytest.fixture
def full_disk(tmp_path, monkeypatch):
    """A flag file: while it exists, servers started from now on cannot write to their files."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("needs a C compiler and LD_PRELOAD")
    (tmp_path / "shim.c").write_text(textwrap.dedent(SHIM))
    command = [compiler, "-shared", "-fPIC", "-o", str(tmp_path / "shim.so"), str(tmp_path / "shim.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True)
    monkeypatch.setenv("LD_PRELOAD", str(tmp_path / "shim.so"))
    monkeypatch.setenv("FULL_FLAG", str(tmp_path / "full"))
    return tmp_path / "full"


async def _refuse_and_recover(server, break_it, repair):
    """Under MISCONF produce fails with a typed error, workers wait without spinning; after the repair all is done."""
    async with quiet_afterwards(server), Fleet(server.url, workers=1, manage={"timeout": 5.0}) as fleet:
        await fleet.send(20)
        running = asyncio.create_task(fleet.send(3, sleep=0.2))
        await until(lambda: len(fleet.seen) > 20)
        await running
        with Witness() as witness:
            await break_it()
            hasty = RedisStreamTaskQueue("tasks", "workers", manager=fleet.manager, patience=0.0)
            with no_spin():

                async def refused():
                    try:
                        await hasty.produce({"type": "work", "id": "probe"})
                    except StoreUnavailableError as error:
                        return str(error)

                text = await until(refused)
                assert "MISCONF" in text
                assert "disk" in text
                fleet.unknown.add("probe")
                waiting = asyncio.create_task(fleet.send(10))
                await asyncio.sleep(1.0)
            assert not waiting.done()
            await repair()
            await waiting
            await fleet.assert_settled()
        assert len(witness.lines) < 15, witness.lines
        await hasty.close()


async def test_b11_a_full_disk_is_a_typed_error_and_heals(full_disk, make_server):
    """B11: the append-only file cannot be written (everysec): MISCONF, typed; no spin; everything done afterwards."""
    server = make_server(*AOF, "--appendfsync", "everysec")

    async def fill():
        full_disk.touch()

    async def free():
        full_disk.unlink()

    await _refuse_and_recover(server, fill, free)


async def test_b11_a_full_disk_under_always_ends_the_server_and_loses_nothing(full_disk, make_server):
    """B11: with ``appendfsync always`` the server ends itself; whoever restarts it finds everything acknowledged."""
    server = make_server(*AOF, "--appendfsync", "always")
    async with quiet_afterwards(server), Fleet(server.url, workers=1, lease_ms=3000) as fleet:
        await fleet.send(50, sleep=0.01)
        full_disk.touch()
        sending = asyncio.create_task(fleet.send(10))
        await until(lambda: server.process.poll() is not None)
        full_disk.unlink()
        await asyncio.to_thread(server.start)
        await sending
        await fleet.assert_settled()


async def test_b12_a_failed_snapshot_that_stops_writes_is_a_typed_error_and_heals(make_server):
    """B12: stop-writes-on-bgsave-error: MISCONF, typed; no spin; heals with the next good snapshot."""
    server = make_server("--save", "36000 1000000", "--stop-writes-on-bgsave-error", "yes")
    (server.dir / "dump.rdb").mkdir()  # the snapshot cannot be renamed over it

    async def snapshot(status):
        async with admin_of(server) as admin:
            await admin.bgsave()

            async def over():
                facts = await admin.info("persistence")
                return facts["rdb_bgsave_in_progress"] == 0 and facts["rdb_last_bgsave_status"] == status

            await until(over)

    async def repair():
        (server.dir / "dump.rdb").rmdir()
        await snapshot("ok")

    await _refuse_and_recover(server, lambda: snapshot("err"), repair)


@pytest.mark.slow
async def test_b13_rewriting_the_log_under_load_costs_no_lease(make_server):
    """B13: BGREWRITEAOF without pause under load: leases are kept, nothing runs twice, no produce is repeated."""
    server = make_server(*AOF, "--appendfsync", "everysec", "--no-appendfsync-on-rewrite", "no")
    async with (
        quiet_afterwards(server),
        Fleet(server.url, workers=2, lease_ms=1500) as fleet,
        admin_of(server) as admin,
    ):
        loads = [asyncio.create_task(fleet.load(60)), asyncio.create_task(fleet.load(4, size=3, sleep=3.5))]
        rewrites = 0
        while not all(load.done() for load in loads) or (await fleet.queue.stats()).live:
            facts = await admin.info("persistence")
            if not facts["aof_rewrite_in_progress"]:
                await admin.bgrewriteaof()
                rewrites += 1
            await asyncio.sleep(0.02)
        stats = await fleet.assert_settled()
        assert rewrites > 2
        assert stats.counters.get("reclaimed", 0) == 0
        assert stats.counters.get("duplicates", 0) == 0


async def test_b4_a_server_that_forgot_everything_is_served_again(make_server):
    """B4: restarted without persistence: what was there is gone, and said so; groups come back at 0, work goes on."""
    server = make_server()
    async with quiet_afterwards(server), Fleet(server.url, workers=1) as fleet:
        await fleet.send(10)
        await fleet.drained()
        with Witness() as witness, no_spin():
            server.kill()
            await asyncio.to_thread(server.start)
            fleet.acked.clear()
            fleet.attempts.clear()
            await fleet.send(10)
            await fleet.assert_settled()
        assert witness.events["queue.group_recreated"] == 4, "one for each lane"
        assert witness.events["queue.data_loss_suspected"] == 1
        assert sum("data loss suspected" in line for line in witness.lines) == 1, witness.lines
