"""Oracle of ``orchestra._ext.step``: the first step of a coroutine in a copied context, in plain Python."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any


def first_step(
    call: Callable[[Any], Any], argument: Any, variable: contextvars.ContextVar[Any]
) -> tuple[contextvars.Context, Any, Any]:
    context = contextvars.copy_context()
    return (context, *context.run(_enter, call, argument, variable))


def _enter(call: Callable[[Any], Any], argument: Any, variable: contextvars.ContextVar[Any]) -> tuple[Any, Any]:
    variable.set(argument)
    coroutine = call(argument)
    if not hasattr(coroutine, "send"):
        return coroutine, coroutine
    try:
        return coroutine, coroutine.send(None)
    except StopIteration as stop:
        return None, stop.value
