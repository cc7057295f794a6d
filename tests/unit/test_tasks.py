"""The words: their values are on the wire and in user code, so they are pinned here."""

from __future__ import annotations

import dataclasses

import pytest

from orchestra.errors import ConfigurationError
from orchestra.tasks import (
    LANES,
    BaseTask,
    DeadLetter,
    Outcome,
    Retry,
    TaskPriority,
    TaskState,
    check_ident,
    check_name,
    require_int,
    require_number,
)


def test_priorities_are_lanes():
    assert [(p.name, p.value) for p in TaskPriority] == [("CRITICAL", 0), ("HIGH", 1), ("NORMAL", 2), ("LOW", 3)]
    assert LANES == 4


def test_states_and_outcomes_are_closed_sets():
    assert {state.value for state in TaskState} == {"pending", "running", "completed", "failed", "cancelled"}
    outcomes = {"completed", "failed", "timed_out", "throttled", "cancelled", "released", "crashed"}
    assert {outcome.value for outcome in Outcome} == outcomes


def test_a_task_needs_an_id_and_a_type_only():
    task = BaseTask("t", "work")
    assert (task.input, task.priority, task.attempt, task.metadata, task.extra) == (None, 2, 1, {}, {})
    assert BaseTask("a", "x").metadata is not BaseTask("b", "x").metadata
    with pytest.raises(AttributeError):
        task.colour = "green"


def test_a_dead_letter_has_no_bytes_unless_it_is_unreadable():
    assert DeadLetter("1-1", {}, {}, "failed", 1, 0.0).raw == b""


def test_retry_is_frozen_and_keyword_only():
    retry = Retry()
    assert (retry.max_retries, retry.base, retry.factor, retry.max_delay, retry.jitter) == (3, 1.0, 2.0, 300.0, True)
    with pytest.raises(dataclasses.FrozenInstanceError):
        retry.base = 2.0
    with pytest.raises(TypeError):
        Retry(3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_retries", -1),
        ("max_retries", 1001),
        ("max_retries", 1.0),
        ("max_retries", True),
        ("base", 0),
        ("base", -1.0),
        ("base", float("nan")),
        ("base", float("inf")),
        ("base", "1"),
        ("factor", 0.99),
        ("factor", 101),
        ("max_delay", 0),
        ("max_delay", 31 * 86_400),
        ("max_delay", None),
    ],
)
def test_retry_names_what_is_wrong(field, value):
    with pytest.raises(ConfigurationError, match=rf"Retry\.{field} must be") as caught:
        Retry(**{field: value})
    assert caught.value.field == f"Retry.{field}"
    assert caught.value.value is value
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize("field", ["base", "max_delay"])
def test_durations_name_their_unit(field):
    with pytest.raises(ConfigurationError, match="number of seconds, above 0"):
        Retry(**{field: -5})


@pytest.mark.parametrize("name", ["a", "A-z_0.9", "x" * 64])
def test_names_that_may_be_keys(name):
    assert check_name("queue name", name) == name


@pytest.mark.parametrize("name", ["", "x" * 65, "a b", "a{b}", "a:b", "ä", "a\n", None, 5, b"a"])
def test_names_that_may_not_be_keys(name):
    with pytest.raises(ConfigurationError, match="queue name must be 1 to 64 characters"):
        check_name("queue name", name)


@pytest.mark.parametrize("ident", ["a", "a:b/c{d}~!", "x" * 128])
def test_idents(ident):
    assert check_ident("task id", ident) == ident


@pytest.mark.parametrize("ident", ["", "x" * 129, "a b", "a\x7f", "a\n", "é", None, 1])
def test_what_is_no_ident(ident):
    with pytest.raises(ConfigurationError, match="task id must be 1 to 128"):
        check_ident("task id", ident)


@pytest.mark.parametrize(("value", "good"), [(1, True), (5, True), (0, False), (6, False), (True, False), (2.0, False)])
def test_require_int(value, good):
    if good:
        assert require_int("n", value, 1, 5) is None
    else:
        with pytest.raises(ConfigurationError, match="n must be a whole number of ms from 1 to 5, got"):
            require_int("n", value, 1, 5, unit="ms")


@pytest.mark.parametrize(
    ("value", "exclusive", "good"), [(0, False, True), (0, True, False), (1, True, True), (1.5, False, False)]
)
def test_require_number(value, exclusive, good):
    if good:
        assert require_number("x", value, 0, 1, exclusive=exclusive) is None
    else:
        with pytest.raises(ConfigurationError, match="x must be a number"):
            require_number("x", value, 0, 1, exclusive=exclusive)
