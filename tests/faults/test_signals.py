"""Worker processes that are told to stop, killed, starved, forked or crashed: real ``orchestra worker`` processes.

Every test ends with the same check: each task is terminal exactly once, or waits uncharged, and the counters add up.
"""

from __future__ import annotations

import asyncio
import collections
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from orchestra._delivery import DONE
from orchestra.agents import AgentRegistry
from orchestra.app import GROUP
from orchestra.dispatcher import Dispatcher
from orchestra.task_queue import RedisStreamTaskQueue
from tests.processes import LoggedProcess, orchestra
from tests.waiting import settled

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, sets limits of other processes")

JOBS = """
from __future__ import annotations
import asyncio, ctypes, multiprocessing, os, signal, sys, threading, time
from pathlib import Path
from orchestra import App, BaseTask, Retry, telemetry
from orchestra._delivery import DONE
from orchestra.errors import OrchestraError

app = App("faults", lease=30.0, retry=Retry(max_retries=1, base=0.01, jitter=False), max_deliveries=2)
notes, fault = Path(os.environ["NOTES"]), os.environ.get("FAULT")

def note(name, task):
    with open(notes / name, "a") as file:
        file.write(f"{task.id} {task.attempt} {task.fence} {os.getpid()}\\n")

def die(name, measurements, metadata):
    if metadata["type"] == "victim":
        os.kill(os.getpid(), signal.SIGKILL)

if fault == "after_read":
    telemetry.attach(die, "task.started")
if fault == "after_effect":
    telemetry.attach(die, "task.settled")

async def until(name, lines=0):
    while not (notes / name).exists() or (notes / name).read_text().count("\\n") < lines:
        await asyncio.sleep(0.01)

@app.agent
async def victim(task: BaseTask) -> str:
    note("runs", task)
    await asyncio.sleep(0)
    if fault == "mid_handler":
        os.kill(os.getpid(), signal.SIGKILL)
    note("effects", task)
    return "done"

@app.agent
async def waits(task: BaseTask) -> None:
    note("runs", task)
    await until("go")

@app.agent
async def stubborn(task: BaseTask) -> None:
    note("runs", task)
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass

@app.agent
def thread(task: BaseTask) -> None:
    note("runs", task)
    time.sleep(600)

@app.agent
async def to_thread(task: BaseTask) -> None:
    note("runs", task)
    await asyncio.to_thread(time.sleep, 600)

@app.agent(executor="process")
def process(n: int) -> None:
    (notes / "process").touch()
    time.sleep(600)

@app.agent
async def blocks(task: BaseTask) -> None:
    note("runs", task)
    time.sleep(600)

# -- crashes

@app.agent
async def pill(task: BaseTask, how: str) -> None:
    note("runs", task)
    if task.fence == 1:
        await until("innocent", 6)
    {"segv": lambda: ctypes.string_at(0), "abort": os.abort, "exit": lambda: os._exit(1)}[how]()

@app.agent
async def innocent(task: BaseTask) -> None:
    note("runs", task)
    note("innocent", task)
    await asyncio.sleep(0.3)

@app.agent
async def mixed(task: BaseTask) -> str:
    note("runs", task)
    if task.attempt == 1 and task.fence == 1:
        os._exit(9)
    if task.attempt == 1:
        raise ValueError("fails once, too")
    return "done"

@app.agent
async def hungry(task: BaseTask, mib: int) -> int:
    note("runs", task)
    return len(bytearray(mib << 20))

@app.agent
async def oom_killed(task: BaseTask) -> None:
    note("runs", task)
    if task.fence == 1:
        os.kill(os.getpid(), signal.SIGKILL)

@app.agent
async def small(n: int) -> int:
    return n

# -- forks

def in_child(how):
    # what a child does with its parent's queue; its exit status tells how that ended
    queue = next(iter(app._used.values())).queue
    held = [delivery for lane in queue.held for delivery in lane.values()]
    calls = {
        "produces": lambda: queue.produce({"type": "small", "input": {"n": 1}}),
        "settles": lambda: queue.settle([(delivery, DONE) for delivery in held]),
        "reads": lambda: queue.read("child", 1, 0),
    }
    try:
        asyncio.run(calls[how]())
    except OrchestraError as error:
        os._exit(11 if error.code == "forked_process" else 12)
    os._exit(0)

@app.agent
async def forks(task: BaseTask, how: str) -> list:
    note("runs", task)
    pid = os.fork()
    if pid:
        return [how, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    if how == "exits":
        os._exit(7)
    if how == "raises":
        raise ValueError("a child must not settle")
    if how == "awaits":
        await asyncio.sleep(0)
    if how in ("produces", "settles", "reads"):
        in_child(how)
    return ["a child must not settle"]

@app.agent
def forks_in_thread(task: BaseTask) -> list:
    note("runs", task)
    pid = os.fork()
    if pid:
        return ["thread", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])]
    return ["a child must not settle"]

def square(n, out):
    out.put(n * n)

@app.agent
async def multiprocesses(task: BaseTask) -> int:
    note("runs", task)
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    child = context.Process(target=square, args=(12, out))
    child.start()
    value = await asyncio.to_thread(out.get)
    child.join()
    return value
"""


