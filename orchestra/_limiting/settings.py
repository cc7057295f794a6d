"""What rate limits are at run time: set, reset and listed, for every process that uses them.

Owns the stored settings and their validation (before Redis is touched), and the survey for people. Refuses to own how
limiters learn of them: ``lua/gcra.lua`` compares versions at every call. Changes are single scripts; anybody may run them.

Across a change no more is admitted than by the old setting before it and by the new one after it: what was used up is kept
as time, so over a window with the change in it the sum of both bounds holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from orchestra import _keys
from orchestra._clock import SYSTEM_CLOCK
from orchestra._limiting.refusals import per_second
from orchestra._limiting.rules import RateLimitConfig
from orchestra._limiting.store import address_of, find_store
from orchestra.connections import get_connection_manager, store_errors
from orchestra.errors import ConfigurationError
from orchestra.tasks import check_ident, check_name

if TYPE_CHECKING:
    from orchestra.connections import ConnectionManager

_PAGE = 500


class LimitStatus(NamedTuple):
    """A limit as it is now. ``rate`` permits per ``period`` seconds, ``burst`` permits.

    ``keys``: how many keys of it have used permits that are not back yet. ``available``: permits that could be had now,
    of its fullest key. ``version``: microseconds of the Redis clock at which it was set at run time, 0 if it was not.
    ``refused``: requests and parked tasks a second that all processes together refused in the last ten seconds.
    """

    name: str
    scope: str
    rate: float
    burst: int
    period: float
    keys: int
    available: int
    version: int
    refused: float = 0.0


async def set_limit(
    name: str,
    *,
    rate: float,
    burst: int,
    period: float = 1.0,
    scope: str = "all",
    manager: ConnectionManager | str | None = None,
) -> int:
    """Let the limit ``name`` be ``rate`` permits per ``period`` seconds and ``burst`` at once, whatever its limiters say.

    Every process follows at its next call to Redis, within a second where it asks at all. It stays until
    :func:`reset_limit`. Returns the version of the setting. One round trip.

    Raises:
        ConfigurationError: see :class:`RateLimitConfig`; nothing was sent.
        StoreUnavailableError: Redis cannot be asked.
    """
    check_ident("limiter name", name)
    limit = RateLimitConfig(rate=rate, burst=burst, period=period)
    store = find_store(manager, address_of(manager), check_name("limit scope", scope), SYSTEM_CLOCK)
    args = (name, limit.emission_us, limit.burst_us, repr(rate), repr(period))
    return int(await store.run("gcra_set", (store.settings_key,), args))


async def reset_limit(name: str, *, scope: str = "all", manager: ConnectionManager | str | None = None) -> bool:
    """Let the limit ``name`` be what its limiters were made with again; whether it was set. One round trip.

    Raises:
        ConfigurationError: a bad name. StoreUnavailableError: Redis cannot be asked.
    """
    check_ident("limiter name", name)
    store = find_store(manager, address_of(manager), check_name("limit scope", scope), SYSTEM_CLOCK)
    return bool(await store.run("gcra_set", (store.settings_key,), (name, 0, 0, 0, 0)))


async def list_limits(*, manager: ConnectionManager | str | None = None) -> list[LimitStatus]:
    """The limits in use on a Redis, sorted by scope and name. Cost: one SCAN over all its keys; for people, not for loops.

    Raises:
        ConfigurationError: ``memory:``. StoreUnavailableError: Redis cannot be asked.
    """
    if address_of(manager).scheme == "memory":
        raise ConfigurationError("limits on memory: cannot be listed", field="manager", value="memory:")
    where = get_connection_manager(manager) if manager is None or isinstance(manager, str) else manager
    await where.connect()
    client = where.client
    limits: dict[tuple[str, str], list[str]] = {}
    debts: dict[tuple[str, str], list[int]] = {}
    refused: dict[tuple[str, str], float] = {}
    with store_errors(where.address.safe, "SCAN"):
        seconds, micros = await client.time()
        keys = [key.decode() async for key in client.scan_iter(match=f"{_keys.PREFIX}{{lim.*", count=1000)]
        cells = []
        for key in sorted(keys):  # "names" comes before "set", which goes before it
            scope, rest = _parted(key)
            if rest == "refused":
                for name, text in (await client.hgetall(key)).items():
                    refused[scope, name.decode()] = per_second(text.decode(), seconds + micros / 1e6)
            elif rest in ("names", "set"):
                for name, text in (await client.hgetall(key)).items():
                    limits[scope, name.decode()] = ["0" if rest == "names" else "", *text.decode().split()][-5:]
            else:
                cells.append((key, (scope, _name_of(rest))))
        for page in (cells[at : at + _PAGE] for at in range(0, len(cells), _PAGE)):
            for (_, limit), text in zip(page, await client.mget([key for key, _ in page]), strict=True):
                if text is not None:
                    debts.setdefault(limit, []).append(int(text.split()[0]) - (seconds * 1_000_000 + micros))
    return sorted(status._replace(refused=refused.get(status[1::-1], 0.0)) for status in _statuses(limits, debts))


def _statuses(
    limits: dict[tuple[str, str], list[str]], debts: dict[tuple[str, str], list[int]]
) -> Iterator[LimitStatus]:
    for (scope, name), (version, emission, burst, rate, period) in limits.items():
        used = [debt for debt in debts.get((scope, name), ()) if debt > 0]
        emission_us, burst_us = int(emission), int(burst)
        left = max(0, burst_us - max(used, default=0)) // emission_us
        yield LimitStatus(
            name, scope, float(rate), burst_us // emission_us, float(period), len(used), left, int(version)
        )


def _parted(key: str) -> tuple[str, str]:
    """Scope and rest of a key ``orc:{lim.<scope>}:<rest>``; a scope has no brace."""
    scope, _, rest = key.removeprefix(f"{_keys.PREFIX}{{lim.").partition("}:")
    return scope, rest


def _name_of(rest: str) -> str:
    kind, _, rest = rest.partition(":")
    if kind == "t":
        return rest
    length, _, rest = rest.partition(":")
    return rest[: int(length)]
