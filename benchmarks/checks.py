"""The guarded ratios: what a task costs us, beside the oracle or the raw server. See :mod:`benchmarks.guard` for the rule.

Owns how each cost is taken. Micro checks count the CPU time of this thread; checks of scripts count the CPU time of the
server; the two ends of a task count the CPU time of the process beside that of the server for bare commands. No oracle runs
a script of ours: a script that becomes cheaper must not look like a loss. Wall clocks decide only where there is nothing
else (latency), and only in the long form.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import timeit
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from types import TracebackType
from typing import Any, Self

from benchmarks import _raw, bench_codec, bench_gcra, bench_heap, bench_settle, bench_wrr
from benchmarks._server import Server
from benchmarks._worker import other_process, queue_at
from benchmarks.guard import Check, Sample
from orchestra import serialization
from orchestra._ext import codec
from orchestra._ext.gcra import GcraTable, check
from orchestra._ext.wrr import SmoothRing
from tests.reference.wrr import SmoothRing as PlainRing


class Bench:
    """What checks share; the server starts when the first check asks for it."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    @cached_property
    def server(self) -> Server:
        """A private server."""
        server = Server()
        self._stack.callback(server.stop)
        _raw.load_scripts(server.raw)
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def versions(bench: Bench) -> dict[str, str]:
    """Of what is on both sides."""
    found = {name: version(name) for name in ("msgspec", "hiredis", "redis", "cython")}
    return {**found, "redis-server": bench.server.version if "server" in bench.__dict__ else "not used"}


def cpu_of(function: Callable[[], Any], times: int) -> Sample:
    """CPU seconds of this thread for one call, over ``times`` calls."""

    def sample() -> float:
        began = time.thread_time()
        for _ in range(times):
            function()
        return (time.thread_time() - began) / times

    return sample


def _statement(source: str, names: dict[str, Any], times: int) -> Sample:
    """The same for a statement, without a call of its own around it."""
    timer = timeit.Timer(source, timer=time.thread_time, globals=names)
    return lambda: timer.timeit(times) / times


def _heap(_: Bench) -> tuple[Sample, Sample]:
    compiled, reference = bench_heap.steady(bench_heap.tasks(1_000))
    return cpu_of(compiled, 20), cpu_of(reference, 20)


def _heap_fill(_: Bench) -> tuple[Sample, Sample]:
    load = bench_heap.tasks(10_000)
    return cpu_of(lambda: bench_heap.ours(load), 1), cpu_of(lambda: bench_heap.theirs(load), 1)


def _encode(_: Bench) -> tuple[Sample, Sample]:
    names = {"ours": bench_codec.CODEC.encode, "theirs": bench_codec.THEIRS_IN, "task": bench_codec.TASK}
    return _statement("ours(task)", names, 10_000), _statement("theirs(task)", names, 10_000)


def _encode_task(_: Bench) -> tuple[Sample, Sample]:
    names = {"ours": serialization.encode_task, "theirs": bench_codec.THEIRS_IN, "task": bench_codec.WITHOUT_ID}
    return _statement("ours(task)", names, 10_000), _statement("theirs(task)", names, 10_000)


def _decode(_: Bench) -> tuple[Sample, Sample]:
    frame, bytes_ = bench_codec.CODEC.encode(bench_codec.TASK)[2], bench_codec.THEIRS_IN(bench_codec.TASK)
    names = {"ours": bench_codec.CODEC.decode, "theirs": bench_codec.THEIRS_OUT, "frame": frame, "bytes_": bytes_}
    return _statement("ours(frame)", names, 10_000), _statement("theirs(bytes_)", names, 10_000)


def _header(_: Bench) -> tuple[Sample, Sample]:
    frame, bytes_ = bench_codec.CODEC.encode(bench_codec.TASK)[2], bench_codec.THEIRS_IN(bench_codec.TASK)
    names = {"ours": codec.decode_header, "theirs": bench_codec.THEIRS_OUT, "frame": frame, "bytes_": bytes_}
    return _statement("ours(frame)", names, 20_000), _statement("theirs(bytes_)", names, 10_000)


