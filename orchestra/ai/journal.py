"""The journal of one LLM run: which model and tool calls of a task were made, and what they gave.

Owns the log: its entries, who may append, what is replayed. It is an append-only log of a
:class:`~orchestra.memory.MemoryManager`. Refuses to own what a call is and how results look (text that the caller gives).

Fencing: an attempt opens the journal with an entry of its own before it appends anything, and every append insists on the
position after the last entry that the attempt has read (compare-and-append). An older attempt that goes on after a newer
one has opened finds the newer one's entry at its position, reads it, and stops: StaleAttemptError. So the attempts in the log
never go backwards, whatever the clocks and pauses. ``order`` is what decides who is newer: (series of the step, fence).

One event loop an instance; the calls of one attempt may run at once, their appends take turns.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from typing import Any, Final, TypeAlias

from orchestra.ai.usage import Usage
from orchestra.errors import CorruptEntryError, StoreError, StoreUnavailableError, Throttled
from orchestra.memory import DEFAULT, Default, MemoryManager

Order: TypeAlias = tuple[int, int]

TRIES: Final = 4
"""How often an append is tried whose reply is lost: a paid answer is worth some patience."""
PAGE: Final = 500
"""Entries read at once."""
STALE_S: Final = 5.0
"""Seconds after which a stale attempt would be tried again. It matters where a task id is used anew before the journal of its
predecessor is forgotten: every delay makes the fence grow, so that it is soon the newest attempt there ever was."""
ENDED_S: Final = 900.0
"""Seconds a journal is kept after its run has ended: until the result is surely settled, and below the queue's memory of ids."""


class StaleAttemptError(Throttled):
    """Another attempt of the same task has taken over the journal; this one must do nothing more.

    As a word to the dispatcher it is a delay without a retry: where the delivery is stale indeed, nothing comes of it.
    """

    code = "stale_attempt"


