"""Versioned documents and append-only logs: the one write protocol of all durable state but queues.

A document is a hash that is read with its token, changed, and committed against that token (optimistic concurrency
control, Kung & Robinson 1981). :class:`RedisStore` keeps them on Redis; :class:`LocalStore` is its twin for
``memory:`` addresses, with the same results, gone with the process. Refuses to own meaning: what a field holds, how
keys are named and how large things may be is for :mod:`orchestra.memory` and :mod:`orchestra.workflow` to say.

One event loop a store; a store holds no state between calls but what it stores.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import random
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

from orchestra import _scripts
from orchestra.connections import store_errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from orchestra.connections import ConnectionManager

ABSENT: Final = b""
"""Token of a document that does not exist."""
ANY: Final = b"*"
"""Commit whatever token the document carries."""
TOKEN: Final = "k"  # noqa: S105 - the name of a field
VERSION: Final = "v"
NOTE_GRACE: Final = 3600.0
"""Seconds after which a name that was noted must have been written, or never will be."""
_LOOK: Final = 500
_jitter = random.Random()  # noqa: S311 - spreads retries, guards nothing


class Commit(NamedTuple):
    """What a commit did. ``version`` is the document's afterwards, 0 when there is none."""

    done: bool
    version: int
    token: bytes


class DocumentStore(Protocol):
    """Versioned documents and append-only logs under full keys. Times in milliseconds; 0 is no time to live."""

    async def read(self, keys: Sequence[str], fields: Sequence[str] = ()) -> list[dict[str, bytes]]:
        """``fields`` of each document (all of them when none is named); what does not exist is left out."""

    async def commit(
        self, key: str, expect: bytes, fields: Mapping[str, bytes], *, removed: Iterable[str] = (), ttl_ms: int = -1
    ) -> Commit:
        """Write ``fields`` and drop ``removed`` if the document's token is ``expect``; ``ttl_ms`` -1 keeps the expiry."""

    async def delete(self, *keys: str) -> bool:
        """Forget keys of one slot; whether any existed."""

    async def append(self, key: str, entry: bytes, *, at: int, limit: int, ttl_ms: int) -> tuple[int, int]:
        """As ``lua/memory_append.lua``: ``(1 appended | 0 refused | -1 full, length)``."""

    async def entries(self, key: str, start: int, count: int) -> list[bytes]:
        """At most ``count`` entries of a log from position ``start``."""

    async def note(self, key: str, name: str, *, ttl_ms: int) -> None:
        """Put ``name``, which is about to be written for ``ttl_ms``, on the list ``key``."""

    async def noted(self, key: str, places: Callable[[str], tuple[str, ...]]) -> list[str]:
        """The names on the list ``key`` of whose full keys ``places(name)`` one exists, the last noted one last.

        Others are dropped from it once they were noted :data:`NOTE_GRACE` ago.
        """


def new_token() -> bytes:
    """The token of one commit: 64 random bits, from the system, so that forks do not repeat each other's."""
    return os.urandom(8).hex().encode()


class RedisStore:
    """The documents on Redis; each call is one round trip."""

    def __init__(self, manager: ConnectionManager) -> None:
        self._manager = manager

    @property
    def manager(self) -> ConnectionManager:
        """The connections it uses."""
        return self._manager

    async def read(self, keys: Sequence[str], fields: Sequence[str] = ()) -> list[dict[str, bytes]]:
        """See :class:`DocumentStore`. O(fields read)."""
        with self._errors("read"):
            if len(keys) == 1:
                replies = [await self._read_one(self._manager.client, keys[0], fields)]
            else:
                async with self._manager.client.pipeline(transaction=False) as pipe:
                    for key in keys:
                        self._read_one(pipe, key, fields)
                    replies = await pipe.execute()
        if fields:
            named = [zip(fields, reply, strict=True) for reply in replies]
            return [{name: value for name, value in document if value is not None} for document in named]
        return [{name.decode(): value for name, value in reply.items()} for reply in replies]

    @staticmethod
    def _read_one(client: Any, key: str, fields: Sequence[str]) -> Any:
        return client.hmget(key, fields) if fields else client.hgetall(key)

    async def commit(
        self, key: str, expect: bytes, fields: Mapping[str, bytes], *, removed: Iterable[str] = (), ttl_ms: int = -1
    ) -> Commit:
        """See :class:`DocumentStore`. O(fields written)."""
        token = new_token()
        args: list[Any] = [expect, token, ttl_ms, len(fields)]
        for name, value in fields.items():
            args += (name, value)
        done, version = await self._call("memory_commit", key, [*args, *removed])
        return Commit(bool(done), version, token)

    async def delete(self, *keys: str) -> bool:
        """See :class:`DocumentStore`."""
        with self._errors("delete"):
            return bool(await self._manager.client.delete(*keys))

    async def append(self, key: str, entry: bytes, *, at: int, limit: int, ttl_ms: int) -> tuple[int, int]:
        """See :class:`DocumentStore`."""
        outcome, length = await self._call("memory_append", key, [entry, at, limit, ttl_ms])
        return outcome, length

    async def entries(self, key: str, start: int, count: int) -> list[bytes]:
        """See :class:`DocumentStore`. O(start + count)."""
        with self._errors("read a log"):
            entries: list[bytes] = await self._manager.client.lrange(key, start, start + count - 1)
        return entries

    async def note(self, key: str, name: str, *, ttl_ms: int) -> None:
        """See :class:`DocumentStore`."""
        await self._call("memory_note", key, [name, ttl_ms])

    async def noted(self, key: str, places: Callable[[str], tuple[str, ...]]) -> list[str]:
        """See :class:`DocumentStore`. O(names), a round trip for each 500 and two more."""
        with self._errors("list"):
            noted = await self._manager.client.zrange(key, 0, -1, withscores=True)
            seconds, _ = await self._manager.client.time()
        rows, found = [(raw.decode(), score) for raw, score in noted], list[bool]()
        for first in range(0, len(rows), _LOOK):
            found += await self._exist([places(name) for name, _ in rows[first : first + _LOOK]])
        named = list(zip(rows, found, strict=True))
        gone = [row for row, here in named if not here and row[1] < (seconds - NOTE_GRACE) * 1e6]
        for first in range(0, len(gone), _LOOK):
            await self._call("memory_forget", key, [each for row in gone[first : first + _LOOK] for each in row])
        return [name for (name, _), here in named if here]

    async def _exist(self, groups: list[tuple[str, ...]]) -> list[bool]:
        """Of each group of keys of one slot: whether one of them exists."""
        with self._errors("list"):
            async with self._manager.client.pipeline(transaction=False) as pipe:
                for keys in groups:
                    pipe.exists(*keys)
                return [bool(count) for count in await pipe.execute()]

    def _errors(self, doing: str) -> AbstractContextManager[None]:
        return store_errors(self._manager.address.safe, doing)

    async def _call(self, name: str, key: str, args: list[Any]) -> Any:
        with self._errors(name):
            return await _scripts.call(self._manager.client, name, [key], args)


