"""The tables of how cost grows: one small run of each kind of row, and what a failing row does."""

from __future__ import annotations

import json

import pytest

from benchmarks import scaling
from benchmarks._server import Server
from tests.processes import run_module

SMALL = {
    "agents": {"agents": 5, "tasks": 200, "sleeps": 10},
    "backlog": {"backlog": 3_000, "window": 1_000},
    "bodies": {"bytes": 2_000, "tasks": 50},
    "workers": {"servers": 2, "workers": 2, "tasks": 2_000},
}


@pytest.fixture(scope="module")
def server():
    server = Server()
    yield server
    server.stop()


@pytest.mark.parametrize("table", scaling.TABLES, ids=lambda table: table.name)
def test_row_of_each_table(server, table):
    found = table.measure(server, **SMALL[table.name])
    assert all(value > 0 for value in found.values()), found
    assert {name for name in found if "µs" in name}, "every row tells CPU time a task"


@pytest.mark.parametrize("table", scaling.TABLES, ids=lambda table: table.name)
def test_axes_are_what_the_measure_takes(table):
    assert all(set(axis) == set(SMALL[table.name]) for axis in (*table.full, *table.quick))


def test_axes_reach_what_is_promised():
    full = {table.name: table.full for table in scaling.TABLES}
    assert [axis["agents"] for axis in full["agents"]] == [1, 10, 100, 1_000, 10_000]
    assert [axis["backlog"] for axis in full["backlog"]] == [10**n for n in range(3, 8)]
    assert {axis["workers"] for axis in full["workers"]} == {1, 2, 4, 8}
    assert {axis["servers"] for axis in full["workers"]} == {1, 2, 3, 4}
    assert (min(axis["bytes"] for axis in full["bodies"]), max(axis["bytes"] for axis in full["bodies"])) == (
        100,
        1_047_552,
    )


def test_short_backlog_is_drained_often_by_a_warm_worker(server):
    found = scaling.backlog(server, backlog=300, window=1_000)
    assert server.raw.ask("XLEN", scaling._raw.LANE) == 0
    assert all(value > 0 for value in found.values()), found
    assert found["Redis B a task"] < 400


def backlog_rows(*rates):
    rows = [scaling.Row({"backlog": 10**n, "window": 1}) for n in range(3, 3 + len(rates))]
    for row, rate in zip(rows, rates, strict=True):
        row.note({"drain /s": rate, "producer µs": 2.0, "worker µs": 7.0, "server µs": 5.0, "server µs (enqueue)": 2.0})
        row.note({"Redis B a task": 100.0})
    return rows


def test_model_counts_processes_at_a_share_of_a_core():
    rows = {row["tasks/s"]: row for row in scaling.model({"backlog": backlog_rows(100.0, 105.0)})}
    assert rows[1_000_000]["Redis partitions"] == 10, "7 µs a task, 70 % of a core each"
    assert rows[1_000_000]["worker processes"] == 10
    assert rows[1_000]["worker processes"] == 1
    assert rows[10_000]["Redis MiB for a backlog of a minute"] == pytest.approx(57.2, abs=0.1)
    assert scaling.model({}) == []
    assert "| 1,000,000 | 2.86 | 10 | 10 |" in scaling.model_table({"backlog": backlog_rows(1.0)})


def test_flatness_is_told():
    assert "-10% to +5%" in scaling.flatness({"backlog": backlog_rows(90.0, 100.0, 105.0)})


def test_no_round_begins_that_would_end_too_late():
    table = scaling.Table("t", "Title", [{"size": 1}], [], lambda server, size: {"drain /s": 1.0})
    (row,) = scaling.measure(table, None, 5, quick=False, end=0.0)
    assert row.figures["drain /s"] == [1.0], "one round in any case"


def test_row_that_fails_says_why_and_the_others_are_measured():
    def measure(server, size):
        if size == 2:
            raise RuntimeError("too large")
        return {"drain /s": float(size)}

    table = scaling.Table("t", "Title", [{"size": n} for n in (1, 2, 3)], [], measure)
    rows = scaling.measure(table, None, 3, quick=False)
    text = scaling.markdown(table, rows)
    assert [len(row.figures.get("drain /s", ())) for row in rows] == [3, 0, 3]
    assert "RuntimeError: too large" in text
    assert "| 2 | – |" in text


@pytest.mark.slow
def test_command_writes_tables(tmp_path):
    run_module("benchmarks.scaling", "--quick", "--only", "workers", "--output", str(tmp_path))
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert {(row["servers"], row["workers"]) for row in found["tables"]["workers"]} == {(1, 1), (1, 2), (2, 2)}
    assert all(row["server µs"] > 0 and not row["error"] for row in found["tables"]["workers"])
    assert "### Worker processes and servers" in (tmp_path / "scaling.md").read_text()
