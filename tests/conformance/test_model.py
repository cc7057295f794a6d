"""The product's queue on a real server beside the model of its protocol, driven by Hypothesis, compared after every step.

Three queue objects with a consumer each share one queue; every rule is one call of the product, or something a process, a
stranger or time does to it. Leases and due times are aged in Redis, so nothing sleeps. After every rule the whole keyspace
must be what :mod:`tests.reference.queue_model` says: entries and their fields in order, pending rows with holder, count
and time, delayed and dead tasks, records, marks, counters, no other key, a time to live exactly where one belongs.

Scripts are atomic, so rules of several consumers in any order are all interleavings there are. ``ORCHESTRA_MODEL_EXAMPLES``
sets how many examples run (150 without it). The mutants at the end show what it finds.
"""

from __future__ import annotations

import hashlib
import os

import pytest
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.stateful import run_state_machine_as_test

from orchestra import _identity
from orchestra._queue import upkeep
from orchestra._scripts import script
from orchestra.errors import StoreError
from tests.conformance._actors import PROMOTE, SCAN, Server
from tests.conformance._machine import QueueMachine

EXAMPLES = int(os.environ.get("ORCHESTRA_MODEL_EXAMPLES", "150"))
STEPS = 40

PROFILE = settings(
    max_examples=EXAMPLES,
    stateful_step_count=STEPS,
    deadline=None,
    derandomize="ORCHESTRA_MODEL_EXAMPLES" not in os.environ,
    database=None,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def everything_adds_up():
    """In place of the one in conftest.py: the machine looks after every step."""


@pytest.fixture
def machine(redis_server, redis_url, monkeypatch):
    """The machine's class, on the session's server."""
    monkeypatch.setattr(_identity, "is_dead", _identity.is_dead)
    monkeypatch.setattr(upkeep, "SCAN_ROWS", SCAN)
    monkeypatch.setattr(upkeep, "PROMOTE_BATCH", PROMOTE)
    shared = Server(redis_server)
    monkeypatch.setattr(QueueMachine, "shared", shared, raising=False)
    yield QueueMachine
    shared.close()


@pytest.mark.slow
def test_the_product_and_the_model_never_differ(machine):
    """H1 H2 H4 H11 H12 C8 C9 E1 E3 E4 G1: every task is in exactly one place, whatever happens in whatever order."""
    run_state_machine_as_test(machine, settings=PROFILE)


MUTANTS = {
    "complete ignores who holds it": ("complete", "if count ~= expected then", "if false then"),
    "complete trusts the whole range": ("complete", " or row[2] ~= consumer or row[4] ~= 1 then", " then"),
    "complete does not delete": ("complete", "    redis.call('XDEL', stream, unpack(ids, from, to))\n", ""),
    "complete_result does not count": ("complete_result", "'completed', firsts)", "'completed', 0)"),
    "retry drops what was handed out again": ("retry", "then row = nil end -- ours", "then end -- ours"),
    "retry does not acknowledge": ("retry", "  redis.call('XACK', stream, group, unpack(gone, from, to))\n", ""),
    "retry ignores cancel marks": ("retry", "  if mark and ", "  if false and "),
    "retry loses the place of who was throttled": ("retry", "packed[6] = 1", "packed[6] = nil"),
    "promote loses the place of who was throttled": ("promote", "(front and 5 or 1)", "1"),
    "take forgets what stands before a lane": ("take", "{first, (first + 4) % 8}", "{first % 4}"),
    "retry forgets earlier deliveries": ("retry", "local before = f.d + row[4]", "local before = row[4]"),
    "dead_letter leaves a record for ever": ("dead_letter", ", 'PX', ARGV[i + 6])", ")"),
    "replay keeps the generation": ("replay", "(tonumber(f.g) or 0) + 1", "(tonumber(f.g) or 0)"),
    "promote is early": ("promote", "'-inf', now, 'LIMIT'", "'-inf', '+inf', 'LIMIT'"),
    "promote leaves the body": ("promote", "  redis.call('HDEL', KEYS[10], member)\n", ""),
    "reclaim does not raise the count": ("reclaim", "'RETRYCOUNT', count + 1", "'RETRYCOUNT', count"),
    "reclaim keeps no cursor": ("reclaim", "redis.call('HSET', KEYS[2], field, last)", "local _ = last"),
    "reclaim takes live leases": ("reclaim", "elseif idle >= lease then", "elseif true then"),
    "reconcile keeps the fence": ("reconcile", "'RETRYCOUNT', count + 1", "'RETRYCOUNT', count"),
    "renew raises the count": ("renew", "0, id, 'JUSTID')", "0, id)"),
    "renew steals": ("renew", "1, ARGV[2])[1]\n  if row and row[4] == tonumber(ARGV[i + 1]) then", "1)[1]\n  if row then"),
    "retire drops what is pending": ("retire", "if #rows == 0 and not rows.err", "if not rows.err"),
    "produce_many forgets its records": ("produce_many", "{token, record}", "{token .. '?', record}"),
    "produce_many forgets its ids": ("produce_many", "ARGV[ids + added_of[j]],", "ARGV[ids + added_of[j]] .. '?',"),
    "produce_many looks into no bucket": (
        "produce_many",
        "  elseif redis.call('EXISTS', bucket) == 1 then",
        "  elseif false then",
    ),
    "produce_many mixes up ids": ("produce_many", "added_of[n] = id, id, i", "added_of[n] = id, id, n"),
    "produce_many does not count repeats": (
        "produce_many",
        "if repeats > 0 then redis.call('HINCRBY'",
        "if false then redis.call('HINCRBY'",
    ),
    "produce forgets its ids": ("produce", "if #fresh > 0 then redis.call('PEXPIREAT', dedup, dedup_end) end", "redis.call('DEL', dedup)"),
    "produce forgets its tokens": ("produce", "  redis.call('HSET', tokens, token,", "  redis.call('HSET', tokens, token .. '?',"),
    "produce_one forgets its ids": ("produce_one", "redis.call('HSET', bucket, name,", "redis.call('HSET', bucket, name .. '?',"),
    "produce_one looks into one bucket": ("produce_one", "  known = redis.call('HGET', before, name)", "  known = false"),
    "produce_one leaves a bucket for ever": ("produce_one", "redis.call('PEXPIREAT', bucket, (k + 2) * window)\nredis.call('HINCRBY'", "redis.call('HINCRBY'"),
    "produce_one does not count a repeat": ("produce_one", "  redis.call('HINCRBY', KEYS[4], 'duplicates', 1)\n", ""),
    "take hands out too much": ("take", "'COUNT', most,", "'COUNT', most + 1,"),
    "cancel removes what is in flight": ("cancel", "in_flight = rows[1] ~= nil", "in_flight = false"),
    "cancel leaves no record": ("cancel", "      record(frame)\n", ""),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_of_a_script_is_found(mutant, machine):
    """The machine bites: with one line of one script changed, it fails, mostly within the examples of one run."""
    name, old, new = MUTANTS[mutant]
    lua = script(name)
    text, sha = lua.text, lua.sha
    assert text.count(old) == 1, "the script has changed: choose another mutant"
    lua.text = text.replace(old, new)
    lua.sha = hashlib.sha1(lua.text.encode(), usedforsecurity=False).hexdigest()
    quick = settings(PROFILE, max_examples=10 * EXAMPLES, phases=(Phase.generate,), verbosity=Verbosity.quiet)
    try:
        with pytest.raises((AssertionError, StoreError)):
            run_state_machine_as_test(machine, settings=quick)
    finally:
        lua.text, lua.sha = text, sha
