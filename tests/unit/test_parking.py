"""Who comes back when: the lines of parked keys, and rounds in which those of a key ask. No Redis."""

from __future__ import annotations

import asyncio
import random

import pytest

from orchestra import telemetry
from orchestra._dispatch import parking as _parking
from orchestra._dispatch.parking import GRACE, LATE, MOST_KEYS, MOST_TURNS, Line, Parking
from orchestra._dispatch.turnstile import Turnstiles


def line(interval=1.0, now=100.0) -> Line:
    return Line("key", interval, now)


def test_newcomers_go_behind_one_another_at_the_limits_rate():
    one = line()
    assert one.newcomer(100.0) is None, "nobody is in the line"
    assert one.queued(105.0) == 105.0
    assert [one.newcomer(100.0), one.newcomer(101.0, cost=3), one.newcomer(104.0)] == [106.0, 109.0, 110.0]


def test_a_newcomer_waits_for_those_who_are_on_their_way():
    one = line(interval=0.01)
    one.queued(101.0)
    assert one.newcomer(101.0 + LATE / 2) == pytest.approx(101.0 + LATE / 2 + 0.01)
    one = line(interval=0.01)
    one.queued(101.0)
    assert one.asks("a", 101.0)[0] is None
    assert one.newcomer(101.0 + LATE / 2) is None, "all have come back"


def test_the_shared_line_moves_the_end():
    one = line()
    one.queued(105.0)
    one.ends_at(120.0)
    one.ends_at(90.0)
    assert one.newcomer(100.0) == 121.0


def test_who_was_put_off_goes_first_and_in_order():
    one = line()
    place, number = one.asks("a", 100.0)
    assert place is None
    one.refused("a", number, 100.5)
    assert one.asks("b", 100.1) == (101.5, 0)
    assert one.asks("c", 100.2) == (102.5, 0)
    assert one.asks("c", 100.3)[0] == 102.5, "too early: behind b again"
    assert one.asks("a", 100.5)[0] is None
    assert one.asks("b", 101.5)[0] is None


def test_who_never_comes_back_holds_nobody_up_for_long():
    one = line()
    one.refused("a", one.asks("a", 100.0)[1], 100.5)
    assert one.asks("b", 100.6)[0] is not None
    assert one.asks("c", 100.5 + 1.0 + GRACE + 1.0)[0] is None


def test_turns_are_bounded():
    one = line(interval=0.0)
    one.refused("first", one.asks("first", 100.0)[1], 200.0)
    for number in range(3 * MOST_TURNS):
        one.asks(f"t{number}", 100.0)
    assert len(one._turns) == MOST_TURNS


def test_one_server_serves_all_in_order_whatever_the_delays_are():
    """A line that is refused again and again by a limit of one a second still ends, in order, each asked for a few times."""
    rng = random.Random(7)
    one, now, tat, seen, asked = line(), 100.0, 100.0, [], 0
    waiting = [(100.0 + n, n) for n in range(60)]
    while waiting:
        waiting.sort()
        due, n = waiting.pop(0)
        now = max(now, due) + rng.random() * 0.05
        place, number = one.asks(str(n), now)
        if place is None and tat > now:
            asked += 1
            place = one.refused(str(n), number, tat)
        if place is None:
            tat = now + 1.0
            seen.append(n)
        else:
            waiting.append((place + 0.002, n))
    assert seen == list(range(60))
    assert asked <= 120


def test_a_held_key_lets_nobody_start_before_its_time():
    one = line(interval=0.25)
    assert one.held(100.0, came_back=True) is None
    one.hold(100.0, 10.0)
    assert one.held(100.0, came_back=True) == 110.0
    assert one.held(101.0, came_back=True) == 110.25
    assert one.held(102.0, came_back=False) == 110.5, "new ones go behind"
    assert one.held(103.0, came_back=True) == 110.5
    one.hold(103.0, 1.0)
    assert one.held(104.5, came_back=True) >= 110.0, "a shorter time does not end a longer one"
    assert one.held(110.0, came_back=True) is None


def test_those_who_cannot_start_come_back_one_after_the_other():
    one = line(interval=0.5)
    assert [one.spread(100.0, 2.0) for _ in range(3)] == [102.0, 102.5, 103.0]


def test_parking_tells_once_and_is_bounded():
    told = []
    stop = telemetry.attach(lambda name, numbers, facts: told.append((name, facts["key"])), "key.parked", "key.resumed")
    parking = Parking("queue")
    one = parking.park("k", "shown", 1.0, 100.0, 5.0)
    assert parking.park("k", "shown", 1.0, 100.0, 5.0) is one
    one.queued(105.0)
    parking.passed("k", 104.0)
    assert told == [("key.parked", "shown")]
    parking.passed("k", 105.1)
    stop()
    assert told == [("key.parked", "shown"), ("key.resumed", "shown")]
    for number in range(MOST_KEYS + 10):
        parking.park(number, "many", 1.0, 100.0, 5.0).queued(200.0)
    assert len(parking) == MOST_KEYS
    assert parking.get(0) is None, "the one parked longest ago is forgotten"
    parking.sweep(300.0)
    assert len(parking) == 0
    assert _parking.MOST_KEYS == MOST_KEYS


async def test_rounds_keep_the_order_of_arrival():
    doors, log = Turnstiles(), []

    async def come(name, seconds=0.0):
        await doors.enter(["k"])
        log.append(f"+{name}")
        await asyncio.sleep(seconds)
        log.append(f"-{name}")
        doors.leave(["k"])

    first = asyncio.create_task(come("a", 0.01))
    await asyncio.sleep(0)
    others = [asyncio.create_task(come(name, 0.01)) for name in "bc"]
    await asyncio.sleep(0)
    await first
    late = asyncio.create_task(come("d"))
    await asyncio.gather(*others, late)
    assert log == ["+a", "-a", "+b", "+c", "-b", "-c", "+d", "-d"]
    assert doors._rounds == {}


async def test_whoever_gives_up_holds_nobody_up():
    doors = Turnstiles()
    await doors.enter(["k", "l"])
    waiting = [asyncio.create_task(doors.enter(["j", "k"])) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    await asyncio.sleep(0)
    doors.leave(["k", "l"])
    waiting[1].cancel()  # let in at this very moment
    await asyncio.gather(*waiting, return_exceptions=True)
    async with asyncio.timeout(5):
        if not waiting[2].cancelled():
            doors.leave(["j", "k"])
        await doors.enter(["j", "k"])
        doors.leave(["j", "k"])
    assert doors._rounds == {}


def test_a_line_whose_limit_is_raised_is_as_much_shorter():
    line = Line("api", 10.0, 100.0)
    line.ends_at(150.0)
    line.refused("a", 1, 120.0)
    line.hurry(1.0, 100.0)
    assert (line.interval, line.tail) == (1.0, pytest.approx(105.0))
    assert line.newcomer(100.0) == pytest.approx(106.0)
    assert line.asks("b", 100.0) == (pytest.approx(103.0), 0), "behind the one who was put off before"
    line.hurry(0.5, 200.0)
    assert line.tail < 200.0, "what is over stays so"
