"""Telemetry: the catalogue, attaching, a handler that fails, and what is written to the log."""

from __future__ import annotations

import json
import logging

import pytest

from orchestra import telemetry


@pytest.fixture(autouse=True)
def nobody_listens(monkeypatch):
    monkeypatch.setattr(telemetry, "_handlers", {})


def collect(events):
    def handler(name, measurements, metadata):
        events.append((name, dict(measurements), dict(metadata)))

    return handler


def test_every_event_is_documented():
    for name, event in telemetry.EVENTS.items():
        area, _, what = name.partition(".")
        assert area
        assert what
        assert event.doc
        assert len({*event.measurements, *event.metadata}) == len(event.measurements) + len(event.metadata)
    assert set(telemetry._LEVELS) <= set(telemetry.EVENTS)


def test_attach_and_detach():
    events = []
    detach = telemetry.attach(collect(events), "task.started", "task.settled")
    assert telemetry.wanted("task.started")
    assert not telemetry.wanted("queue.produced")
    telemetry.emit("task.started", {}, {"task_id": "t"})
    telemetry.emit("queue.produced", {"count": 1}, {})
    detach()
    detach()
    telemetry.emit("task.started", {}, {})
    assert events == [("task.started", {}, {"task_id": "t"})]
    assert not telemetry.wanted("task.started")


def test_without_names_a_handler_gets_everything():
    events = []
    telemetry.attach(collect(events))
    for name in telemetry.EVENTS:
        telemetry.emit(name, {}, {})
    assert [name for name, _, _ in events] == list(telemetry.EVENTS)


def test_several_handlers_in_order_of_attachment():
    events = []
    telemetry.attach(lambda *_: events.append("first"), "task.started")
    detach = telemetry.attach(lambda *_: events.append("second"), "task.started")
    telemetry.emit("task.started", {}, {})
    detach()
    telemetry.emit("task.started", {}, {})
    assert events == ["first", "second", "first"]


def test_an_unknown_event_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=r"unknown event 'task.exploded'.*task.settled"):
        telemetry.attach(lambda *_: None, "task.started", "task.exploded")
    assert not telemetry.wanted("task.started"), "nothing is attached when a name is wrong"


def test_a_handler_that_raises_is_logged_and_detached_alone(caplog):
    events = []

    def bad(*_):
        raise RuntimeError("handler is broken")

    telemetry.attach(bad, "task.started", "task.settled")
    telemetry.attach(collect(events), "task.started")
    telemetry.emit("task.started", {}, {})
    telemetry.emit("task.started", {}, {})
    assert len(events) == 2
    assert len([r for r in caplog.records if "is detached" in r.message]) == 1
    assert caplog.records[0].exc_info[1].args == ("handler is broken",)
    telemetry.emit("task.settled", {}, {})
    assert not telemetry.wanted("task.settled")


def test_a_handler_may_detach_itself():
    events = []

    def once(name, *_):
        events.append(name)
        detach()

    detach = telemetry.attach(once, "task.started")
    telemetry.emit("task.started", {}, {})
    telemetry.emit("task.started", {}, {})
    assert events == ["task.started"]


def test_the_default_logger_writes_facts(caplog):
    detach = telemetry.attach_default_logger()
    with caplog.at_level(logging.DEBUG, logger="orchestra.events"):
        telemetry.emit("queue.refused", {"count": 3, "limit": 10}, {"queue": "tasks"})
        telemetry.emit("dispatcher.stopped", {"duration_s": 1.23456}, {"queue": None})
        telemetry.emit("task.started", {}, {"queue": "tasks"})
    detach()
    refused, stopped = caplog.records
    assert (refused.levelno, refused.message) == (logging.WARNING, "queue.refused count=3 limit=10 queue=tasks")
    assert refused.event == "queue.refused"
    assert refused.facts == {"count": 3, "limit": 10, "queue": "tasks"}
    assert (stopped.levelno, stopped.message) == (logging.INFO, "dispatcher.stopped duration_s=1.23")
    assert not telemetry.wanted("queue.refused")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("plain", "plain"),
        ("two words", "'two words'"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("a\nb", "a\\x0ab"),
        ("x" * 400, "x" * 300),
    ],
)
def test_log_lines_carry_no_terminal_escapes(caplog, value, text):
    with caplog.at_level(logging.DEBUG, logger="orchestra.events"):
        telemetry.log_event("task.stuck", {}, {"type": value})
    assert caplog.records[0].message == f"task.stuck type={text}"


def test_json_lines(caplog):
    formatter = telemetry.JsonFormatter()
    with caplog.at_level(logging.DEBUG, logger="orchestra.events"):
        telemetry.log_event("queue.refused", {"count": 3}, {"queue": "tasks", "odd": object})
    line = json.loads(formatter.format(caplog.records[0]))
    assert (line["level"], line["logger"], line["count"], line["queue"]) == ("warning", "orchestra.events", 3, "tasks")
    assert line["time"].endswith("Z")
    assert line["time"][10] == "T"
    try:
        raise ValueError("boom")
    except ValueError:
        logging.getLogger("orchestra.x").exception("it\nfailed")
    text = formatter.format(caplog.records[1])
    assert "\n" not in text
    assert "ValueError: boom" in json.loads(text)["traceback"]
