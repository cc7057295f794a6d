"""The error tree: what is documented is what exists, and codes never change."""

from __future__ import annotations

import inspect
import re

import pytest

from orchestra import errors

CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if inspect.isclass(value) and issubclass(value, errors.OrchestraError) and value.__module__ == errors.__name__
}

CODES = {
    "OrchestraError": "error",
    "ConfigurationError": "configuration",
    "InvalidTaskError": "invalid_task",
    "InvalidTaskTypeError": "invalid_task_type",
    "TaskTooLargeError": "task_too_large",
    "CorruptEntryError": "corrupt_entry",
    "MissingDependencyError": "missing_dependency",
    "StoreError": "store",
    "StoreUnavailableError": "store_unavailable",
    "ForkedProcessError": "forked_process",
    "StoreAuthError": "store_auth",
    "StoreFullError": "store_full",
    "StreamExhaustedError": "stream_exhausted",
    "DurabilityError": "durability",
    "UnsafeServerError": "unsafe_server",
    "EmbeddedServerError": "embedded_server",
    "QueueFullError": "queue_full",
    "BackpressureRejectedError": "backpressure_rejected",
    "CircuitOpenError": "circuit_open",
    "WorkerPoolError": "worker_pool",
    "LockError": "lock",
    "UnknownAgentError": "unknown_agent",
    "TaskFailedError": "task_failed",
    "TaskCancelledError": "task_cancelled",
    "ResultUnavailableError": "result_unavailable",
    "WorkflowError": "workflow",
    "WrongLoopError": "wrong_loop",
    "InternalError": "internal",
    "RetryLater": "retry_later",
    "Throttled": "throttled",
    "Reject": "reject",
    "WaitForSignal": "wait_for_signal",
    "BudgetExceededError": "budget_exceeded",
    "ToolRepeatError": "tool_repeat",
}
"""Published codes. A line may be added; none may ever change or go."""

BUILTINS = {
    "ConfigurationError": ValueError,
    "InvalidTaskError": ValueError,
    "InvalidTaskTypeError": TypeError,
    "MissingDependencyError": ImportError,
    "StoreUnavailableError": ConnectionError,
    "StoreAuthError": PermissionError,
    "UnknownAgentError": LookupError,
    "WrongLoopError": RuntimeError,
}


def test_codes_are_unique():
    codes = [cls.code for cls in CLASSES.values()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("name", CODES)
def test_published_codes_are_kept(name):
    assert CLASSES[name].code == CODES[name]


def test_every_class_has_a_published_code():
    assert set(CLASSES) == set(CODES)


@pytest.mark.parametrize("name", CLASSES)
def test_the_tree_in_the_docstring_names_every_class(name):
    assert re.search(rf"^ *[│├└─ ]*{name}\b", errors.__doc__, re.MULTILINE), f"{name} is missing in the tree"


@pytest.mark.parametrize("name", BUILTINS)
def test_builtin_bases_are_as_documented(name):
    assert issubclass(CLASSES[name], BUILTINS[name])
    line = next(line for line in errors.__doc__.splitlines() if re.search(rf"\b{name}\b", line))
    assert f"(also {BUILTINS[name].__name__})" in line


def test_depth_in_the_tree_is_depth_of_inheritance():
    for line in errors.__doc__.splitlines():
        found = re.match(r"^    (?P<lead>[│ ]*)[├└]── (?P<name>\w+)", line)
        if found:
            parents = [c for c in CLASSES[found["name"]].__mro__[1:] if c in CLASSES.values()]
            assert len(parents) == 1 + len(found["lead"]) // 4, found["name"]


def test_facts_are_attributes():
    assert errors.ConfigurationError("m", field="a.b", value=3).field == "a.b"
    assert errors.InvalidTaskError("m", path="input.x").path == "input.x"
    full = errors.QueueFullError("m", retry_after=1.5, limit=7)
    assert (full.retry_after, full.limit, str(full)) == (1.5, 7, "m")
    large = errors.TaskTooLargeError("m", size=5, limit=4)
    assert (large.size, large.limit, large.path) == (5, 4, "")
    rejected = errors.BackpressureRejectedError("m", retry_after=0.5, limiter="api")
    assert (rejected.retry_after, rejected.limiter) == (0.5, "api")
    failed = errors.TaskFailedError("m", task_id="t", error_type="ValueError", reason="failed", attempts=3)
    assert (failed.task_id, failed.error_type, failed.reason, failed.attempts) == ("t", "ValueError", "failed", 3)
    assert errors.UnknownAgentError("m", task_type="x").task_type == "x"
    assert errors.MissingDependencyError("m", extra="cli").extra == "cli"
    assert errors.WorkflowError("m", faults=("a", "b")).faults == ("a", "b")


def test_control_flow_says_what_it_asks_for():
    again = errors.RetryLater(2.5)
    assert (again.after, str(again)) == (2.5, "retry asked for in 2.5 s")
    throttled = errors.Throttled(3, key="openai:acme")
    assert (throttled.retry_after, throttled.key, str(throttled)) == (3, "openai:acme", "throttled for 3 s")
    assert errors.Reject("no such customer").reason == "no such customer"
    assert not issubclass(errors.Throttled, errors.StoreError)
