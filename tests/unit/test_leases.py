"""The arithmetic of leases and the patience with an event loop, on times that are arguments."""

from __future__ import annotations

import threading

import pytest

from orchestra._delivery import Delivery
from orchestra._queue.leases import LeaseBook
from orchestra._queue.stall import STALL_AFTER, LoopWatch, Pulse, stack_of


def deliveries(count):
    return [Delivery(2, b"%d-0" % n, (b"t", b""), "c") for n in range(count)]


def test_short_lived_deliveries_are_never_renewed():
    book, (one,) = LeaseBook(80.0), deliveries(1)
    assert book.scan(10.0, 0.0, [one]) == []
    assert book.scan(20.0, 10.0, []) == []
    assert book.deadline() == float("inf")


def test_a_lease_is_renewed_at_every_second_scan_and_a_failed_renewal_at_the_next():
    book, (one,) = LeaseBook(80.0), deliveries(1)
    assert book.scan(10.0, 0.0, [one]) == []
    assert book.scan(20.0, 10.0, [one]) == [one]
    assert book.scan(30.0, 20.0, [one]) == [one], "nothing was said of the renewal"
    book.renewed([one], 30.0)
    assert book.scan(40.0, 30.0, [one]) == []
    assert book.scan(50.0, 40.0, [one]) == [one]


def test_without_a_renewal_it_counts_as_lost_a_margin_before_its_end_and_is_said_once():
    book, (one, two) = LeaseBook(100.0), deliveries(2)
    book.scan(10.0, 0.0, [one, two])
    assert book.deadline() == 90.0
    book.renewed([two], 15.0)
    assert book.overdue(89.9, tried=True) == []
    assert book.overdue(90.0, tried=False) == []
    book.scan(90.0, 80.0, [one, two])
    assert book.overdue(90.0, tried=False) == [one]
    assert book.overdue(91.0, tried=True) == []
    assert book.deadline() == 105.0
    assert one in book.scan(92.0, 91.0, [one, two]), "it is renewed for its settle"


def test_what_may_be_old_when_it_is_first_seen_gets_a_renewal_before_it_is_judged():
    book, (one,) = LeaseBook(10.0), deliveries(1)
    assert book.scan(100.0, 50.0, [one]) == [one]
    assert book.overdue(100.0, tried=False) == []
    book.renewed([one], 100.0)
    assert book.overdue(100.0, tried=True) == []
    other = deliveries(1)
    assert book.scan(101.0, 50.0, other) == other
    assert book.overdue(101.0, tried=True) == other


def test_what_redis_gave_away_is_forgotten_until_it_is_handed_out_again():
    book, (one,) = LeaseBook(10.0), deliveries(1)
    book.scan(5.0, 0.0, [one])
    book.drop([one])
    assert book.scan(50.0, 40.0, [one]) == []
    assert book.overdue(50.0, tried=True) == []
    again = deliveries(1)
    assert book.scan(51.0, 50.9, again) == []
    assert book.deadline() == pytest.approx(59.9)


def test_a_loop_that_answers_is_never_blocked():
    asked = []
    watch = LoopWatch(asked.append)
    for now in range(10):
        assert watch.blocked(float(now)) == 0.0
        asked.pop()()
    assert asked == []


def test_silence_is_measured_from_the_question_and_told_at_each_doubling():
    asked = []
    watch = LoopWatch(asked.append)
    watch.blocked(100.0)
    told = [now for now in range(1, 20) if watch.is_news(watch.blocked(100.0 + now))]
    assert told == [STALL_AFTER, 2, 4, 8, 16]
    assert len(asked) == 1
    asked.pop()()
    assert watch.blocked(200.0) == 0.0
    assert watch.is_news(watch.blocked(201.5)), "the next stall is told from the start"


def test_a_process_that_stood_still_is_not_held_against_its_loop():
    asked = []
    watch = LoopWatch(asked.append)
    watch.blocked(100.0)
    watch.forgive(160.0)
    assert watch.blocked(160.5) == 0.5
    assert watch.blocked(162.0) == 2.0
    watch.forgive(170.0)
    asked.pop()()
    assert watch.blocked(171.0) == 0.0


def test_a_pulse_misses_what_its_thread_neither_computed_nor_waited_for():
    pulse = Pulse(10.0)
    assert pulse.beat(10.75) == 0.0
    assert pulse.beat(12.75, waited=1.5) == 0.0
    assert pulse.beat(16.75, waited=1.5) == 2.5
    assert pulse.beat(17.0) == 0.0, "told once"
    assert pulse.beat(17.25, waited=5.0) == 0.0, "it waited less than it might have"
    assert pulse.beat(18.25) == STALL_AFTER


def test_the_stack_is_that_of_the_thread_named():
    assert "test_the_stack_is_that_of_the_thread_named" in stack_of(threading.get_ident())
    assert stack_of(-1) == ""