def _refusal(_: Bench) -> tuple[Sample, Sample]:
    source = "refused_for('tenant-7', 1, now, 10_000, 200_000)"
    ours, theirs = bench_gcra.known(GcraTable()), bench_gcra.known(bench_gcra.PythonTable())
    return _statement(source, ours, 20_000), _statement(source, theirs, 5_000)


def _gcra_check(_: Bench) -> tuple[Sample, Sample]:
    source, epoch = "check(epoch + 100, epoch, 1, 10_000, 200_000)", bench_gcra.EPOCH_US
    theirs = {"check": bench_gcra.python_check, "epoch": epoch}
    return _statement(source, {"check": check, "epoch": epoch}, 20_000), _statement(source, theirs, 5_000)


def _ring(_: Bench) -> tuple[Sample, Sample]:
    ours, theirs = bench_wrr.filled(SmoothRing(), 10), bench_wrr.filled(PlainRing(), 10)
    return _statement("select()", ours, 20_000), _statement("select()", theirs, 500)


def _settle(bench: Bench) -> tuple[Sample, Sample]:
    def side(settle: bench_settle.Settle) -> Sample:
        return lambda: bench_settle._microseconds(bench.server, 10_000, settle, older=False)

    return side(bench_settle._fenced), side(bench_settle._unfenced)


def _server_cpu(bench: Bench, calls: list[bytes], count: int, strings: int | None = None) -> float:
    """CPU microseconds of the server for one task of ``calls``."""
    before = bench.server.cpu_seconds()
    _raw.rate_of_calls(bench.server.raw, calls, count, strings=strings)
    return (bench.server.cpu_seconds() - before) / count * 1e6


