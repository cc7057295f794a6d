"""Tells what an agent does while it does it: text as it comes, tool calls and their ends.

Owns how much is told at once: text is gathered, so that a fast model costs a few writes a second, not one a token. Refuses
to own where it goes: ``emit(kind, data)`` of the task's context. What is told is lost with its attempt and not told again by
a replay; the result alone is durable. One instance a run, one event loop.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterable, Awaitable, Callable
from typing import Any, Final, TypeAlias

from pydantic_ai.messages import (
    AgentStreamEvent,
    FunctionToolCallEvent,
    FunctionToolResultEvent,
    PartDeltaEvent,
    PartStartEvent,
    TextPart,
    TextPartDelta,
    ToolReturnPart,
)

Emit: TypeAlias = Callable[[str, Any], Awaitable[Any]]

GATHER_S: Final = 0.1
"""Seconds that text is gathered at most while more of it comes."""
GATHER_CHARS: Final = 400


class Telling:
    """Turns the events of a run into ``text``, ``tool_call`` and ``tool_result`` events of its task."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._text: list[str] = []
        self._chars = 0
        self._since = 0.0

    async def follow(self, _: Any, events: AsyncIterable[AgentStreamEvent]) -> None:
        """Tell of ``events``; an event stream handler of pydantic-ai."""
        async for event in events:
            if isinstance(event, PartStartEvent) and isinstance(event.part, TextPart):
                await self._add(event.part.content)
            elif isinstance(event, PartDeltaEvent) and isinstance(event.delta, TextPartDelta):
                await self._add(event.delta.content_delta)
            elif isinstance(event, FunctionToolCallEvent):
                await self._flush()
                told = {"tool": event.part.tool_name, "args": event.part.args_as_dict(), "id": event.part.tool_call_id}
                await self._emit("tool_call", told)
            elif isinstance(event, FunctionToolResultEvent):
                await self._flush()
                await self._emit("tool_result", _result(event.part))
        await self._flush()

    async def _add(self, text: str) -> None:
        if not text:
            return
        now = time.monotonic()
        self._text.append(text)
        self._chars += len(text)
        if now - self._since >= GATHER_S or self._chars >= GATHER_CHARS:
            await self._flush(now)

    async def _flush(self, now: float | None = None) -> None:
        text, self._text, self._chars = "".join(self._text), [], 0
        self._since = time.monotonic() if now is None else now
        if text:
            await self._emit("text", {"delta": text})


def _result(part: Any) -> dict[str, Any]:
    outcome = part.outcome if isinstance(part, ToolReturnPart) else "retried"
    return {"tool": part.tool_name, "id": part.tool_call_id, "outcome": outcome}
