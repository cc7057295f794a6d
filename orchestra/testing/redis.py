"""A stand-in for a redis-py client, for unit tests of limiters and locks only.

It knows strings and hashes with expiry, counters, TIME, and those scripts of orchestra that limit and lock, rewritten
in Python with the same integer arithmetic. Anything else is refused with the error that Redis would give for an unknown
command or script: a mock that invents answers proves nothing. Queues are tested on the in-memory queue or a real server.
One event loop; every command yields to it once, then acts without awaiting.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from redis.exceptions import DataError, NoScriptError, ResponseError

from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra._limiting import twin
from orchestra._scripts import script
from orchestra.connections import parse_address

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

Value = bytes | dict[bytes, bytes]
WRONGTYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
NOT_AN_INT = "value is not an integer or out of range"


def _bytes(value: Any) -> bytes:
    if isinstance(value, bool) or not isinstance(value, bytes | str | int | float):
        raise DataError(f"Redis takes bytes, str, int or float, got {value!r}")
    return value if isinstance(value, bytes) else str(value).encode()


def _int(value: Any) -> int:
    try:
        return int(_bytes(value))
    except ValueError:
        raise ResponseError(NOT_AN_INT) from None


class MockRedis:
    """An asyncio client with replies as bytes, whose time is ``clock`` (a ManualClock makes it stand still).

    It is its own manager: ``client`` is the mock itself and ``connect()`` does nothing, so that it can be handed to
    what takes a ConnectionManager and uses only its client. ``commands`` holds every command that was sent.
    """

    def __init__(self, clock: Clock = SYSTEM_CLOCK) -> None:
        self.clock = clock
        self.commands: list[tuple[Any, ...]] = []
        self.address = parse_address("redis://mock")
        self.connected = True
        self._data: dict[bytes, Value] = {}
        self._expires: dict[bytes, float] = {}
        self._known_scripts: set[str] = set()
        self._failures: deque[Exception] = deque()

    # -- as a manager

    @property
    def client(self) -> Self:
        """Itself."""
        return self

    async def connect(self) -> Self:
        """Itself."""
        return self

    async def aclose(self) -> None:
        """Nothing to give back."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    def fail_next(self, error: Exception, times: int = 1) -> None:
        """Make the next ``times`` commands raise ``error`` and do nothing."""
        self._failures.extend([error] * times)

    # -- commands

    async def execute_command(self, *args: Any, **_options: Any) -> Any:
        """Run one command.

        Raises:
            redis.exceptions.ResponseError: an unknown command or script, or what Redis would refuse.
        """
        await asyncio.sleep(0)
        self.commands.append(args)
        if self._failures:
            raise self._failures.popleft()
        name = str(args[0]).lower().replace(" ", "_")
        run = _COMMANDS.get(name)
        if run is None:
            raise ResponseError(f"unknown command '{args[0]}': MockRedis has {', '.join(sorted(_COMMANDS))}")
        return run(self, *args[1:])

    async def ping(self) -> bool:
        """True."""
        return bool(await self.execute_command("PING"))

    async def get(self, key: Any) -> bytes | None:
        """The string at ``key``."""
        value: bytes | None = await self.execute_command("GET", key)
        return value

    async def set(
        self, key: Any, value: Any, *, ex: int | None = None, px: int | None = None, nx: bool = False, xx: bool = False
    ) -> bool | None:
        """Set a string; None when ``nx`` or ``xx`` forbade it."""
        options = [*(("EX", ex) if ex is not None else ()), *(("PX", px) if px is not None else ())]
        options += [word for word, wanted in (("NX", nx), ("XX", xx)) if wanted]
        return True if await self.execute_command("SET", key, value, *options) else None

    async def delete(self, *keys: Any) -> int:
        """Delete keys; returns how many there were."""
        return int(await self.execute_command("DEL", *keys))

    async def exists(self, *keys: Any) -> int:
        """How many of ``keys`` there are."""
        return int(await self.execute_command("EXISTS", *keys))

    async def expire(self, key: Any, seconds: int) -> bool:
        """Let ``key`` expire in ``seconds``."""
        return bool(await self.execute_command("EXPIRE", key, seconds))

    async def pexpire(self, key: Any, ms: int) -> bool:
        """Let ``key`` expire in ``ms`` milliseconds."""
        return bool(await self.execute_command("PEXPIRE", key, ms))

    async def ttl(self, key: Any) -> int:
        """Seconds to live; -1 without expiry, -2 without key."""
        return int(await self.execute_command("TTL", key))

    async def pttl(self, key: Any) -> int:
        """Milliseconds to live; -1 without expiry, -2 without key."""
        return int(await self.execute_command("PTTL", key))

    async def incr(self, key: Any, amount: int = 1) -> int:
        """Add to the number at ``key``."""
        return int(await self.execute_command("INCRBY", key, amount))

    async def hset(
        self, key: Any, field: Any = None, value: Any = None, *, mapping: Mapping[Any, Any] | None = None
    ) -> int:
        """Set fields of a hash; returns how many are new."""
        pairs = [] if field is None else [field, value]
        for name, one in (mapping or {}).items():
            pairs += [name, one]
        return int(await self.execute_command("HSET", key, *pairs))

    async def hget(self, key: Any, field: Any) -> bytes | None:
        """One field of a hash."""
        value: bytes | None = await self.execute_command("HGET", key, field)
        return value

    async def hgetall(self, key: Any) -> dict[bytes, bytes]:
        """All fields of a hash."""
        flat: list[bytes] = await self.execute_command("HGETALL", key)
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def time(self) -> tuple[int, int]:
        """Seconds and microseconds of the clock."""
        seconds, micros = await self.execute_command("TIME")
        return int(seconds), int(micros)

    async def flushall(self) -> bool:
        """Forget every key."""
        return bool(await self.execute_command("FLUSHALL"))

    async def script_load(self, text: str) -> str:
        """Make a script known; returns its hash."""
        sha: bytes = await self.execute_command("SCRIPT LOAD", text)
        return sha.decode()

    async def evalsha(self, sha: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a known script."""
        return await self.execute_command("EVALSHA", sha, numkeys, *keys_and_args)

    async def eval(self, text: str, numkeys: int, *keys_and_args: Any) -> Any:
        """Run a script, which makes it known. No code is evaluated: the text is looked up among orchestra's own."""
        return await self.execute_command("EVAL", text, numkeys, *keys_and_args)

    # -- storage

    def _peek(self, key: Any) -> Value | None:
        name = _bytes(key)
        if self._expires.get(name, math.inf) <= self.clock.monotonic():
            self._drop(name)
        return self._data.get(name)

    def _string(self, key: Any) -> bytes | None:
        value = self._peek(key)
        if isinstance(value, dict):
            raise ResponseError(WRONGTYPE)
        return value

    def _hash(self, key: Any) -> dict[bytes, bytes]:
        value = self._peek(key)
        if isinstance(value, bytes):
            raise ResponseError(WRONGTYPE)
        return {} if value is None else value

    def _drop(self, name: bytes) -> bool:
        self._expires.pop(name, None)
        return self._data.pop(name, None) is not None

    def _store(self, key: Any, value: Any, ttl_ms: int | None = None) -> None:
        name, data = _bytes(key), _bytes(value)
        self._drop(name)
        self._data[name] = data
        if ttl_ms is not None:
            self._pexpire(key, ttl_ms)

    def _now_us(self) -> int:
        return int(self.clock.time() * 1_000_000)

    # -- one function a command

    def _ping(self) -> bytes:
        return b"PONG"

    def _time(self) -> list[bytes]:
        return [b"%d" % part for part in divmod(self._now_us(), 1_000_000)]

    def _set(self, key: Any, value: Any, *options: Any) -> bytes | None:
        words = [str(option).upper() for option in options]
        ttl = None
        for word, factor in (("EX", 1000), ("PX", 1)):
            if word in words:
                ttl = _int(options[words.index(word) + 1]) * factor
        if ttl is not None and ttl <= 0:
            raise ResponseError("invalid expire time in 'set' command")
        there = self._peek(key) is not None
        if ("NX" in words and there) or ("XX" in words and not there):
            return None
        self._store(key, value, ttl)
        return b"OK"

    def _del(self, *keys: Any) -> int:
        return sum(self._peek(key) is not None and self._drop(_bytes(key)) for key in keys)

    def _exists(self, *keys: Any) -> int:
        return sum(self._peek(key) is not None for key in keys)

    def _expire(self, key: Any, seconds: Any) -> int:
        return self._pexpire(key, _int(seconds) * 1000)

    def _pexpire(self, key: Any, ms: Any) -> int:
        if self._peek(key) is None:
            return 0
        self._expires[_bytes(key)] = self.clock.monotonic() + _int(ms) / 1000
        return 1

    def _ttl(self, key: Any) -> int:
        left = self._pttl(key)
        return left if left < 0 else (left + 500) // 1000

    def _pttl(self, key: Any) -> int:
        if self._peek(key) is None:
            return -2
        expires = self._expires.get(_bytes(key))
        return -1 if expires is None else max(0, round((expires - self.clock.monotonic()) * 1000))

    def _incr(self, key: Any, amount: Any = 1) -> int:
        value = _int(self._string(key) or b"0") + _int(amount)
        self._data[_bytes(key)] = b"%d" % value  # not _store: the expiry stays
        return value

    def _hset(self, key: Any, *pairs: Any) -> int:
        if not pairs or len(pairs) % 2:
            raise ResponseError("wrong number of arguments for 'hset' command")
        fields = self._hash(key)
        before = len(fields)
        fields.update(zip(map(_bytes, pairs[::2]), map(_bytes, pairs[1::2]), strict=True))
        self._data[_bytes(key)] = fields
        return len(fields) - before

    def _hget(self, key: Any, field: Any) -> bytes | None:
        return self._hash(key).get(_bytes(field))

    def _hgetall(self, key: Any) -> list[bytes]:
        return [part for pair in self._hash(key).items() for part in pair]

    def _flushall(self) -> bytes:
        self._data.clear()
        self._expires.clear()
        return b"OK"

    # -- scripts

    def _script_load(self, text: Any) -> bytes:
        known = next((name for name in _SCRIPTS if script(name).text == str(text)), None)
        if known is None:
            raise ResponseError(f"MockRedis runs only the scripts {', '.join(_SCRIPTS)}; test others on a real server")
        self._known_scripts.add(script(known).sha)
        return script(known).sha.encode()

    def _script_flush(self) -> bytes:
        self._known_scripts.clear()
        return b"OK"

    def _eval(self, text: Any, numkeys: Any, *rest: Any) -> Any:
        return self._evalsha(self._script_load(text).decode(), numkeys, *rest)

    def _evalsha(self, sha: Any, numkeys: Any, *rest: Any) -> Any:
        if sha not in self._known_scripts:
            raise NoScriptError("No matching script. Please use EVAL.")
        name = next(name for name in _SCRIPTS if script(name).sha == sha)
        count = _int(numkeys)
        return _SCRIPTS[name](self, rest[:count], rest[count:])

    def _gcra(self, keys: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """``lua/gcra.lua``: every number is whole microseconds, so Python's integers decide as Lua's doubles do."""

        def setting(name: str) -> str | None:
            found = self._hash(keys[0]).get(name.encode())
            return None if found is None else found.decode()

        try:
            names = [str(key) for key in keys]
            return twin.gcra(self._now_us(), names, args, self._text, self._store, setting)
        except twin.BadCallError as error:
            raise ResponseError(str(error)) from error

    def _text(self, key: str) -> str | None:
        found = self._string(key)
        return None if found is None else found.decode()

    def _gcra_return(self, keys: Sequence[Any], args: Sequence[Any]) -> int:
        return twin.gcra_return(self._now_us(), str(keys[0]), args, self._text, self._store)

    def _gcra_note(self, keys: Sequence[Any], args: Sequence[Any]) -> int:
        return int(self._hset(keys[0], args[0], args[1]) >= 0)

    def _lock_acquire(self, keys: Sequence[Any], args: Sequence[Any]) -> list[int]:
        holder = self._string(keys[0])
        if holder is not None and holder != _bytes(args[0]):
            return [0, max(1, self._pttl(keys[0]))]
        if holder is None:
            self._incr(keys[1])
        self._store(keys[0], args[0], _int(args[1]))
        return [_int(self._string(keys[1]) or b"0"), 0]

    def _lock_extend(self, keys: Sequence[Any], args: Sequence[Any]) -> int:
        return self._pexpire(keys[0], args[1]) if self._string(keys[0]) == _bytes(args[0]) else 0

    def _lock_release(self, keys: Sequence[Any], args: Sequence[Any]) -> int:
        return self._del(keys[0]) if self._string(keys[0]) == _bytes(args[0]) else 0


_NAMES = "ping time get set del exists expire pexpire ttl pttl hset hget hgetall flushall script_load script_flush eval evalsha"
_COMMANDS: dict[str, Callable[..., Any]] = {
    **{name: getattr(MockRedis, f"_{name}") for name in _NAMES.split() if name != "get"},
    "get": MockRedis._string,
    "incr": MockRedis._incr,
    "incrby": MockRedis._incr,
}
_SCRIPTS: dict[str, Callable[[MockRedis, Sequence[Any], Sequence[Any]], Any]] = {
    "gcra": MockRedis._gcra,
    "gcra_return": MockRedis._gcra_return,
    "gcra_note": MockRedis._gcra_note,
    "lock_acquire": MockRedis._lock_acquire,
    "lock_extend": MockRedis._lock_extend,
    "lock_release": MockRedis._lock_release,
}
