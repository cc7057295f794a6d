"""Group E of the fault catalogue, as far as it is about what stays in the streams; and K9, G8.

E1, E2, E6, E7, E9 and E11 are in ``test_reclaim.py``; it also reads the sources for E10 and E12.
"""

from __future__ import annotations

import ast
import asyncio
import re
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

import orchestra
from orchestra._delivery import DONE, Again, Bury
from orchestra._keys import QueueKeys
from orchestra.agents import AgentRegistry
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from orchestra.tasks import Retry
from tests.reference.keyspace import Plain

PACKAGE = Path(orchestra.__file__).parent
KEYS = QueueKeys("tasks")
GROUP = "workers"


def queue_for(manager, **options):
    return RedisStreamTaskQueue("tasks", GROUP, manager=manager, **options)


@pytest.fixture
def client(redis_server, redis_url):
    with Plain(redis_server.socket) as connected:
        yield connected


async def drained(queue):
    async with asyncio.timeout(60):
        while (await queue.stats()).live:
            await asyncio.sleep(0.01)
    stats = await queue.stats()
    assert stats.adds_up, stats
    return stats


class Watcher(threading.Thread):
    """Looks at all lanes in one moment, again and again, and collects every entry that nobody will ever end."""

    def __init__(self, socket):
        super().__init__(name="watcher")
        self.socket, self.over = socket, threading.Event()
        self.looks, self.wrong, self.most = 0, [], 0

    def run(self):
        with Plain(self.socket) as client:
            while not self.over.wait(0.002):
                self.look(client)

    def look(self, client):
        commands = [("MULTI",)]
        for lane in KEYS.streams:
            commands += [
                ("XRANGE", lane, "-", "+"),
                ("XPENDING", lane, GROUP, "-", "+", 100_000),
                ("XINFO", "GROUPS", lane),
            ]
        *_, replies = client.many([*commands, ("EXEC",)])
        in_flight = 0
        for entries, rows, groups in zip(replies[::3], replies[1::3], replies[2::3], strict=True):
            if isinstance(rows, Exception) or isinstance(groups, Exception) or not groups:
                continue
            facts = dict(zip(groups[0][::2], groups[0][1::2], strict=True))
            last, pending = number(facts[b"last-delivered-id"]), {row[0] for row in rows}
            ids = {entry for entry, _ in entries}
            handed_out = {entry for entry in ids if number(entry) <= last}
            if handed_out != pending:
                self.wrong.append((handed_out - pending, pending - ids))
            in_flight += len(pending)
        self.looks += 1
        self.most = max(self.most, in_flight)

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *exc_info):
        self.over.set()
        self.join(30)


def number(entry: bytes) -> tuple[int, ...]:
    return tuple(map(int, entry.split(b"-")))


async def test_a_stream_holds_what_waits_and_what_is_in_flight_and_nothing_else(manager, redis_server, client):
    """E3 E4: XLEN = waiting + in flight at every moment of a mixed run; stream and pending list both end empty."""
    queue = queue_for(manager)
    agents = AgentRegistry()

    async def agent(task):
        await asyncio.sleep(0.001)
        if task.input % 5 == 0 and task.attempt == 1:
            raise ValueError

    agents.register("work", agent, retry=Retry(max_retries=1, base=0.01, max_delay=0.02))
    agents.register("fails", lambda task: 1 / 0, retry=Retry(max_retries=0))
    kinds = ("work", "work", "work", "fails", "unknown")
    await queue.read("nobody", 1, 0)
    with Watcher(redis_server.socket) as watcher:
        async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=50):
            for start in range(0, 1500, 100):
                tasks = [{"type": kinds[n % 5], "input": n, "priority": n % 4} for n in range(start, start + 100)]
                await queue.produce_many(tasks, want_results=start % 200 == 0)
            stats = await drained(queue)
    agents.close()
    assert watcher.wrong == []
    assert watcher.looks > 5
    assert watcher.most > 0
    assert stats.counters["produced"] == 1500 == stats.counters["completed"] + stats.counters["dead"]
    for lane in KEYS.streams:
        assert client("XLEN", lane) == client("XPENDING", lane, GROUP)[0] == 0
        assert client("MEMORY", "USAGE", lane) < 4096, "no nodes are left behind"
    await queue.close()


