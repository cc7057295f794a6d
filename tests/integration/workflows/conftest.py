"""A queue and an engine, on Redis and in this process, whose sweeps send at once what has not begun."""

from __future__ import annotations

import pytest

from orchestra._workflow import redis_store, twin
from orchestra._workflow.driver import Driver
from orchestra.workflow import WorkflowEngine


@pytest.fixture
def queue(place):
    return place[0]


@pytest.fixture
def engine(place):
    return WorkflowEngine(place[1])


@pytest.fixture
def driver(engine, queue):
    return Driver(engine, queue)


@pytest.fixture(autouse=True)
def grace(monkeypatch):
    """What has not begun is sent again by the next sweep."""
    monkeypatch.setattr(redis_store, "GRACE_MS", 0)
    monkeypatch.setattr(twin, "GRACE_MS", 0)
