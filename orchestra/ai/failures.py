"""What an error of a model provider means to the task that ran into it.

Owns the mapping from pydantic-ai's errors to the words of orchestra. Refuses to own retries: the queue repeats what failed,
so providers' own retries are switched off where pydantic-ai allows it. No state.

| the provider | the task |
|---|---|
| 429, with or without ``Retry-After`` | ``Throttled``: delayed, its key parked, no retry consumed |
| 402, quota or credits used up | ``Reject``: waiting does not help |
| 400, 401, 403, 404, 413, 422, context window exceeded | ``Reject``: the same request fails again |
| 408, 409, 5xx, connection lost, timeout, cut stream | a failure; with ``Retry-After``, ``RetryLater`` |
| an answer that does not parse or fit, in spite of the agent's own retries | a failure, with a new conversation |
| a ``usage_limits`` of pydantic-ai exceeded | ``BudgetExceededError`` |
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from pydantic_ai.exceptions import (
    FallbackExceptionGroup,
    ModelAPIError,
    ModelHTTPError,
    ModelQuotaExceededError,
    ModelRateLimitError,
    ModelRequestRejectedError,
    UsageLimitExceeded,
    UserError,
)

from orchestra.errors import BudgetExceededError, Reject, RetryLater, Throttled

RETRY_AFTER_S: Final = 5.0
"""Seconds a task waits after a 429 that does not say how long."""
_LEAST_S: Final = 0.05
_AGAIN: Final = frozenset({408, 409, 425})


def translated(error: Exception, key: Callable[[], str | None]) -> Exception:
    """What the agent of a task raises for ``error``; the error itself where it is an ordinary failure.

    ``key``: tells what a rate limit of the provider is counted for.
    """
    failures = list(_leaves(error))
    limited = [each for each in failures if isinstance(each, ModelRateLimitError) or _status(each) == 429]
    limited = [each for each in limited if not isinstance(each, ModelQuotaExceededError)]
    if limited:
        wait = min(_wait(each, RETRY_AFTER_S) for each in limited)
        return Throttled(wait, key(), f"the provider is limiting requests: {_text(limited[0])}")
    if failures and all(map(_final, failures)):
        return Reject(f"the provider refused the request, and would again: {_text(failures[0])}")
    if isinstance(error, UsageLimitExceeded):
        return BudgetExceededError(str(error), scope="task", limit="usage_limits")
    if isinstance(error, UserError):
        return Reject(f"the agent cannot run as it is set up: {error}")
    waits = [each.retry_after for each in failures if each.retry_after is not None]
    if waits:
        return RetryLater(max(_LEAST_S, min(waits)), f"the provider asked to wait: {_text(failures[0])}")
    return error


def _leaves(error: BaseException) -> Iterator[ModelAPIError]:
    """The provider's errors: one, or those of all models that were tried."""
    if isinstance(error, FallbackExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    elif isinstance(error, ModelAPIError):
        yield error


def _status(error: ModelAPIError) -> int:
    return error.status_code if isinstance(error, ModelHTTPError) else 0


def _final(error: ModelAPIError) -> bool:
    if isinstance(error, ModelQuotaExceededError):
        return True
    status = _status(error)
    if status in _AGAIN or status >= 500:
        return False
    return isinstance(error, ModelRequestRejectedError) or 400 <= status < 500


def _wait(error: ModelAPIError, default: float) -> float:
    return default if error.retry_after is None else max(_LEAST_S, error.retry_after)


def _text(error: ModelAPIError) -> str:
    return str(error)[:500]
