"""The dead letters of one queue on Redis: list, replay, purge.

Owns reading letters, of which any byte may be foreign: what cannot be understood is shown with its bytes and stays dead.
Refuses to own making letters (``lua/dead_letter.lua``) and deciding which to replay. One event loop.
After an outage in the middle of a call its count may be too low: a repeat does not find what the first try did.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

from orchestra._delivery import WANTS_RESULT
from orchestra._keys import QueueKeys
from orchestra._redis.link import Link
from orchestra._redis.wire import Command, ReplyError, pack, reply_error
from orchestra._scripts import script
from orchestra.errors import ConfigurationError, CorruptEntryError
from orchestra.serialization import decode_header, decode_task, loads
from orchestra.tasks import DeadLetter, require_int

BATCH = 200


class DeadLetters:
    """What ``queue.read_dlq`` and its like do. ``link`` gives the connection to use."""

    def __init__(self, keys: QueueKeys, link: Callable[[], Awaitable[Link]], patience: float) -> None:
        self._keys = keys
        self._link = link
        self._patience = patience

    async def depth(self) -> int:
        """The number of dead letters; one round trip."""
        return int(await self._ask("XLEN", self._keys.dlq))

    async def read(self, count: int, after: str | None) -> list[DeadLetter]:
        """Up to ``count`` (1 to 10,000) dead letters, oldest first, behind ``after``; one round trip."""
        require_int("count", count, 1, 10_000, unit="dead letters")
        start = "-" if after is None else f"({_checked(after)}"
        rows = await self._ask("XRANGE", self._keys.dlq, start, "+", "COUNT", count)
        return [_dead_letter(entry, fields) for entry, fields in rows]

    async def replay(self, message_ids: Iterable[str]) -> int:
        """Replay those of ``message_ids`` that still exist; two round trips per 200."""
        ids, replayed = [_checked(i) for i in message_ids], 0
        link = await self._link()
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            results = await self._result_keys(chunk)
            keys = [self._keys.dlq, self._keys.counters, *self._keys.lanes]
            sound = [(i, key) for i, key in zip(chunk, results, strict=True) if key]
            if sound:
                keys += [key for _, key in sound]
                replayed += await link.script(script("replay"), keys, [i for i, _ in sound], self._patience)
        return replayed

    async def purge(self, message_ids: Iterable[str] | None) -> int:
        """Delete ``message_ids``, or all; one round trip per 200."""
        ids = None if message_ids is None else [_checked(i) for i in message_ids]
        purged = 0
        while True:
            if ids is None:
                chunk = [letter.message_id for letter in await self.read(BATCH, None)]
            else:
                chunk, ids = ids[:BATCH], ids[BATCH:]
            if not chunk:
                return purged
            purged += int(await self._ask("XDEL", self._keys.dlq, *chunk))

    async def _result_keys(self, message_ids: list[str]) -> list[str | None]:
        """The key of the terminal record that each replay takes back; None for what cannot be replayed."""
        found = await self._ask_all([("XRANGE", self._keys.dlq, i, i) for i in message_ids])
        return [self._result_key(rows[0][1]) if rows else None for rows in found]

    def _result_key(self, fields: list[bytes]) -> str | None:
        frame = dict(zip(fields[::2], fields[1::2], strict=True)).get(b"t", b"")
        try:
            decode_task(frame)
        except CorruptEntryError:
            return None
        header = decode_header(frame)
        wants = (header.flags or 0) & WANTS_RESULT
        return self._keys.result(header.id) if wants else self._keys.result("-")

    async def _ask(self, *command: Any) -> Any:
        return (await self._ask_all([command]))[0]

    async def _ask_all(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The replies to ``commands``, none of which is an error; one round trip."""
        link = await self._link()
        packed = pack(map(_as_command, commands))

        async def attempt() -> list[Any]:
            replies = await link.send(packed, len(commands))
            for reply in replies:
                if isinstance(reply, ReplyError):
                    raise reply_error(reply, link.manager.address.safe) from reply
            return replies

        return (await link.patiently(attempt, self._patience))[0]


def _as_command(command: tuple[Any, ...]) -> Command:
    return command


def _checked(message_id: str) -> str:
    ms, _, seq = message_id.partition("-")
    if not (ms.isdecimal() and seq.isdecimal()):
        raise ConfigurationError(
            f"a dead letter's id looks like 1700000000000-0, got {message_id!r}", field="message_id", value=message_id
        )
    return message_id


def _dead_letter(entry: bytes, fields: list[bytes]) -> DeadLetter:
    f = dict(zip(fields[::2], fields[1::2], strict=True))
    raw = f.get(b"t", b"")
    try:
        task = decode_task(raw)
    except CorruptEntryError:
        task = None
    try:
        error = loads(f.get(b"e", b"\x80"))
    except CorruptEntryError as corrupt:
        error = {"error": f"the error information is unreadable: {corrupt}"}
    message_id = entry.decode()
    return DeadLetter(
        message_id,
        task,
        error if isinstance(error, dict) else {"error": str(error)},
        f.get(b"r", b"").decode("utf-8", "replace"),
        _number(f.get(b"n", b"")),
        int(message_id.partition("-")[0]) / 1000,
        b"" if task is not None else raw,
    )


def _number(text: bytes) -> int:
    return int(text) if text.isdigit() and len(text) < 16 else 0
