"""What the fence of a settle costs the server: orchestra's complete script beside bare XACK and XDEL of the same ids.

Owed: at most 1.4 times the server's CPU, for the batches of 500 that a busy worker sends. Both sides find the same
entries pending for the same consumer; filling and reading are outside of what is measured. The unfenced side settles
whatever it is told to, also what another consumer has taken over since. It is one XACK and one XDEL of 500 ids each;
for a queue that sends these two per task, which is more common, there is a row of its own. One row settles behind an
older task that still runs, where the script cannot drop whole nodes of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from benchmarks import _raw
from benchmarks._server import Server, resp
from benchmarks._table import Row
from orchestra._delivery import DONE, Delivery
from orchestra._queue.settle import SettlePlanner
from orchestra._scripts import script

ROUND = 4
"""Batches that are pending at once and settled in one go, as by a worker with a prefetch."""

Settle = Callable[[Sequence[bytes]], tuple[bytes, int]]
"""The commands that settle a batch, and how many bytes answer them."""


def _read(server: Server, count: int = _raw.BATCH) -> None:
    read = resp("XREADGROUP", "GROUP", _raw.GROUP, _raw.CONSUMER, "COUNT", count, "STREAMS", _raw.LANE, ">")
    server.raw.socket.sendall(read)
    assert len(server.raw.reply()[0][1]) == count


def _unfenced(entries: Sequence[bytes]) -> tuple[bytes, int]:
    commands = resp("XACK", _raw.LANE, _raw.GROUP, *entries) + resp("XDEL", _raw.LANE, *entries)
    return commands, 2 * len(b":%d\r\n" % len(entries))


def _one_by_one(entries: Sequence[bytes]) -> tuple[bytes, int]:
    pairs = [resp("XACK", _raw.LANE, _raw.GROUP, entry) + resp("XDEL", _raw.LANE, entry) for entry in entries]
    return b"".join(pairs), 2 * len(entries) * len(b":1\r\n")


def _fenced(entries: Sequence[bytes]) -> tuple[bytes, int]:
    """What the planner of a worker that holds ``ROUND`` batches sends for one of them."""
    planner = SettlePlanner(_raw.QUEUE, _raw.KEYS, _raw.GROUP, 60.0, 1 << 20)
    batch = [(Delivery(2, entry, (b"t", b""), _raw.CONSUMER, 1, rank), DONE) for rank, entry in enumerate(entries)]
    (settling,) = planner.plan(batch, [0, 0, ROUND * _raw.BATCH, 0])
    assert settling.call.script is script("complete")
    return settling.call.pack(), len(b"*0\r\n")


def _microseconds(server: Server, count: int, settle: Settle, *, older: bool) -> float:
    """Server CPU a task, settled in batches of 500 one after the other."""
    server.flush()
    _raw.load_scripts(server.raw)
    _raw.make_groups(server.raw)
    entries = _raw.fill(server.raw, count + older)
    if older:
        _read(server, 1)
        del entries[0]
    settles = [settle(entries[start : start + _raw.BATCH]) for start in range(0, count, _raw.BATCH)]
    used = 0.0
    for start in range(0, len(settles), ROUND):
        for _ in range(ROUND):
            _read(server)
        before = server.cpu_seconds()
        for commands, answer in settles[start : start + ROUND]:
            server.raw.socket.sendall(commands)
            server.raw.skip(answer)
        used += server.cpu_seconds() - before
    assert server.raw.ask("XLEN", _raw.LANE) == server.raw.ask("XPENDING", _raw.LANE, _raw.GROUP)[0] == older
    return used / count * 1e6


ROWS = {
    "a batch": (_unfenced, False, 1.4, "beside XACK + XDEL of the batch"),
    "behind an older task": (_unfenced, True, None, "the same, behind an older task in flight"),
    "one by one": (_one_by_one, False, None, "beside XACK + XDEL a task, pipelined"),
}


@pytest.mark.parametrize("case", ROWS)
def test_fenced_settle(benchmark, comparisons, empty, scale, case):
    unfenced, older, owed, words = ROWS[case]
    count = scale(100_000, 40_000, 2_000)
    row = Row(f"settle: server CPU a task, {words}", "µs", owed, less_is_better=True)
    comparisons.run(
        benchmark,
        lambda: {row: _microseconds(empty, count, _fenced, older=older)},
        lambda: {row: _microseconds(empty, count, unfenced, older=older)},
    )
