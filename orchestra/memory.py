"""What agents remember: named values and logs, on Redis or inside this process.

Owns the keys of :func:`orchestra._keys.memory`, the size limits and the time to live of what is kept there, and is the
door through which workflows reach the documents underneath (:mod:`orchestra._documents`). Refuses to own meaning.

One event loop; a manager holds no state between calls, so any number of coroutines and processes may share a
namespace. With a ``memory:`` address all managers of an event loop share one store in this process.
"""

from __future__ import annotations

import asyncio
import copy
import enum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from orchestra import _keys
from orchestra._documents import (
    ABSENT,
    ANY,
    TOKEN,
    VERSION,
    Commit,
    DocumentStore,
    LocalStore,
    RedisStore,
    pause_after_conflict,
)
from orchestra._shared import Connectable, shared
from orchestra.connections import default_address, get_connection_manager, parse_address
from orchestra.errors import ConfigurationError, StoreError, StoreFullError, TaskTooLargeError
from orchestra.serialization import dumps, loads
from orchestra.tasks import check_name, require_int, require_number

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterable

    from orchestra.connections import ConnectionManager

_VALUE = "d"
_MAX_TRIES = 64
_TEN_YEARS = 10 * 365 * 86_400.0
_POLL, _PAGE = 0.05, 500


class Default(enum.Enum):
    """The type of :data:`DEFAULT`."""

    DEFAULT = "the manager's own"


DEFAULT: Final = Default.DEFAULT
"""For a ``ttl``: the one the manager was given."""


class Versioned(NamedTuple):
    """A value as it was read. ``version`` counts the writes since its key was made, 0: there is no value.

    ``token`` tells it from one with the same version that was made after this one was forgotten.
    """

    value: Any
    version: int
    token: bytes = ABSENT