class Worker(LoggedProcess):
    """An ``orchestra worker`` process, with a fault or without."""

    def __init__(self, folder, *args, fault=None) -> None:
        faults = {} if fault is None else {"FAULT": fault}
        super().__init__(folder, orchestra("worker", "jobs.py", *args), NOTES=str(folder), **faults)

    async def says(self, words, count=1) -> None:
        await until(lambda: self.log.count(words) >= count, lambda: self.log)

    async def status(self, seconds=60.0) -> int:
        return await asyncio.to_thread(self.process.wait, seconds)


async def until(condition, what=lambda: "", seconds=60.0):
    """Wait until the function ``condition`` gives something true; it may fail slowly, never hang."""
    try:
        async with asyncio.timeout(seconds):
            while not (value := condition()):
                await asyncio.sleep(0.01)
            return value
    except TimeoutError:
        raise AssertionError(f"did not happen in {seconds} s; {what()}") from None


@pytest.fixture
def folder(tmp_path, redis_url):
    (tmp_path / "jobs.py").write_text(textwrap.dedent(JOBS))
    return tmp_path


@pytest.fixture
def worker(folder):
    """Starts workers; those still alive are killed after the test."""
    started = []

    def start(*args, fault=None) -> Worker:
        started.append(Worker(folder, *args, fault=fault))
        return started[-1]

    yield start
    for each in started:
        each.end()


@pytest.fixture
async def queue(manager):
    queue = RedisStreamTaskQueue("faults", GROUP, 30_000, manager=manager, max_deliveries=2)
    yield queue
    await queue.close()


def lines(folder, name="runs"):
    """What agents noted: ``(task id, attempt, fence, pid)``."""
    try:
        rows = (folder / name).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [(ident, int(attempt), int(fence), int(pid)) for ident, attempt, fence, pid in map(str.split, rows)]


def task(ident, kind=None, **given):
    return {"id": ident, "type": kind or ident, "input": given}


async def waiting(queue, count):
    """Statistics once ``count`` tasks wait and none is in flight."""
    async with asyncio.timeout(60):
        while True:
            stats = await queue.stats()
            if (sum(stats.waiting), sum(stats.in_flight)) == (count, 0):
                assert stats.adds_up, stats
                return stats
            await asyncio.sleep(0.02)


# -- A1, A2, A3: SIGKILL


async def test_a_killed_worker_loses_nothing_wherever_it_was(folder, worker, manager):
    """A1 A2 A3: SIGKILL after the read, in the agent, and after its effect: each task runs again, and ends once."""
    faults = {"after_read": (0, 0), "mid_handler": (1, 0), "after_effect": (1, 1)}
    queues = {name: RedisStreamTaskQueue(name, GROUP, 30_000, manager=manager) for name in faults}
    again, agents = [], AgentRegistry()

    async def victim(task):
        again.append((task.id, task.attempt, task.fence))

    agents.register("victim", victim)
    for name, queue in queues.items():
        await queue.produce_many([task(name, "victim")], want_results=True)
    killed = [worker("--queue", name, fault=name) for name in faults]
    assert [await each.status() for each in killed] == [-signal.SIGKILL] * 3
    for name, queue in queues.items():
        runs = [row for row in lines(folder) if row[0] == name]
        effects = [row for row in lines(folder, "effects") if row[0] == name]
        assert (len(runs), len(effects)) == faults[name]
        async with Dispatcher(queue, agents=agents):
            assert (await queue.wait_result(name, 60))["outcome"] == "completed"
            stats = await settled(queue)
        assert stats.counters == {"produced": 1, "reclaimed": 1, "completed": 1}
        await queue.close()
    assert again == [(name, 1, 2) for name in faults], "once more, and it consumes no retry"


# -- A14: drain


