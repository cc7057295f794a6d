"""Message histories that last over tasks: what was said in a conversation before, and what a run adds to it.

Owns the log of a conversation: one entry a turn, with the run that made it. A run sees the turns that were there when it was
first tried, on every attempt; its own turn is added when it has ended, once. Two runs of one conversation at the same time
see the same past, and their turns follow each other in the order in which they ended. No state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic_ai.messages import ModelMessage, ModelMessagesTypeAdapter

from orchestra.ai.journal import Journal, journal_key
from orchestra.errors import StoreError, StoreUnavailableError
from orchestra.memory import MemoryManager

KEEP_S: Final = 30 * 86_400.0
"""Seconds after its last turn at which a conversation is forgotten."""
_TRIES: Final = 50


class Conversation:
    """The conversation called ``name``."""

    def __init__(self, memory: MemoryManager, name: str) -> None:
        self._memory = memory
        self._key = journal_key("conversation", name)

    async def history(self, journal: Journal) -> list[ModelMessage]:
        """What was said before this run began. One round trip, two on its first attempt."""
        seen = journal.fact("turns")
        turns = await self._memory.read_log(self._key)
        if seen is None:
            seen = len(turns)
            await journal.note("turns", seen)
        return [message for turn in turns[:seen] for message in decoded(turn["m"])]

    async def add(self, journal: Journal, messages: Sequence[ModelMessage]) -> None:
        """Add what this run has said, unless an attempt of it has done so. One round trip where nobody interferes."""
        at = int(journal.fact("turns", 0))
        turn = {"r": journal.key, "m": plain(messages)}
        for _ in range(_TRIES):
            try:
                await self._memory.append(self._key, turn, at=at, ttl=KEEP_S)
            except StoreUnavailableError:
                raise
            except StoreError as error:
                if type(error) is not StoreError:
                    raise
                later = await self._memory.read_log(self._key, at)
                if any(each["r"] == journal.key for each in later):
                    return
                at += len(later)
            else:
                return
        raise StoreError(f"conversation {self._key!r} was changed by others {_TRIES} times while a turn was added")


def plain(messages: Sequence[ModelMessage]) -> list[Any]:
    """Messages as plain data, for a task's input or result."""
    dumped: list[Any] = ModelMessagesTypeAdapter.dump_python(list(messages), mode="json")
    return dumped


def decoded(messages: Any) -> list[ModelMessage]:
    """Plain data as messages. Raises ``pydantic.ValidationError`` when it is none."""
    return ModelMessagesTypeAdapter.validate_python(messages)
