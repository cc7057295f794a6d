"""Makes agents by the name of their kind, for configuration that is data.

Owns the list of kinds. Refuses to own import by name: a kind is what somebody has registered in this process.
Register before, or in the thread that makes them.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

from orchestra._agents.executor import ExecutorAgent
from orchestra._agents.planner import PlannerAgent
from orchestra.errors import ConfigurationError
from orchestra.tasks import check_ident

_kinds: dict[str, Callable[..., Any]] = {"planner": PlannerAgent, "executor": ExecutorAgent}


def create_agent(kind: str, *args: Any, **options: Any) -> Any:
    """An agent of ``kind``: ``"planner"`` (see :class:`PlannerAgent`), ``"executor"`` (:class:`ExecutorAgent`), or one of
    :func:`register_agent_kind`.

    Raises:
        ConfigurationError: there is no such kind, or it does not take these arguments.
    """
    make = _kinds.get(kind)
    if make is None:
        near = difflib.get_close_matches(str(kind), _kinds, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"kinds are {', '.join(sorted(_kinds))}"
        raise ConfigurationError(f"there is no kind of agent {kind!r}; {hint}", field="kind", value=kind)
    try:
        inspect.signature(make).bind(*args, **options)
    except TypeError as error:
        raise ConfigurationError(f"an agent of kind {kind!r} is not made so: {error}", field="kind") from None
    return make(*args, **options)


def register_agent_kind(kind: str, make: Callable[..., Any]) -> None:
    """Let ``create_agent(kind, …)`` call ``make``, which gives an agent. The same kind again replaces it."""
    if not callable(make):
        raise ConfigurationError(f"kind {kind!r} must be made by a callable, got {make!r}", field="make", value=make)
    _kinds[check_ident("kind", kind)] = make