async def test_a_long_task_pins_one_node_of_its_lane(manager, client):
    """E5: behind one task that never ends, 10,000 short ones pass; memory stays that of the nodes that are touched."""
    queue = queue_for(manager)
    await queue.produce({"id": "long", "type": "x"})
    (long,) = await queue.read("slow", 1, 100)
    for _ in range(20):
        await queue.produce_many([{"type": "x"} for _ in range(500)])
        held = await queue.read("quick", 500, 100, exact=True)
        assert await queue.settle([(delivery, DONE) for delivery in held]) == []
    lane = KEYS.lanes[2]
    facts = client("XINFO", "STREAM", lane)
    facts = dict(zip(facts[::2], facts[1::2], strict=True))
    assert facts[b"length"] == 1
    assert facts[b"radix-tree-keys"] <= 2, "the node of the long task, and the one that is written to"
    assert client("MEMORY", "USAGE", lane) < 16_384
    assert await queue.settle([(long, DONE)]) == []
    assert (await queue.stats()).live == 0
    await queue.close()


@pytest.mark.parametrize("count", [1, 3, 4, 20, 64])
async def test_four_full_lanes_never_bring_more_than_was_asked_for(manager, client, count):
    """E8: COUNT of XREADGROUP is per stream; what one reader holds stays within its room, and urgent tasks come first."""
    queue = queue_for(manager)
    await queue.produce_many([{"type": "x", "priority": n % 4} for n in range(400)])
    held, lanes = [], []
    for block_ms in (0, 100, 100, 100):
        got = await queue.read("c", count, block_ms)
        assert 0 < len(got) <= count
        lanes += [delivery.lane for delivery in got]
        held += got
        in_flight = sum(client("XPENDING", lane, GROUP)[0] for lane in KEYS.streams)
        assert in_flight == len(held)
    assert lanes.count(0) >= min(100, len(lanes) / 2)
    await queue.close()


async def test_a_worker_holds_no_more_than_its_capacity(manager, client):
    """E8: four lanes are full and four agents run; what is in flight beyond them is the prefetch, and small."""
    queue = queue_for(manager)
    await queue.produce_many([{"type": "wait", "priority": n % 4} for n in range(400)])
    agents, gate, running = AgentRegistry(), asyncio.Event(), []

    async def wait(task):
        running.append(task.priority)
        await gate.wait()

    agents.register("wait", wait)
    async with Dispatcher(queue, agents=agents, max_concurrent_dispatch=4) as dispatcher:
        async with asyncio.timeout(20):
            while len(running) < 4:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.3)  # several turns of the reader, each of which could ask for too much
        in_flight = sum(client("XPENDING", lane, GROUP)[0] for lane in KEYS.streams)
        assert in_flight <= 4 + dispatcher._prefetch.size
        assert dispatcher._prefetch.size <= 4
        assert len(running) == 4
        assert running == [0, 0, 0, 0], "the most urgent lane has all the slots"
        gate.set()
        await drained(queue)
    await queue.close()


async def test_what_was_produced_before_there_was_a_group_is_handed_out(manager, client):
    """E10: the producer comes first; the group is made later, at the beginning of the stream."""
    producer = queue_for(manager)
    ids = await producer.produce_many([{"type": "x", "priority": n % 4} for n in range(8)])
    assert all(client("XINFO", "GROUPS", lane) == [] for lane in KEYS.lanes)
    consumer = queue_for(manager)
    got = await consumer.read("c", 100, 0, exact=True)
    assert sorted(delivery.message_id for delivery in got) == sorted(ids)
    await producer.close()
    await consumer.close()


# -- G8


async def test_a_worker_leaves_as_many_scripts_as_there_are(manager, client):
    """G8: batches of every size, every verdict and every delay use the same texts."""
    client("SCRIPT", "FLUSH")
    queue = queue_for(manager)
    for size in (1, 2, 7, 40):
        await queue.produce_many([{"type": "x", "delay": n % 2 * 0.001} for n in range(size)], want_results=size == 7)
        await queue.maintain("c", 10)
        held = await queue.read("c", size, 10)
        verdicts = (DONE, Again(0.0, "released"), Again(1.0), Bury("failed", 1, {"error": "x"}))
        await queue.settle([(delivery, verdicts[n % 4]) for n, delivery in enumerate(held)])
        await queue.cancel(f"nobody{size}")
        await queue.reclaim("c", size, 60_000)
    cached = int(re.search(rb"number_of_cached_scripts:(\d+)", client("INFO", "memory"))[1])
    assert 5 <= cached <= len(list((PACKAGE / "lua").glob("*.lua")))
    await queue.close()


