"""One worker process beside what Redis itself can hand out: draining, sleeping agents, doing nothing.

Owed: drain at least 0.5 of XREADGROUP plus the settle script; 10,000 sleeps of 0.1 s at concurrency 1,000 at 0.95 of
ideal; idle at most 2 commands a second and 0.5 % of a core; at most 60 MiB resident. The worker has a process of its own
and this one waits meanwhile, so that worker and server have a core each on a machine with two.
"""

from __future__ import annotations

import json
import time

from benchmarks import _raw
from benchmarks._server import cpu_seconds
from benchmarks._table import Row
from benchmarks._worker import SLEEP, other_process, queue_at, resident, run_loop

CONCURRENCY = 1000


async def _fill(url, count):
    async with queue_at(url) as queue:
        await queue.produce_many([_raw.task(number) for number in range(count)])


def _serve(server, mode, count):
    """Queue ``count`` tasks, then start a worker; its report."""
    server.flush()
    run_loop(_fill(server.url, count))
    with other_process(mode, server.url, count) as worker:
        line = worker.stdout.readline()
        if not line:
            raise RuntimeError(worker.stderr.read().decode())
    report = json.loads(line)
    assert report["outcomes"] == {"completed": count}
    return report


def test_drain(benchmark, comparisons, empty, scale):
    """From the first call of a no-op agent until the queue is empty."""
    count = scale(50_000, 20_000, 1_000)
    drain = Row("drain by one worker, no-op agent", "tasks/s", 0.5)
    cpu = Row("drain: CPU of the worker a task", "µs")
    memory = Row("peak memory of the worker in the drain", "MiB", 60, less_is_better=True)

    def raw():
        _raw.load_scripts(empty.raw)
        return {drain: _raw.drain_rate(empty, count)}

    def ours():
        report = _serve(empty, "drain", count)
        return {drain: count / report["empty_s"], cpu: report["cpu_s"] / count * 1e6, memory: report["rss_mib"]}

    comparisons.run(benchmark, ours, raw)


def test_sleeping_agents(benchmark, comparisons, empty, scale):
    """Ideal is as many sleeps at once as the concurrency allows, without a gap between them."""
    count = scale(10_000, 10_000, 1_000)
    row = Row(f"{count:,} agents that sleep {SLEEP} s, {CONCURRENCY:,} at once (ceiling: ideal)", "tasks/s", 0.95)
    ideal = CONCURRENCY / SLEEP

    comparisons.run(benchmark, lambda: {row: count / _serve(empty, "sleep", count)["run_s"]}, lambda: {row: ideal})


def test_idle_worker(benchmark, comparisons, empty, scale):
    """Commands as MONITOR shows them: those that a client sent, not what runs inside a script."""
    seconds = scale(10.0, 5.0, 0.5)
    commands = Row("idle worker: commands", "/s", 2, less_is_better=True)
    cpu = Row("idle worker: CPU", "% of a core", 0.5, less_is_better=True)
    memory = Row("idle worker: memory", "MiB", 60, less_is_better=True)

    def ours():
        empty.flush()
        with other_process("idle", empty.url) as worker:
            time.sleep(min(1.0, seconds))
            used, sent = cpu_seconds(worker.pid), _commands_sent(empty, seconds)
            used = cpu_seconds(worker.pid) - used
            return {commands: sent / seconds, cpu: 100 * used / seconds, memory: resident(worker.pid)}

    comparisons.run(benchmark, ours, dict)


def _commands_sent(server, seconds):
    ears = server.connect()
    ears.ask("MONITOR")
    end, sent = time.monotonic() + seconds, 0
    while (left := end - time.monotonic()) > 0:
        ears.socket.settimeout(left)
        try:
            line = ears.reply()
        except TimeoutError:
            break
        sent += b" lua] " not in line
    ears.close()
    return sent
