"""The Kubernetes example of docs/scaling.md: valid YAML, and the keys and fields that fit this project's queues."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from orchestra import App
from orchestra._keys import QueueKeys
from orchestra.tasks import LANES, TaskPriority

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
SCALED, AUTHENTICATION = yaml.safe_load_all(re.search(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1])
TRIGGERS = SCALED["spec"]["triggers"]


def test_each_lane_has_a_trigger_of_its_own():
    assert [trigger["metadata"]["stream"] for trigger in TRIGGERS] == list(QueueKeys("shop").lanes)
    assert [trigger["name"] for trigger in TRIGGERS] == [lane.name.lower() for lane in TaskPriority]
    assert {trigger["type"] for trigger in TRIGGERS} == {"redis-streams"}


def test_the_formula_adds_all_lanes_up():
    modifiers = SCALED["spec"]["advanced"]["scalingModifiers"]
    assert modifiers["formula"].split(" + ") == [trigger["name"] for trigger in TRIGGERS]
    assert modifiers["metricType"] == "AverageValue"


def test_fields_are_strings_and_measure_the_length():
    for trigger in TRIGGERS:
        assert all(isinstance(value, str) for value in trigger["metadata"].values()), (
            "the custom resource takes strings"
        )
        assert set(trigger["metadata"]) == {"address", "stream", "streamLength"}, "with a consumerGroup it is no length"
        assert trigger["authenticationRef"]["name"] == AUTHENTICATION["metadata"]["name"]
    assert isinstance(SCALED["spec"]["advanced"]["scalingModifiers"]["target"], str)
    assert SCALED["apiVersion"] == AUTHENTICATION["apiVersion"] == "keda.sh/v1alpha1"
    assert {secret["parameter"] for secret in AUTHENTICATION["spec"]["secretTargetRef"]} == {"username", "password"}


def test_a_worker_is_always_there():
    assert SCALED["spec"]["minReplicaCount"] >= 1
    assert SCALED["spec"]["maxReplicaCount"] > SCALED["spec"]["minReplicaCount"]


@pytest.mark.parametrize("lane", range(LANES))
async def test_the_length_of_a_stream_is_what_waits_and_runs(redis_server, redis_url, lane):
    """What the page says of the fields, on the server: XLEN counts no settled task; a hole makes the lag unknown."""
    stream = QueueKeys("shop").lanes[lane].encode()

    def length() -> int:
        return int(redis_server.ask(b"XLEN " + stream).strip(b":\r\n"))

    def lag() -> bytes:
        return redis_server.ask(b"XINFO GROUPS " + stream).rpartition(b"lag\r\n")[2].strip()

    async with App("shop", redis_url) as app:
        assert length() == 0
        for number in range(5):
            await app.queue.produce({"id": f"t{number}", "type": "t", "priority": lane})
        assert (length(), redis_server.ask(b"XINFO GROUPS " + stream)) == (5, b"*0\r\n"), "no group before a worker"
        held = await app.queue.read("worker-1", 2, 1000)
        assert (length(), lag()) == (5, b":3")
        await app.queue.acknowledge(held[0].message_id)
        assert (length(), lag()) == (4, b":3")
        await app.queue.cancel("t4")
        assert (length(), lag()) == (3, b"$-1")