# -- E12, K9


def sources(*suffixes):
    return [path for path in sorted(PACKAGE.rglob("*")) if path.suffix in suffixes]


def test_no_script_reads_without_a_pending_entry_or_runs_text():
    """E12 K9: no NOACK in a script, and nothing that would run a string as a program."""
    assert len(sources(".lua")) > 15
    for path in sources(".lua"):
        code = re.sub(r"--.*", "", path.read_text("utf-8"))
        assert not re.search(r"NOACK|\bload(string|file)?\(|\bdofile\(|\bsetfenv\(|\brequire\(", code, re.IGNORECASE), (
            path.name
        )


IMPORTERS = {
    "__init__.py": "its own modules, when they are first used",
    "cli/__init__.py": "the command that was asked for, and the libraries of the extra",
    "_front/loading.py": "what the command line names",
    "_front/signature.py": "the module of the agent's own function, in a process that runs it",
}
"""Files of the product that import by a name, and which."""


def test_nothing_in_the_sources_runs_what_came_from_outside():
    """K9: no pickle, no eval, no exec; modules are imported by name only where the command line is read."""
    banned_modules = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "yaml", "joblib"}
    banned_calls = {"eval", "exec", "compile", "__import__", "os.system"}
    for path in sources(".py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                assert not banned_modules & {alias.name.split(".")[0] for alias in node.names}, path.name
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in banned_modules, path.name
            elif isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in banned_calls, f"{path.name}:{node.lineno}"
                assert called != "importlib.import_module" or path.relative_to(PACKAGE).as_posix() in IMPORTERS, (
                    f"{path.name}:{node.lineno}"
                )
                assert "allow_pickle=True" not in ast.unparse(node), f"{path.name}:{node.lineno}"
    for path in (PACKAGE.parent / "_ext").glob("*.p[yx]?"):
        assert not re.search(r"^\s*c?import (pickle|marshal)|\b(eval|exec)\(", path.read_text("utf-8"), re.MULTILINE)


HOSTILE = """
    import asyncio, os, pickle, sys
    import numpy
    from orchestra import App
    from orchestra._keys import QueueKeys

    class Bomb:
        def __reduce__(self):
            return (os.system, ("echo pwned",))

    heard, listening = [], False

    def hear(event, args):
        if listening and event in {"exec", "compile", "import", "os.system", "subprocess.Popen", "marshal.loads"}:
            heard.append((event, str(args)[:80]))
        if listening and event.startswith("pickle."):
            heard.append((event, str(args)[:80]))

    app = App("k9")

    @app.agent(name="work")
    async def work(value):
        return value

    async def both(value):
        async with app.worker(concurrency=4):
            run = await work.send(value)
            answer = await run.result(timeout=30)
            for name in ("os.system", "builtins.eval", "pickle.loads", "__main__.Bomb"):
                await app.send(name, {"cos\\nsystem\\n(S'echo pwned'\\ntR.": 1})
            garbage = [pickle.dumps(Bomb()), b"\\x94\\x01\\xa1a" + pickle.dumps(Bomb()), b"cos\\nsystem\\n(S'true'\\ntR."]
            for frame in garbage:
                await app.queue.manager.client.xadd(QueueKeys("k9").lanes[2], {"t": frame})
            async with asyncio.timeout(30):
                while await app.queue.get_dlq_depth() < 7 * rounds:
                    await asyncio.sleep(0.01)
        return answer

    async def main():
        global listening, rounds
        value = {"text": "x", "bytes": pickle.dumps(Bomb()), "array": numpy.arange(3)}
        rounds = 1
        await both(value)  # whatever is imported late is imported now
        rounds, listening = 2, True
        answer = await both(value)
        listening = False
        assert answer["bytes"] == value["bytes"] and list(answer["array"]) == [0, 1, 2]
        await app.close()

    sys.addaudithook(hear)
    asyncio.run(main())
    print(heard)
"""


def test_nothing_that_comes_over_the_wire_is_run(redis_url):
    """K9: pickles, type names and garbage are data; a fresh process that handles them runs and imports nothing."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(HOSTILE)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert "pwned" not in done.stdout + done.stderr
