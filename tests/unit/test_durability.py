"""The words of durability, how long a call may be repeated, and how soon a full queue may have room."""

from __future__ import annotations

import pytest

from orchestra import Durability
from orchestra._durability import ACCEPTED
from orchestra._queue.produce import FULL_RETRY_AFTER, RETRY_AFTER, DrainRate
from orchestra._redis.server_settings import faults
from orchestra.app import App
from orchestra.cli import _checks
from orchestra.errors import ConfigurationError


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("accepted", ACCEPTED),
        ("replicated", Durability.replicated(1)),
        ("replicated(2)", Durability.replicated(2)),
        (" Replicated( 2 , timeout=0.5 ) ", Durability.replicated(2, 0.5)),
        ("replicated(timeout=3, replicas=2)", Durability.replicated(2, 3.0)),
        ("fsynced", Durability.fsynced()),
        ("fsynced(timeout=2)", Durability.fsynced(2.0)),
    ],
)
def test_texts(text, means):
    parsed = Durability.parse(text)
    assert parsed == means
    assert Durability.parse(str(parsed)) == parsed
    assert Durability.parse(parsed) is parsed
    assert parsed.wanted == {"accepted": 0, "fsynced": 1}.get(parsed.mode, parsed.replicas)


@pytest.mark.parametrize(
    "text",
    [
        "", "sure", "accepted(1)", "accepted()", "replicated(0)", "replicated(101)", "replicated(x)", "replicated(1,2)",
        "replicated(1.5)", "replicated(2", "fsynced(3)", "fsynced(timeout=0)", "fsynced(timeout=nan)",
        "fsynced(timeout=1,timeout=2)", "replicated(-1)", "replicated(1,wait=3)", None, 3,
    ],
)  # fmt: skip
def test_bad_texts_are_refused(text):
    with pytest.raises(ConfigurationError, match="durability"):
        Durability.parse(text)


def test_values_are_checked():
    for values in (("fsynced", 1), ("replicated", 0), ("replicated", True), ("accepted", 0, 0.0), ("other",)):
        with pytest.raises(ConfigurationError, match="durability"):
            Durability(*values)


def test_an_app_takes_it_from_its_argument_the_environment_or_bind(monkeypatch):
    assert App("a", "redis://h").settings["durability"] == "accepted"
    monkeypatch.setenv("ORCHESTRA_DURABILITY", "replicated(2)")
    assert App("a", "redis://h").settings["durability"] == "replicated(2, timeout=5)"
    assert App("a", "redis://h", durability="fsynced").settings["durability"] == "fsynced(timeout=5)"
    assert App("a").bind(durability=Durability.fsynced(2)).settings["durability"] == "fsynced(timeout=2)"
    with pytest.raises(ConfigurationError, match="durability"):
        App("a", durability="often")
    monkeypatch.setenv("ORCHESTRA_DURABILITY", "never")
    with pytest.raises(ConfigurationError, match="never"):
        App("a")


async def test_memory_promises_nothing():
    with pytest.raises(ConfigurationError, match="memory: keeps nothing"):
        _ = App("a", "memory:", durability="fsynced").queue


def test_a_full_queue_is_asked_again_when_it_may_have_room():
    """H13: the time comes from the rate at which tasks ended between two refusals."""
    drain = DrainRate()
    assert drain.retry_after(10.0, 500, 3) == FULL_RETRY_AFTER, "nothing is known yet"
    assert drain.retry_after(12.0, 700, 50) == pytest.approx(0.5), "100 a second"
    assert drain.retry_after(13.0, 700, 50) == FULL_RETRY_AFTER, "nothing ended since"
    assert drain.retry_after(14.0, 1_000_700, 1) == RETRY_AFTER[0]
    assert drain.retry_after(1014.0, 1_000_701, 1000) == RETRY_AFTER[1]
    assert drain.retry_after(1014.0, 1_000_702, 1) == FULL_RETRY_AFTER, "no time has passed"


GOOD = {"role": "master", "maxmemory_policy": "noeviction", "aof_enabled": 1, "min_slaves_good_slaves": 1}


@pytest.mark.parametrize(
    ("change", "setting", "refused", "loud"),
    [
        ({"maxmemory_policy": "allkeys-lru"}, "maxmemory-policy", True, True),
        ({"maxmemory_policy": "volatile-ttl"}, "maxmemory-policy", True, True),
        ({"aof_enabled": 0}, "appendonly", True, False),
        ({"role": "slave"}, "role", True, True),
        ({"min_slaves_good_slaves": None}, "min-replicas-to-write", False, True),
    ],
)
def test_faults_of_a_server(change, setting, refused, loud):
    """B9, B10: every setting that may cost tasks is a fault that says how to change it."""
    assert faults(GOOD, sentinel=True) == []
    assert faults({}, sentinel=True) == [], "what may not be seen is no fault"
    changed = {key: value for key, value in (GOOD | change).items() if value is not None}
    (fault,) = faults(changed, sentinel=True)
    assert (fault.setting, fault.refused, fault.loud) == (setting, refused, loud)
    assert fault.value in str(fault)
    assert fault.expected in str(fault)
    rows = [one.level for one in _checks.check_settings(changed, sentinel=True) if one.level != "ok"]
    assert rows == ([] if setting == "appendonly" else ["problem" if refused else "warning"])


def test_ids_far_in_the_future_are_findings():
    """B21: a lane whose last id is far ahead of the clock, or the last there is."""
    now = 1_700_000_000.0
    assert _checks.check_stream_id("jobs", 2, "1700000000000-5", now) is None
    assert _checks.check_stream_id("jobs", 2, "0-0", now) is None
    ahead = _checks.check_stream_id("jobs", 2, "1700009000000-0", now)
    assert (ahead.level, "2.5 h" in ahead.value) == ("warning", True)
    used_up = _checks.check_stream_id("jobs", 0, "18446744073709551615-18446744073709551615", now)
    assert used_up.level == "problem"
    assert "DEL" in used_up.advice