async def test_sigterm_releases_what_has_not_started_and_waits_for_what_runs(folder, worker, queue):
    """A14: unstarted tasks go back at once and uncharged while running ones still finish; then it exits with 0."""
    running = worker("--concurrency=2")
    await running.says("ready: agents")
    await queue.produce_many([task(f"t{n}", "waits") for n in range(8)])
    await until(lambda: len(lines(folder)) == 2)
    running.signal(signal.SIGTERM)
    await running.says("draining: 2 agents run")
    async with asyncio.timeout(60):
        while sum((stats := await queue.stats()).waiting) < 6:
            await asyncio.sleep(0.01)
    assert (sum(stats.in_flight), running.process.poll()) == (2, None)
    given_back = await queue.read("other", 8, 1000)
    assert [(each.deliveries, each.retries) for each in given_back] == [(1, 0)] * 6
    await queue.settle([(delivery, DONE) for delivery in given_back])
    (folder / "go").touch()
    assert await running.status() == 0
    stats = await settled(queue)
    assert (stats.counters["completed"], stats.consumers) == (8, 0)
    assert len(lines(folder)) == 2, "none of the others was started"
    assert "2 completed" in running.log


async def test_what_does_not_finish_in_time_goes_back_and_nothing_keeps_the_worker(folder, worker, queue):
    """A14, A10: whatever agents hold on with, the worker exits soon after its drain timeout, with status 0."""
    kinds = ("waits", "stubborn", "thread", "to_thread", "process")
    running = worker("--drain-timeout=0.2")
    await running.says("ready: agents")
    await queue.produce_many([task(kind) if kind != "process" else task(kind, n=1) for kind in kinds])
    await until(lambda: len(lines(folder)) == 4 and (folder / "process").exists())
    began = time.monotonic()
    running.signal(signal.SIGTERM)
    assert await running.status() == 0, running.log
    assert time.monotonic() - began < 40, "0.2 s, a second for the last grace, and what a loaded machine adds"
    stats = await waiting(queue, 5)
    assert stats.counters == {"produced": 5, "released": 5}
    assert "ignore that they were stopped" in running.log
    back = await queue.read("other", 5, 1000)
    assert [(each.deliveries, each.retries) for each in back] == [(1, 0)] * 5


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGTERM, 143), (signal.SIGTERM, signal.SIGINT, 130)],
)
async def test_the_second_signal_ends_at_once(folder, worker, queue, first, second, status):
    """A14: exit status 128 + the second signal; the task is run again by another worker, as its second delivery."""
    running = worker()
    await running.says("ready: agents")
    await queue.produce_many([task("t", "waits")])
    await until(lambda: lines(folder))
    running.signal(first)
    await running.says("draining: 1 agents run")
    running.signal(second)
    assert await running.status() == status
    async with asyncio.timeout(60):
        while not (work := await queue.maintain("other", 5)).deliveries:
            await asyncio.sleep(0.05)
    (taken,) = work.deliveries
    assert (taken.deliveries, taken.attempt) == (2, 1)
    await queue.settle([(taken, DONE)])
    await settled(queue)


async def test_ctrl_c_drains_and_exits_with_130(folder, worker, queue):
    """A14: SIGINT is a drain like SIGTERM, with the exit status that shells expect of it."""
    running = worker()
    await running.says("ready: agents")
    await queue.produce_many([task("t", "waits")])
    await until(lambda: lines(folder))
    running.signal(signal.SIGINT)
    await running.says("draining: 1 agents run")
    (folder / "go").touch()
    assert await running.status() == 130
    assert (await settled(queue)).counters == {"produced": 1, "completed": 1}


async def test_a_blocked_event_loop_does_not_keep_signals_out(folder, worker, queue):
    """A14, A9: an agent in ``time.sleep`` blocks the drain; the second SIGTERM ends the worker all the same."""
    running = worker()
    await running.says("ready: agents")
    await queue.produce_many([task("t", "blocks")])
    await until(lambda: lines(folder))
    running.signal(signal.SIGTERM)
    await asyncio.sleep(0.2)
    assert running.process.poll() is None
    running.signal(signal.SIGTERM)
    assert await running.status() == 143


BLOCKED = """
    import asyncio, os, sys, time
    from orchestra.cli._signals import Stopper, run_to_the_end

    async def main():
        stopper.attach()
        print("ready", flush=True)
        end = time.monotonic() + 600
        while time.monotonic() < end:
            pass
        return 0

    with Stopper(os._exit, patience=0.3) as stopper:
        sys.exit(run_to_the_end(main()))
"""


async def test_a_drain_that_cannot_begin_is_ended_from_outside_the_loop():
    """A14: one SIGTERM is enough: after its patience the process ends as by a second signal, whatever blocks it."""
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(BLOCKED)], stdout=subprocess.PIPE, text=True)
    try:
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 60) == 143
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


# -- A8: poison pills; A12: out of memory