class Journal:
    """The log of one run. ``memory`` None keeps it in this process only.

    ``key``: of the run, 1 to 128 printable ASCII characters. ``order``: of this attempt. ``fingerprint``: of what is asked;
    a journal of another one is void. ``keep``: seconds after the last entry at which an unfinished journal is forgotten.
    """

    def __init__(
        self, memory: MemoryManager | None, key: str, order: Order, *, fingerprint: str = "", keep: float | None = None
    ) -> None:
        self.key = key
        self._memory = memory
        self._order = order
        self._fingerprint = fingerprint
        self._keep = DEFAULT if keep is None else keep
        self._token = os.urandom(8).hex()
        self._turn = asyncio.Lock()
        self._length = 0
        self._last: tuple[Order, str] = ((0, 0), "")
        self._clear()

    def _clear(self) -> None:
        self._found: dict[str, str] = {}
        self._begun: set[str] = set()
        self._facts: dict[str, Any] = {}
        self._print = ""
        self.used = Usage()
        """What the recorded calls have used, those before a reset included."""
        self.ended = False
        """Whether an attempt has come to the end of the run."""

    async def open(self) -> None:
        """Read what there is, and become the attempt that may append. Two round trips for a short journal.

        Raises:
            StaleAttemptError: a newer attempt has opened it.
            StoreError: Redis failed.
        """
        await self._catch_up(opening=True)
        if self._length and self._print != self._fingerprint:
            self._clear()
            await self._append({"k": "new", "p": self._fingerprint})
        else:
            await self._append({"k": "open", "p": self._fingerprint})
        self._print = self._fingerprint

    async def read(self) -> None:
        """Take in what there is, without becoming the attempt that may append."""
        await self._catch_up(opening=True)

    # -- what is there

    def recall(self, call: str) -> str | None:
        """What the call gave when it was made, None if it is not recorded."""
        return self._found.get(call)

    @property
    def recorded(self) -> int:
        """How many calls are recorded."""
        return len(self._found)

    def has_begun(self, call: str) -> bool:
        """Whether the call was announced by :meth:`begin`."""
        return call in self._begun

    @property
    def once(self) -> bool:
        """Whether any call was announced by :meth:`begin`, ended or not."""
        return bool(self._begun)

    def fact(self, name: str, default: Any = None) -> Any:
        """What :meth:`note` has kept under ``name``."""
        return self._facts.get(name, default)

    # -- what is added; each is one round trip and raises as `open` does

    async def begin(self, call: str) -> None:
        """Announce a call that may not be made twice."""
        await self._append({"k": "begin", "o": call})

    async def record(self, call: str, result: str, used: Usage = Usage()) -> None:  # noqa: B008 - immutable
        """Keep what a call gave, and what it used."""
        await self._append({"k": "call", "o": call, "v": result, "u": list(used)})

    async def note(self, name: str, value: Any) -> None:
        """Keep a plain value for the attempts to come."""
        await self._append({"k": "fact", "o": name, "v": value})

    async def reset(self, why: str) -> None:
        """Forget the recorded calls, but not what they used: the next attempt asks anew."""
        await self._append({"k": "reset", "v": why})

    async def park(self, keep: float) -> None:
        """The run waits for somebody: its journal is kept for ``keep`` seconds at least."""
        await self._append({"k": "park"}, ttl=max(keep, 0.0 if isinstance(self._keep, Default) else self._keep or 0.0))

    async def end(self) -> None:
        """The run has come to its end: its journal is kept for :data:`ENDED_S` only."""
        await self._append({"k": "end"}, ttl=ENDED_S)

    # -- the log

    async def _append(self, entry: dict[str, Any], ttl: float | None = None) -> None:
        stamped = {**entry, "f": list(self._order), "t": self._token}
        async with self._turn:
            if self._memory is None:
                self._absorb(stamped)
                return
            keep = ENDED_S if ttl is None and self.ended and entry["k"] != "new" else self._keep if ttl is None else ttl
            for attempt in range(TRIES):
                try:
                    await self._memory.append(self.key, stamped, at=self._length, ttl=keep)
                except StoreUnavailableError:
                    if attempt == TRIES - 1:
                        raise
                    await asyncio.sleep(0.05 * 4**attempt)
                except StoreError as error:
                    if type(error) is not StoreError or not await self._catch_up(opening=entry["k"] in {"open", "new"}):
                        raise
                else:
                    self._length += 1
                    self._absorb(stamped)
                    return
            raise StoreError(f"journal {self.key!r} was changed by others {TRIES} times while an entry was appended")

    async def _catch_up(self, *, opening: bool = False) -> bool:
        """Take in what others have appended; whether there was anything."""
        if self._memory is None:
            return False
        before = self._length
        while True:
            most = min(PAGE, self._memory.max_entries)
            page = await self._memory.read_log(self.key, self._length, most)
            for entry in page:
                self._take(entry)
            if len(page) < most or self._length >= self._memory.max_entries:
                break
        self._refuse_stale(opening=opening)
        return self._length > before

    def _take(self, entry: Any) -> None:
        self._length += 1
        try:
            self._absorb(entry)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CorruptEntryError(
                f"entry {self._length - 1} of journal {self.key!r} is no journal entry ({error!r}); "
                f"delete the journal to start the run anew"
            ) from error

    def _refuse_stale(self, *, opening: bool) -> None:
        order, token = self._last
        if not token or token == self._token or order < self._order:
            return
        if opening and (order == self._order or self.ended):
            return
        raise StaleAttemptError(
            STALE_S, None, f"attempt {self._order} of {self.key!r} is stale: attempt {order} has taken over its journal"
        )

    def _absorb(self, entry: dict[str, Any]) -> None:
        kind, order = entry["k"], entry["f"]
        if kind == "new":
            self._clear()
        self._last = ((int(order[0]), int(order[1])), str(entry["t"]))
        if kind in {"open", "new"}:
            self._print = str(entry["p"])
        elif kind == "call":
            self._found[entry["o"]] = str(entry["v"])
            self.used = self.used.plus(Usage(*entry["u"]))
        elif kind == "begin":
            self._begun.add(entry["o"])
        elif kind == "fact":
            self._facts[entry["o"]] = entry["v"]
        elif kind == "reset":
            self._found.clear()
            self._begun.clear()
            self.ended = False
        elif kind == "end":
            self.ended = True


def journal_key(*parts: str) -> str:
    """A memory key of ``parts``: as they are where that is short and printable, else their hash."""
    plain = "/".join(parts)
    if len(plain) <= 128 and all("!" <= letter <= "~" for letter in plain):
        return plain
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()
