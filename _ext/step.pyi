import contextvars
from collections.abc import Callable
from typing import Any, TypeVar

_T = TypeVar("_T")

def first_step(
    call: Callable[[_T], Any], argument: _T, variable: contextvars.ContextVar[_T]
) -> tuple[contextvars.Context, Any, Any]: ...
