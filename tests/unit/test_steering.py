"""What ``orchestra run`` counts and shows of limits, balancing and breakers; and limits of an App's agent by key."""

from __future__ import annotations

import io
import json
import time

import pytest
from rich.console import Console

from orchestra import App, BaseTask, CircuitBreakerConfig, RateLimitConfig, telemetry
from orchestra._jobs.tally import RUN_TIMES, RunTimes, Tally, watch
from orchestra.circuit_breaker import CircuitBreaker
from orchestra.cli._steering import steering
from orchestra.errors import ConfigurationError


def told(tally: Tally, *events: tuple) -> None:
    """Take events as they come from another process."""
    for event in events:
        tally.take(tuple(json.loads(json.dumps(event))))


def ran(task_id: str, outcome: str = "completed", seconds: float = 0.1, by: str = "w", kind: str = "t") -> list[tuple]:
    return [("started", task_id, kind, by), ("settled", task_id, kind, outcome, seconds, by)]


def shown(app: App, tally: Tally) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(steering(app, tally))
    return out.getvalue()


async def nothing() -> None:
    """An agent."""


async def nothing_else() -> None:
    """Another one."""


def test_run_times():
    times = RunTimes()
    assert (times.mean, times.percentile(0.5), times.count) == (None, None, 0)
    for seconds in range(1, 101):
        times.add(float(seconds))
    assert (times.mean, times.percentile(0.5), times.percentile(0.95), times.percentile(1.0)) == (50.5, 51, 96, 100)
    for _ in range(RUN_TIMES):
        times.add(7.0)
    assert (times.count, times.percentile(0.0), times.percentile(1.0)) == (RUN_TIMES + 100, 7.0, 7.0)


def test_counts():
    tally = Tally()
    told(tally, *ran("a"), *ran("b", "retry"), *ran("b", "dead"), ("started", "c", "t", "other"))
    told(tally, ("settled", "d", "t", "throttled", 0.001, ""), ("settled", "d", "t", "throttled", 0.001, ""))
    counts = tally.of("t")
    assert (counts.running, counts.retries, counts.throttled, counts.times.count) == (1, 1, 2, 1)
    assert (counts.replicas["w"].failed, counts.replicas["w"].times.count) == (2, 1)
    assert tally.throttled == {"d"}
    assert tally.running == tally.running_of("t") == 1
    assert tally.running_of("unknown") == 0
    told(tally, ("started", "d", "t", "w"))
    assert tally.throttled == set()


def test_outages_of_a_breaker_in_two_processes():
    tally = Tally()
    for pid, at in ((1, 10.0), (2, 11.0)):
        told(
            tally,
            ("breaker", "t/w", "closed", "open", at, pid),
            ("breaker", "t/w", "open", "half_open", at + 1, pid),
            ("breaker", "t/w", "half_open", "open", at + 1.1, pid),
        )
    told(tally, ("breaker", "t/w", "half_open", "closed", 13.0, 1), ("breaker", "t/v", "closed", "open", 1.0, 1))
    assert [(outage.began, outage.ended) for outage in tally.outages("t/w")] == [(10.0, 13.0), (11.0, None)]
    assert tally.outages("t/u") == []


def test_what_is_watched():
    events = []
    detach = watch(events.append)
    try:
        facts = {"queue": "q", "task_id": "a", "type": "t", "attempt": 1}
        ended = {**facts, "error": None, "retry_in_s": None, "dead_reason": None}
        telemetry.emit("task.settled", {"run_s": 0.1}, {**ended, "outcome": "throttled", "retry_in_s": 1.0})
        telemetry.emit("task.started", {}, {**facts, "worker_id": "w"})
        telemetry.emit("task.settled", {"run_s": 0.2}, {**ended, "outcome": "failed"})
        telemetry.emit("task.settled", {"run_s": 0.2}, {**ended, "outcome": "timed_out", "retry_in_s": 1.0})
        breaker = CircuitBreaker("watched", CircuitBreakerConfig(failure_threshold=1))
        breaker.record_failure()
    finally:
        detach()
    breaker.reset()
    assert events[:4] == [
        ("settled", "a", "t", "throttled", 0.1, ""),
        ("started", "a", "t", "w"),
        ("settled", "a", "t", "dead", 0.2, "w"),
        ("settled", "a", "t", "retry", 0.2, ""),
    ]
    assert events[4][:4] == ("breaker", "watched", "closed", "open")
    assert events[4][4] <= time.monotonic()
    assert len(events) == 5


