"""Plain functions in threads and processes: what becomes of those whose caller gave up."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from orchestra._pool.executors import FunctionProcesses, FunctionThreads

mark = contextvars.ContextVar("mark", default="clean")


@pytest.fixture
def make_threads():
    made = []

    def make(limit=2):
        made.append(FunctionThreads(limit, "orchestra-unit"))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def processes():
    made = FunctionProcesses(1)
    yield made
    made.close()


async def until(condition):
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


async def give_up(running):
    """Cancel a call that runs; it gets its CancelledError at once."""
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


class Gate:
    """Functions that wait in their threads until they are let go."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.lock = threading.Lock()
        self.running = self.most = 0

    def __call__(self, argument):
        with self.lock:
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            self.opened.wait(60)
            return argument
        finally:
            with self.lock:
                self.running -= 1


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


async def test_what_a_function_returns_or_raises_arrives(make_threads):
    threads = make_threads()
    assert await threads.run(lambda n: n + 1, 1) == 2

    def bad(error):
        raise error

    for error in (KeyError("x"), SystemExit(3)):
        with pytest.raises(type(error)):
            await threads.run(bad, error)
    for error in (StopIteration(1), KeyboardInterrupt(), GeneratorExit()):
        with pytest.raises(RuntimeError, match=type(error).__name__):
            await threads.run(bad, error)
    assert await threads.run(lambda n: n, 5) == 5, "its threads live on"


async def test_never_more_threads_than_the_limit_and_they_are_used_again(make_threads, gate):
    threads = make_threads(3)
    running = [asyncio.ensure_future(threads.run(gate, n)) for n in range(10)]
    await until(lambda: gate.running == 3)
    gate.opened.set()
    assert await asyncio.gather(*running) == list(range(10))
    assert gate.most == 3
    names = {await threads.run(lambda _: threading.current_thread().name, n) for n in range(20)}
    assert len(names) <= 3


async def test_a_function_runs_in_a_copy_of_its_callers_context(make_threads):
    mark.set("callers")

    def function(_):
        seen = mark.get()
        mark.set("functions")
        return seen

    assert await make_threads().run(function, None) == "callers"
    assert mark.get() == "callers"


async def test_functions_given_up_are_counted_and_their_threads_replaced_up_to_as_many_again(make_threads, gate):
    threads = make_threads(2)
    arguments = [object() for _ in range(4)]
    for number, argument in enumerate(arguments):
        running = asyncio.ensure_future(threads.run(gate, argument))
        await until(lambda number=number: gate.running == number + 1)
        await give_up(running)
        left = threads.left_by(argument)
        assert left is not None
        assert left.running
        assert left.since <= time.monotonic()
    assert (threads.left, threads.capacity) == (4, 0)
    waiting = asyncio.ensure_future(threads.run(lambda n: n, 7))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    gate.opened.set()
    assert await waiting == 7
    await until(lambda: threads.left == 0)
    assert threads.capacity == 2
    assert [threads.left_by(argument) for argument in arguments] == [None] * 4
    before = [each for each in threading.enumerate() if each.name.startswith("orchestra-unit")]
    assert len(before) <= 2, "surplus threads end"


async def test_a_function_that_has_not_begun_is_dropped_when_it_is_given_up(make_threads, gate):
    threads, ran = make_threads(1), []
    busy = asyncio.ensure_future(threads.run(gate, 1))
    await until(lambda: gate.running == 1)
    argument = object()
    waiting = asyncio.ensure_future(threads.run(ran.append, argument))
    await asyncio.sleep(0.001)
    await give_up(waiting)
    assert threads.left_by(argument) is None
    gate.opened.set()
    assert await busy == 1
    assert await threads.run(lambda n: n, 2) == 2
    assert ran == []


async def test_closing_ends_idle_threads_cancels_what_waits_and_lets_what_runs_finish(make_threads, gate):
    threads = make_threads(1)
    busy = asyncio.ensure_future(threads.run(gate, 1))
    await until(lambda: gate.running == 1)
    waiting = asyncio.ensure_future(threads.run(gate, 2))
    await asyncio.sleep(0.001)
    threads.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    with pytest.raises(RuntimeError, match="closed"):
        await threads.run(gate, 3)
    gate.opened.set()
    assert await busy == 1
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("orchestra-unit")])


async def test_threads_end_with_the_object_that_was_not_closed():
    threads = FunctionThreads(2, "orchestra-forgotten")
    assert await threads.run(lambda n: n, 1) == 1
    del threads
    gc.collect()
    await until(lambda: not [t for t in threading.enumerate() if t.name.startswith("orchestra-forgotten")])


def test_several_loops_may_share_the_threads(make_threads):
    threads, sums = make_threads(4), []

    async def use():
        sums.append(sum(await asyncio.gather(*(threads.run(lambda n: n, n) for n in range(100)))))

    users = [threading.Thread(target=lambda: asyncio.run(use())) for _ in range(4)]
    for each in users:
        each.start()
    for each in users:
        each.join(60)
    assert sums == [4950] * 4


HANGING = """
    import asyncio, sys, time
    from orchestra._pool.executors import FunctionThreads

    async def main():
        running = asyncio.ensure_future(threads.run(time.sleep, 600))
        await asyncio.sleep(0.1)
        running.cancel()
        print("leaving", flush=True)

    threads = FunctionThreads(2, "t")
    asyncio.run(main())
"""


def test_a_function_that_hangs_does_not_keep_the_interpreter():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(HANGING)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "leaving\n")


# -- processes


def hang(path):
    Path(path).touch()
    time.sleep(600)


def pid(_argument):
    return os.getpid()


def alive(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


async def test_processes_filled_by_what_was_given_up_are_replaced_and_nobody_else_notices(processes, tmp_path):
    first = await processes.run(pid, None)
    argument = str(tmp_path / "started")
    running = asyncio.ensure_future(processes.run(hang, argument))
    await until(lambda: Path(argument).exists())
    waiting = asyncio.ensure_future(processes.run(pid, None))
    await asyncio.sleep(0.01)
    await give_up(running)
    async with asyncio.timeout(60):
        second = await waiting
    assert second != first
    assert processes.left == 0
    assert processes.left_by(argument) is None
    await until(lambda: not alive(first))


async def test_closing_ends_processes_whatever_they_do(processes, tmp_path):
    number = await processes.run(pid, None)
    started = tmp_path / "started"
    running = asyncio.ensure_future(processes.run(hang, str(started)))
    await until(started.exists)
    processes.close()
    with pytest.raises(BrokenProcessPool):
        await running
    await until(lambda: not alive(number))
    assert await processes.run(pid, None) != number, "the next call makes new ones"


PARENT = """
    import asyncio, sys, time
    sys.path.insert(0, {folder!r})
    from functions import pid
    from orchestra._pool.executors import FunctionProcesses

    async def main():
        processes = FunctionProcesses(1)
        print(await processes.run(pid, None), flush=True)
        time.sleep(600)

    if __name__ == "__main__":
        asyncio.run(main())
"""


def test_processes_end_with_their_parent_whatever_ends_it(tmp_path):
    (tmp_path / "functions.py").write_text("import os\n\ndef pid(_argument):\n    return os.getpid()\n")
    (tmp_path / "parent.py").write_text(textwrap.dedent(PARENT).format(folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    try:
        child = int(parent.stdout.readline())
        assert alive(child)
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
        end = time.monotonic() + 30
        while alive(child):
            assert time.monotonic() < end
            time.sleep(0.01)
    finally:
        parent.kill()
        parent.stdout.close()
