"""``orchestra worker --processes min:max``: real processes that come with the load and go without it."""

from __future__ import annotations

import os
import re
import signal
import sys
import time

import pytest

from orchestra import App
from orchestra._pool.scaling import Scaler, ScalingPolicy
from orchestra.cli._supervisor import READY, Load, Place, Processes, Report
from orchestra.errors import ConfigurationError
from tests.processes import LoggedProcess, orchestra

JOBS = """
from __future__ import annotations
import asyncio
from orchestra import App

app = App("elastic")

@app.agent
async def nap(n: int) -> int:
    await asyncio.sleep(0.25)
    return n
"""


class Worker(LoggedProcess):
    """A supervised worker."""

    def stop(self) -> int:
        self.signal(signal.SIGTERM)
        return self.process.wait(60)

    def children(self) -> list[int]:
        pid = self.process.pid
        with open(f"/proc/{pid}/task/{pid}/children") as listed:
            return [int(child) for child in listed.read().split()]


@pytest.fixture
def worker(tmp_path, redis_url, monkeypatch):
    (tmp_path / "jobs.py").write_text(JOBS)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("ORCHESTRA_REDIS_URL", redis_url)
    made = []

    def start(*args: str) -> Worker:
        made.append(Worker(tmp_path, orchestra("worker", "jobs.py", *args)))
        return made[-1]

    yield start
    for each in made:
        each.end()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_processes_come_with_the_load_and_go_without_it(worker, redis_url):
    """A backlog grows them to the maximum, a killed one is replaced, an empty queue shrinks them; nothing is lost."""
    scaled = worker("--processes=1:3", "--concurrency=2", "--scale-interval=0.4", "--scale-cooldown=1")
    async with App("elastic", redis_url) as app:
        scaled.wait_for("ready: agents")
        assert len(scaled.children()) == 1
        ids = await app.queue.produce_many([{"type": "nap", "input": {"n": n}} for n in range(120)])
        scaled.wait_for(r"worker processes \d -> 3: .*wait")
        scaled.wait_for("ready: agents", 3)
        os.kill(scaled.children()[-1], signal.SIGKILL)
        scaled.wait_for("was killed by SIGKILL; another starts in")
        scaled.wait_for(r"worker processes \d -> 1: ")
        end = time.monotonic() + 60
        while (stats := await app.queue.stats()).live or len(scaled.children()) > 1:
            assert time.monotonic() < end, scaled.log
            time.sleep(0.05)
        assert (stats.counters["completed"], stats.dead) == (len(ids), 0)
        again = await app.queue.produce_many([{"type": "nap", "input": {"n": n}} for n in range(3)])
        while (await app.queue.stats()).counters["completed"] < len(ids) + len(again):
            assert time.monotonic() < end + 30, scaled.log
            time.sleep(0.05)
    assert scaled.stop() == 0
    sizes = [int(size) for size in re.findall(r"worker processes \d -> (\d)", scaled.log)]
    assert sizes[0] == 2, "one step at most doubles"
    assert max(sizes) == 3


# -- what reports add up to


def say(place, at, running, ended, run_s, cpu_s, waiting, size=10):
    place.reports.append(Report(at, running, size, ended, run_s, cpu_s, waiting))


def test_reports_add_up_to_littles_law():
    """Two processes of ten slots; 20 tasks a second come and end, of 0.5 s each: ten slots are busy, one process."""
    load, places = Load(), [Place(1), Place(2)]
    assert load.demand(places, 0.0) is None
    for place in places:
        say(place, 0.0, 5, 0, 0.0, 0.0, 0)
    first = load.demand(places, 0.0)
    assert (first.size, first.load, first.arrival_rate, first.run_time) == (2, 0.5, None, None)
    for place in places:
        say(place, 5.0, 5, 50, 25.0, 0.5, 0)
        say(place, 10.0, 5, 100, 50.0, 1.0, 30)
    demand = load.demand(places, 10.0)
    assert (demand.throughput, demand.arrival_rate, demand.run_time) == (20.0, 23.0, 0.05)
    assert (demand.load, demand.backlog, demand.waited, demand.most_waited) == (0.5, 30, 0, 30)


def test_a_process_that_is_out_of_processor_is_busy_whatever_its_slots_say():
    load, place = Load(), Place(1)
    say(place, 0.0, 0, 0, 0.0, 0.0, 500)
    load.demand([place], 0.0)
    say(place, 10.0, 1, 10_000, 1.0, 9.9, 100_000)
    demand = load.demand([place], 10.0)
    assert demand.load == 0.99
    assert demand.run_time == pytest.approx(9.9 / 10_000)
    size, why = Scaler(ScalingPolicy(max_workers=8)).decide(demand)
    assert size == 2, why


def test_a_new_process_in_a_place_counts_from_its_own_beginning():
    load, place = Load(), Place(1)
    say(place, 0.0, 0, 900, 90.0, 9.0, 0)
    load.demand([place], 0.0)
    place.begin()
    say(place, 1.0, 0, 10, 1.0, 0.1, 0)
    say(place, 2.0, 0, 30, 3.0, 0.3, 0)
    assert load.demand([place], 10.0).throughput == 2.0


def test_what_is_no_report_is_ignored():
    place = Place(1)
    for line in (b"\n", b"[1, 2]\n", b"{}\n", b'"seven7!"\n', b"[1, 2, 3\n", b"\xff\n", b"3\n"):
        place.hear(line)
    assert (place.reports, place.ready) == ([], False)
    place.hear(READY)
    place.hear(b"[0.5, 1, 2, 3, 0.1, 0.2, null]\n")
    assert (place.reports, place.ready) == ([Report(0.5, 1, 2, 3, 0.1, 0.2, None)], True)


# -- bad input


@pytest.mark.parametrize(
    ("text", "interval", "cooldown", "field"),
    [
        *(
            (text, 5.0, 60.0, "--processes")
            for text in ("", ":", "a", "1:", ":3", "0:2", "1:1025", "3:2", "1.5", "1:2:3")
        ),
        *(("1:2", bad, 60.0, "--scale-interval") for bad in (0.0, -1.0, float("nan"), float("inf"), 1e9)),
        *(("1:2", 5.0, bad, "--scale-cooldown") for bad in (-1.0, float("nan"), float("inf"), 1e9)),
    ],
)
def test_bad_options_are_named(text, interval, cooldown, field):
    with pytest.raises(ConfigurationError) as caught:
        Processes.parse(text, interval, cooldown)
    assert caught.value.field == field


def test_a_number_of_processes_or_two():
    assert Processes.parse("4", 5.0, 60.0) == Processes(low=4, high=4)
    assert not Processes.parse("2:2", 5.0, 60.0).elastic
    assert Processes.parse("1:8", 5.0, 60.0).elastic