def test_nothing_is_shown_where_nothing_is_steered():
    app = App("plain", "memory:")
    app.agent("t")(nothing)
    tally = Tally()
    assert steering(app, tally) is None
    told(tally, *ran("a", by="t"))
    assert steering(app, tally) is None
    limited = App("limited", "memory:")
    limited.agent("t", limit=RateLimitConfig(rate=5, burst=2, period=60.0))(nothing)
    assert steering(limited, Tally()) is None  # a run that had nothing left to do
    assert "limit of t  5 per 60 s, 2 at once\n" in shown(limited, tally)


def test_shares_limit_and_breaker_are_shown():
    app = App("shown", "memory:")
    breaker = CircuitBreakerConfig(failure_threshold=1)
    app.agent("t", worker_id="v", weight=3, limit=RateLimitConfig(rate=5, burst=2), key="{tenant}")(nothing)
    app.agent("t", worker_id="w", weight=1, breaker=breaker)(nothing_else)
    tally = Tally()
    for number in range(3):
        told(tally, *ran(f"v{number}", by="v", seconds=0.25))
    told(tally, *ran("w", by="w", seconds=2.0), *ran("x", "retry", by="w"))
    told(tally, ("settled", "y", "t", "throttled", 0.0, ""))
    assert "limit of t      5 per s, 2 at once, for each key\nbreaker of t/w  stayed closed\n" in shown(app, tally)
    told(tally, ("breaker", "t/w", "closed", "open", tally.began + 1.0, 1))
    assert "breaker of t/w  opened at 1.0 s, still open" in shown(app, tally)
    told(tally, ("breaker", "t/w", "half_open", "closed", tally.began + 3.5, 1))
    assert "opened at 1.0 s, recovered after 2.5 s" in shown(app, tally)
    assert [line.split() for line in shown(app, tally).splitlines()[1:4]] == [
        ["agent", "replica", "tasks", "share", "weight", "p50", "p95", "failed", "throttled"],
        ["t", "v", "3", "75.0%", "75.0%", "250", "ms", "250", "ms", "1"],
        ["w", "1", "25.0%", "25.0%", "2", "s", "2", "s", "1"],
    ]
    told(tally, ("breaker", "t/w", "closed", "open", tally.began + 5.0, 1))
    assert "opened 2 times, at last at 5.0 s, still open" in shown(app, tally)


def test_the_limit_of_an_agent_is_counted_for_its_key():
    app = App("keyed", "memory:")
    app.agent("t", limit=RateLimitConfig(rate=5, burst=2), key="{tenant}", cost=2)(nothing)
    (use,) = app.agents.get("t").options.uses
    task = BaseTask(id="a", type="t", input={"tenant": "acme"})
    assert (use.key_for(task), use.cost_for(task), use.limiter.name) == ("acme", 2, "keyed.t")
    with pytest.raises(ConfigurationError, match="tenant"):
        use.key_for(BaseTask(id="a", type="t", input={}))


def test_a_limiter_without_keys_is_refused_beside_a_key():
    class Own:
        interval = 1.0

        async def try_acquire(self, priority: int = 0, cost: int = 1) -> None:
            """Never asked."""

    with pytest.raises(ConfigurationError, match=r"LimitUse\.key needs a limiter that has keys"):
        App("keyed", "memory:").agent("t", limit=Own(), key="{tenant}")(nothing)
