"""No test here reaches a provider; models are TestModel, FunctionModel, or the scripted server on loopback."""

from __future__ import annotations

import itertools

import pytest
from pydantic_ai import models

from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask


@pytest.fixture(autouse=True)
def no_real_models(monkeypatch):
    monkeypatch.setattr(models, "ALLOW_MODEL_REQUESTS", False)


@pytest.fixture(params=["redis", "memory:"])
def memory(request):
    """On Redis and in this process."""
    if request.param == "memory:":
        yield MemoryManager("memory:", namespace="tests")
    else:
        yield MemoryManager(request.getfixturevalue("manager"), namespace="tests")


_numbers = itertools.count(1)


@pytest.fixture
def task():
    """Makes tasks: one id for a test, a fence that grows with every call."""
    name, fences = f"t-{next(_numbers)}", itertools.count(1)

    def make(given="hello", **facts) -> BaseTask:
        facts = {"id": name, "type": "ask", "input": given, "fence": next(fences), **facts}
        return BaseTask(**facts)

    return make