def _produce_script(ids: bool) -> Callable[[Bench], tuple[Sample, Sample]]:
    def setup(bench: Bench) -> tuple[Sample, Sample]:
        count = 20_000
        plain = [_raw.xadd_block()] * (count // _raw.BATCH)

        def ours() -> float:
            bench.server.flush()
            return _server_cpu(bench, _raw.produce_calls(count, ids=ids), count, _raw.RECORD)

        def oracle() -> float:
            bench.server.flush()
            return _server_cpu(bench, plain, count)

        return ours, oracle

    return setup


def _producer(ids: bool) -> Callable[[Bench], tuple[Sample, Sample]]:
    def setup(bench: Bench) -> tuple[Sample, Sample]:
        count = 20_000
        tasks = [_raw.task(number if ids else None) for number in range(count)]
        plain = [_raw.xadd_block()] * (count // _raw.BATCH)

        def ours() -> float:
            bench.server.flush()
            return asyncio.run(_producer_cpu(bench.server.url, tasks))

        def oracle() -> float:
            bench.server.flush()
            return _server_cpu(bench, plain, count)

        return ours, oracle

    return setup


async def _producer_cpu(url: str, tasks: list[dict[str, object]]) -> float:
    """CPU microseconds of this process for one task of a ``produce_many``."""
    async with queue_at(url) as queue:
        await queue.produce_many([_raw.task()])
        began = time.process_time()
        await queue.produce_many(tasks)
        return (time.process_time() - began) / len(tasks) * 1e6


DRAIN = 20_000


async def _queue_up(url: str, count: int) -> None:
    async with queue_at(url) as queue:
        await queue.produce_many([_raw.task() for _ in range(count)])


def _drain_cpu(bench: Bench) -> tuple[float, float]:
    """CPU microseconds of worker and server for one drained task."""
    bench.server.flush()
    asyncio.run(_queue_up(bench.server.url, DRAIN))
    with other_process("drain", bench.server.url, DRAIN) as worker:
        before = bench.server.cpu_seconds()
        report = json.loads(worker.stdout.readline())  # type: ignore[union-attr]
        used = bench.server.cpu_seconds() - before
    assert report["outcomes"] == {"completed": DRAIN}
    return report["cpu_s"] / DRAIN * 1e6, used / DRAIN * 1e6


def _worker(bench: Bench) -> tuple[Sample, Sample]:
    return lambda: _drain_cpu(bench)[0], lambda: _raw.drain(bench.server, DRAIN, bare=True)[1]


def _worker_server(bench: Bench) -> tuple[Sample, Sample]:
    """Commands too many show here, whatever they are."""
    return lambda: _drain_cpu(bench)[1], lambda: _raw.drain(bench.server, DRAIN, bare=True)[1]


def _latency(bench: Bench) -> tuple[Sample, Sample]:
    from benchmarks.bench_latency import send_times, wake_times

    def middle(times: list[float]) -> float:
        return sorted(times)[len(times) // 2]

    return lambda: middle(send_times(bench.server, 120)), lambda: middle(wake_times(bench.server, 120))


CHECKS = (
    Check(name="heap: push and pop of 1,000", what="heapq's time over ours", setup=_heap, rounds=16, margin=0.25),
    Check(name="heap: fill and drain 10,000", what="heapq's time over ours", setup=_heap_fill, rounds=12, margin=0.25),
    Check(name="codec: encode", what="msgspec's time over ours", setup=_encode, rounds=16, margin=0.25),
    Check(name="codec: decode", what="msgspec's time over ours", setup=_decode, rounds=16, margin=0.25),
    Check(
        name="codec: header",
        what="msgspec's time for the whole task over ours for the header",
        setup=_header,
        rounds=16,
        margin=0.25,
    ),
    Check(
        name="serialization: encode_task",
        what="msgspec's time over ours, which adds an id and checks",
        setup=_encode_task,
        rounds=16,
        margin=0.25,
    ),
    Check(name="gcra: local refusal", what="plain Python's time over ours", setup=_refusal, rounds=16, margin=0.25),
    Check(name="gcra: check", what="plain Python's time over ours", setup=_gcra_check, rounds=16, margin=0.25),
    Check(name="wrr: select of 10", what="plain Python's time over ours", setup=_ring, rounds=16, margin=0.25),
    Check(
        name="server: settle",
        what="server CPU of bare XACK + XDEL over that of complete.lua",
        setup=_settle,
        rounds=8,
        margin=0.25,
    ),
    Check(
        name="server: produce, generated ids",
        what="server CPU of plain XADD over that of produce_many.lua",
        setup=_produce_script(ids=False),
        rounds=8,
        margin=0.25,
    ),
    Check(
        name="server: produce, own ids",
        what="server CPU of plain XADD over that of produce_many.lua",
        setup=_produce_script(ids=True),
        rounds=8,
        margin=0.25,
    ),
    Check(
        name="producer: produce_many, generated ids",
        what="server CPU of plain XADD over CPU of the producer",
        setup=_producer(ids=False),
        rounds=8,
        margin=0.3,
    ),
    Check(
        name="producer: produce_many, own ids",
        what="server CPU of plain XADD over CPU of the producer",
        setup=_producer(ids=True),
        rounds=8,
        margin=0.3,
    ),
    Check(
        name="worker: no-op drain",
        what="server CPU of XREADGROUP, XACK and XDEL over CPU of the worker",
        setup=_worker,
        rounds=6,
        margin=0.3,
    ),
    Check(
        name="worker: server's part of a no-op drain",
        what="server CPU of XREADGROUP, XACK and XDEL over server CPU of a worker's drain",
        setup=_worker_server,
        rounds=6,
        margin=0.3,
    ),
    Check(
        name="latency: send to start, p50",
        what="raw wake-up over ours (wall clock)",
        setup=_latency,
        rounds=5,
        margin=0.45,
        short=False,
    ),
)