class LocalStore:
    """The twin of :class:`RedisStore` inside this process: the same results, nothing durable.

    No method awaits, so each is atomic on its event loop.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._documents: dict[str, dict[str, bytes]] = {}
        self._logs: dict[str, list[bytes]] = {}
        self._names: dict[str, dict[str, float]] = {}
        self._expiry: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []  # heap; entries that `_expiry` contradicts are void

    async def read(self, keys: Sequence[str], fields: Sequence[str] = ()) -> list[dict[str, bytes]]:
        """See :class:`DocumentStore`."""
        self._expire()
        documents = [self._documents.get(key, {}) for key in keys]
        if not fields:
            return [dict(document) for document in documents]
        return [{name: document[name] for name in fields if name in document} for document in documents]

    async def commit(
        self, key: str, expect: bytes, fields: Mapping[str, bytes], *, removed: Iterable[str] = (), ttl_ms: int = -1
    ) -> Commit:
        """See :class:`DocumentStore`."""
        self._expire()
        document, token = self._documents.get(key, {}), new_token()
        version = int(document.get(VERSION, b"0"))
        if expect not in (ANY, document.get(TOKEN, ABSENT)):
            return Commit(done=False, version=version, token=token)
        gone = set(removed)
        kept = {name: value for name, value in {**document, **fields}.items() if name not in gone}
        self._documents[key] = {**kept, TOKEN: token, VERSION: b"%d" % (version + 1)}
        if ttl_ms >= 0:
            self._live(key, ttl_ms)
        return Commit(done=True, version=version + 1, token=token)

    async def delete(self, *keys: str) -> bool:
        """See :class:`DocumentStore`."""
        self._expire()
        existed = [self._drop(key) for key in keys]
        return any(existed)

    async def append(self, key: str, entry: bytes, *, at: int, limit: int, ttl_ms: int) -> tuple[int, int]:
        """See :class:`DocumentStore`."""
        self._expire()
        log = self._logs.get(key, [])
        length = len(log)
        if at >= 0 and at != length:
            return (1 if at < length and log[at] == entry else 0), length
        if length >= limit:
            return -1, length
        self._logs.setdefault(key, log).append(entry)
        self._live(key, ttl_ms)
        return 1, length + 1

    async def entries(self, key: str, start: int, count: int) -> list[bytes]:
        """See :class:`DocumentStore`."""
        self._expire()
        return self._logs.get(key, [])[start : start + count]

    async def note(self, key: str, name: str, *, ttl_ms: int) -> None:
        """See :class:`DocumentStore`."""
        names = self._names.setdefault(key, {})
        names.pop(name, None)
        names[name] = self._now()

    async def noted(self, key: str, places: Callable[[str], tuple[str, ...]]) -> list[str]:
        """See :class:`DocumentStore`."""
        self._expire()
        names, late = self._names.get(key, {}), self._now() - NOTE_GRACE
        found = [name for name in names if any(self._holds(place) for place in places(name))]
        for name in names.keys() - set(found):
            if names[name] < late:
                del names[name]
        if not names:
            self._names.pop(key, None)
        return found

    def _holds(self, key: str) -> bool:
        return key in self._documents or key in self._logs

    def _live(self, key: str, ttl_ms: int) -> None:
        self._expiry.pop(key, None)
        if ttl_ms:
            self._expiry[key] = self._now() + ttl_ms / 1000
            heapq.heappush(self._due, (self._expiry[key], key))

    def _expire(self) -> None:
        now = self._now()
        while self._due and self._due[0][0] <= now:
            due, key = heapq.heappop(self._due)
            if self._expiry.get(key) == due:
                self._drop(key)

    def _drop(self, key: str) -> bool:
        self._expiry.pop(key, None)
        document, log = self._documents.pop(key, None), self._logs.pop(key, None)
        return document is not None or log is not None


async def pause_after_conflict(attempt: int) -> None:
    """Step back before try ``attempt`` + 2, for at most 50 ms, so that the writers of one document spread out."""
    await asyncio.sleep(_jitter.uniform(0.0, min(0.05, 0.001 * 2.0 ** min(attempt, 6))))