@pytest.mark.slow
async def test_poison_pills_end_as_crashed_and_the_fleet_goes_on(folder, worker, queue):
    """A8, H7: segfault, abort and exit(1) in supervised workers; what ran beside them is completed, charged once."""
    pills = ("segv", "abort", "exit")
    supervisor = worker("--processes=2")
    await supervisor.says("ready: agents", 2)
    innocents = [f"i{n}" for n in range(6)]
    tasks = [task(how, "pill", how=how) for how in pills] + [task(ident, "innocent") for ident in innocents]
    await queue.produce_many(tasks, want_results=True)
    await supervisor.says("another starts in")
    done = [await queue.wait_result(ident, 120) for ident in innocents]
    dead = [await queue.wait_result(how, 120) for how in pills]
    assert [(record["outcome"], record["reason"]) for record in dead] == [("dead", "crashed")] * 3
    assert [record["outcome"] for record in done] == ["completed"] * 6
    await queue.produce_many([task("mixed"), task("after", "small", n=5)], want_results=True)
    assert (await queue.wait_result("mixed", 60))["outcome"] == "completed"
    assert (await queue.wait_result("after", 60))["value"] == 5
    stats = await settled(queue)
    assert (stats.dead, stats.counters["completed"]) == (3, 8)
    runs = collections.defaultdict(list)
    for ident, attempt, fence, _ in lines(folder):
        runs[ident].append((attempt, fence))
    assert all(1 <= len(runs[how]) <= 2 for how in pills), "handed out twice, as max_deliveries says"
    assert all(attempt == 1 and fence <= 2 for ident in innocents for attempt, fence in runs[ident])
    assert runs["mixed"] == [(1, 1), (1, 2), (2, 3)], "one crash, one failure, one success: no retry for the crash"
    assert supervisor.process.poll() is None
    supervisor.signal(signal.SIGTERM)
    assert await supervisor.status() == 0


async def test_an_agent_without_memory_fails_and_one_killed_for_it_has_crashed(folder, worker, queue):
    """A12: under RLIMIT_AS a MemoryError is a failed attempt and others go on; a SIGKILL counts as a crash."""
    first = worker()
    await first.says("ready: agents")
    limit = 3 << 30
    resource.prlimit(first.process.pid, resource.RLIMIT_AS, (limit, limit))
    await queue.produce_many([task("h", "hungry", mib=8192), task("s", "small", n=3)], want_results=True)
    record = await queue.wait_result("h", 60)
    assert (record["outcome"], record["reason"], record["attempts"]) == ("dead", "failed", 2)
    assert record["error"]["error_type"] == "MemoryError"
    assert (await queue.wait_result("s", 60))["value"] == 3
    await queue.produce_many([task("k", "oom_killed")], want_results=True)
    assert await first.status() == -signal.SIGKILL
    second = worker()
    assert (await queue.wait_result("k", 60))["outcome"] == "completed"
    assert [(attempt, fence) for ident, attempt, fence, _ in lines(folder) if ident == "k"] == [(1, 1), (1, 2)]
    await settled(queue)
    second.signal(signal.SIGTERM)
    assert await second.status() == 0


# -- A13: forks


async def test_a_forked_child_leaves_its_parents_tasks_and_sockets_alone(folder, worker, queue):
    """A13: a child that ends, returns, raises, awaits, or touches the queue; also from a thread and multiprocessing."""
    expected = {
        "exits": 7,
        "returns": 70,
        "raises": 70,
        "awaits": 70,
        "produces": 11,
        "settles": 11,
        "reads": 11,
    }
    running = worker("--concurrency=4")
    await running.says("ready: agents")
    tasks = [task(how, "forks", how=how) for how in expected]
    tasks += [task("t", "forks_in_thread"), task("m", "multiprocesses")]
    tasks += [task(f"n{n}", "small", n=n) for n in range(50)]
    await queue.produce_many(tasks, want_results=True)
    for how, status in expected.items():
        assert (await queue.wait_result(how, 60))["value"] == [how, status], running.log
    assert (await queue.wait_result("t", 60))["value"] == ["thread", 70]
    assert (await queue.wait_result("m", 60))["value"] == 144
    for n in range(50):
        assert (await queue.wait_result(f"n{n}", 60))["value"] == n
    stats = await settled(queue)
    assert stats.counters == {"produced": 59, "completed": 59}, "nothing was doubled, retried, or produced by a child"
    assert len(lines(folder)) == 9
    assert len({pid for *_, pid in lines(folder)}) == 1
    running.signal(signal.SIGTERM)
    assert await running.status() == 0
    assert "reconnected" not in running.log