class MemoryManager(Connectable):
    """Named values and logs of one ``namespace``.

    Args:
        manager: connections to use, or an address, whose shared ones are used; by default those of
            ``ORCHESTRA_REDIS_URL``. They are reached at the first call.
        namespace: ``[A-Za-z0-9._-]``, 1 to 64 characters; keys of different namespaces never meet.
        ttl: seconds after its last write at which a value or log is forgotten, above 0; None: never.
        max_bytes: largest encoded value or log entry, 1 to 512 MiB.
        max_entries: most entries of one log, 1 to 10,000,000.
        index: keep a list of the keys, so that :meth:`keys` can tell them; a round trip more for every write.

    Keys are 1 to 128 printable ASCII characters without spaces. Values are what MessagePack carries, and come back
    as it gives them: a tuple returns as a list.

    Every method raises ConfigurationError for a key or setting out of these ranges (before Redis is touched),
    InvalidTaskError for a value that cannot travel, TaskTooLargeError for one above ``max_bytes``, CorruptEntryError
    for bytes in Redis that are no value, and StoreError when Redis fails.
    """

    def __init__(
        self,
        manager: ConnectionManager | str | None = None,
        *,
        namespace: str = "default",
        ttl: float | None = 86_400,
        max_bytes: int = 1 << 20,
        max_entries: int = 10_000,
        index: bool = False,
    ) -> None:
        self.namespace = check_name("MemoryManager.namespace", namespace)
        require_int("MemoryManager.max_bytes", max_bytes, 1, 512 << 20, unit="bytes")
        require_int("MemoryManager.max_entries", max_entries, 1, 10_000_000)
        self.max_bytes = max_bytes
        self.max_entries = max_entries
        self.ttl = ttl
        self._manager = manager
        self._store: DocumentStore | None = None
        self._index = index
        self.scope = ""
        """What :meth:`scoped` has made of the names given to it; empty: the namespace itself."""
        to_ms(ttl)

    async def _connect(self) -> None:
        await self.store()

    async def store(self) -> DocumentStore:
        """The documents underneath, connected; for what keeps its own keys, such as workflows."""
        if self._store is None:
            given = self._manager
            if given is None or isinstance(given, str):
                address = default_address() if given is None else parse_address(given)
                if address.scheme == "memory":
                    self._store = shared("documents", "memory:", LocalStore)
                    return self._store
                given = get_connection_manager(given)
            await given.connect()
            self._store = RedisStore(given)
        return self._store

    def scoped(self, prefix: str, *, ttl: float | Default | None = DEFAULT, index: bool | None = None) -> MemoryManager:
        """A view on keys of its own: those of ``prefix``, apart from all others of the namespace, whatever their names.

        ``prefix`` is a key like any other; views of a view are apart too. It has the limits and connections of this
        manager, and its ``ttl`` and ``index`` where none is given. No round trip.
        """
        inner = copy.copy(self)
        inner.scope = _keys.memory_scope(self.scope, prefix)
        inner.ttl = self.ttl if isinstance(ttl, Default) else ttl
        inner._index = self._index if index is None else index
        to_ms(inner.ttl)
        return inner

    async def get(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or ``default``. One round trip."""
        return (await self.get_many([key])).get(key, default)

    async def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those ``keys`` that have one. One round trip; not one moment in time for all of them."""
        wanted = {key: self._names(key)[0] for key in keys}
        if not wanted:
            return {}
        documents = await (await self.store()).read(list(wanted.values()), (_VALUE,))
        return {key: loads(found[_VALUE]) for key, found in zip(wanted, documents, strict=True) if found}

    async def set(self, key: str, value: Any, ttl: float | Default | None = DEFAULT) -> int:
        """Store ``value``; returns its version, which counts the writes since the key was made. One round trip."""
        return (await self._write(key, ANY, value, self._ttl_ms(ttl))).version

    async def get_versioned(self, key: str, default: Any = None) -> Versioned:
        """The value of ``key`` for :meth:`compare_and_set`; version 0 and ``default`` where there is none. One round trip."""
        name = self._names(key)[0]
        (document,) = await (await self.store()).read([name], (TOKEN, VERSION, _VALUE))
        if not document:
            return Versioned(default, 0)
        return Versioned(loads(document[_VALUE]), int(document[VERSION]), document[TOKEN])

    async def compare_and_set(
        self, key: str, value: Any, version: int | Versioned, *, ttl: float | Default | None = DEFAULT
    ) -> Versioned | None:
        """Store ``value`` if nobody has written since ``version`` was read; what it is now, or None: it was, and stays.

        ``version``: what :meth:`get_versioned` gave, which costs one round trip; or its number, which costs two and
        cannot tell a value from one that was made anew since then. 0: only if there is no value.

        Raises:
            StoreUnavailableError: the reply was lost: it may have been stored.
        """
        if not isinstance(version, Versioned):
            require_int("MemoryManager.compare_and_set version", version, 0, 1 << 62, unit="writes")
            found = await self.get_versioned(key) if version else Versioned(None, 0)
            if found.version != version:
                return None
            version = found
        commit = await self._write(key, version.token, value, self._ttl_ms(ttl))
        return Versioned(value, commit.version, commit.token) if commit.done else None

    async def update(
        self, key: str, fn: Callable[[Any], Any], default: Any = None, *, ttl: float | Default | None = DEFAULT
    ) -> Any:
        """Replace the value by ``fn(value)`` and return it; no update by anybody else is lost.

        ``fn`` is a plain function, gets ``default`` when there is no value, and is called again when somebody else
        wrote in between. Two round trips, two more for each such race.

        Raises:
            StoreError: 64 races in a row were lost; nothing was changed.
        """
        name, store, ttl_ms = self._names(key)[0], await self.store(), self._ttl_ms(ttl)
        for attempt in range(_MAX_TRIES):
            (document,) = await store.read([name], (TOKEN, _VALUE))
            value = fn(loads(document[_VALUE]) if document else default)
            if (await self._write(key, document.get(TOKEN, ABSENT), value, ttl_ms)).done:
                return value
            await pause_after_conflict(attempt)
        raise StoreError(
            f"memory key {key!r} was changed by others {_MAX_TRIES} times while update() ran; nothing was written: "
            f"make the function faster or split the key"
        )

    async def delete(self, key: str) -> bool:
        """Forget the value and the log of ``key``; whether there was one. One round trip."""
        names = self._names(key)
        return await (await self.store()).delete(*names)

    async def append(
        self, key: str, value: Any, *, at: int | None = None, ttl: float | Default | None = DEFAULT
    ) -> int:
        """Append ``value`` to the log of ``key``; returns its length afterwards. One round trip.

        With ``at`` the entry must get that position (from 0), and a call may be repeated: it succeeds without
        appending again when that position holds the same value. Without it a call whose reply was lost
        (StoreUnavailableError) may have appended.

        Raises:
            StoreError: another entry has the position ``at``, or the log does not reach it yet.
            StoreFullError: the log has ``max_entries`` entries.
        """
        if at is not None:
            require_int("MemoryManager.append at", at, 0, self.max_entries)
        name, entry, ttl_ms = self._names(key)[1], self.encode(f"entry of log {key!r}", value), self._ttl_ms(ttl)
        store = await self._noting(key, ttl_ms)
        outcome, length = await store.append(
            name, entry, at=-1 if at is None else at, limit=self.max_entries, ttl_ms=ttl_ms
        )
        if outcome < 0:
            raise StoreFullError(f"log {key!r} holds its limit of {self.max_entries} entries; nothing was appended")
        if outcome == 0:
            raise StoreError(f"log {key!r} has {length} entries, so position {at} cannot take this entry")
        return length

    async def read_log(self, key: str, start: int = 0, count: int | None = None) -> list[Any]:
        """Entries of the log of ``key`` from position ``start``, oldest first, at most ``count``. One round trip."""
        require_int("MemoryManager.read_log start", start, 0, self.max_entries)
        limit = self.max_entries if count is None else count
        require_int("MemoryManager.read_log count", limit, 1, self.max_entries)
        name = self._names(key)[1]
        entries = await (await self.store()).entries(name, start, limit)
        return [loads(entry) for entry in entries]

    async def follow_log(self, key: str, start: int = 0) -> AsyncGenerator[tuple[int, Any], None]:
        """Entries of the log of ``key`` with their positions from ``start`` on, and for ever those that come.

        Asks again after 50 ms, and ever more rarely up to once a second while nothing comes; a round trip each time.
        """
        pause = _POLL
        while True:
            found = await self.read_log(key, start, min(_PAGE, self.max_entries))
            for entry in found:
                yield start, entry
                start += 1
            if start >= self.max_entries:
                return
            pause = _POLL if found else min(1.0, pause * 1.5)
            if len(found) < _PAGE:
                await asyncio.sleep(pause)

    async def keys(self) -> list[str]:
        """The keys that have a value or a log here, the one written last comes last; those of views not among them.

        Knows what was written through a manager with ``index=True``, surely if through no other. O(keys), a round
        trip for each 500 and two more; Redis is not scanned.

        Raises:
            ConfigurationError: this manager keeps no list.
        """
        if not self._index:
            raise ConfigurationError(
                "this MemoryManager keeps no list of its keys: make it with index=True", field="MemoryManager.index"
            )
        listed = _keys.memory_names(self.namespace, self.scope)
        return await (await self.store()).noted(listed, self._names)

    def encode(self, what: str, value: Any) -> bytes:
        """``value`` as MessagePack within ``max_bytes``; errors name ``what`` it is."""
        try:
            return dumps(value, max_bytes=self.max_bytes, name=what)
        except TaskTooLargeError as error:
            raise TaskTooLargeError(
                f"{what} is larger than the memory's limit of {self.max_bytes} bytes; "
                f"store it elsewhere and keep its address, or raise MemoryManager.max_bytes",
                size=error.size,
                limit=self.max_bytes,
            ) from None

    def _names(self, key: str) -> tuple[str, str]:
        return _keys.memory(self.namespace, key, self.scope)

    async def _noting(self, key: str, ttl_ms: int) -> DocumentStore:
        """The store, which knows that ``key`` is about to be written."""
        store = await self.store()
        if self._index:
            await store.note(_keys.memory_names(self.namespace, self.scope), key, ttl_ms=ttl_ms)
        return store

    async def _write(self, key: str, expect: bytes, value: Any, ttl_ms: int) -> Commit:
        name, fields = self._names(key)[0], {_VALUE: self.encode(f"memory key {key!r}", value)}
        return await (await self._noting(key, ttl_ms)).commit(name, expect, fields, ttl_ms=ttl_ms)

    def _ttl_ms(self, ttl: float | Default | None) -> int:
        return to_ms(self.ttl if isinstance(ttl, Default) else ttl)


def to_ms(ttl: float | None) -> int:
    """A time to live in milliseconds, 0 for none; ConfigurationError unless None or above 0 and up to ten years."""
    if ttl is None:
        return 0
    require_number("ttl", ttl, 0.0, _TEN_YEARS, unit="seconds", exclusive=True)
    return max(1, round(ttl * 1000))


def get_memory_manager(namespace: str = "default") -> MemoryManager:
    """The shared manager of ``namespace`` for this event loop; awaiting it connects it."""
    return shared("memory_manager", namespace, lambda: MemoryManager(namespace=namespace))
