"""The scripts ``lua/gcra*.lua`` in Python, with the same whole numbers: for ``memory:`` limits and for tests.

Owns the decision where no Redis is, and the cells of this process; refuses to own a clock: the time is an argument.
Every function is one step; whoever holds the store serialises them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

MOST = 2**53
"""The longest wait that is told, microseconds."""
HORIZON = 2**48
"""Microseconds: nobody in the line is told to come back later."""
BACK = 60_000_000
"""Microseconds that the time of a give-back is kept: longer than any lease."""

MAX_NAMES = 10_000
"""Limits that are listed."""
_SWEEP = 1024
_VERSION = re.compile(r"\d+")

Load = Callable[[str], str | None]
Store = Callable[[str, str, int], None]
"""Key, text, and milliseconds to live."""


class BadCallError(ValueError):
    """What the script would answer with an error."""


def gcra(now: int, keys: Sequence[str], args: Sequence[Any], load: Load, store: Store, setting: Load) -> list[Any]:
    """``lua/gcra.lua`` at ``now``, microseconds; ``setting``: the text set for the limit of a name.

    Raises:
        BadCallError: the arguments are not what the script expects.
    """
    try:
        call = _Call(now, keys, args)
    except (IndexError, ValueError) as error:
        raise BadCallError(f"gcra: {error}") from error
    changed: list[Any] = ["!"]
    for number, (name, version, _, _) in enumerate(call.limits, 1):
        text = setting(name) or ""
        found = _VERSION.match(text)
        if (found[0] if found else "0") != version:
            changed += (number, text)
    if len(changed) > 1:
        return changed
    call.load(load)
    reply = [part for request in call.requests for part in call.decide(*request)]
    call.store(store)
    return [now, *call.tats, *reply]


class _Call:
    """One call: what it names, and its cells while it decides."""

    def __init__(self, now: int, keys: Sequence[str], args: Sequence[Any]) -> None:
        count = _whole(args[0], 1)
        self.now, self.keys = now, keys[1:]
        self.limits = [
            (str(args[i]), str(args[i + 1]), _whole(args[i + 2], 1), _whole(args[i + 3], _whole(args[i + 2], 1)))
            for i in range(1, 1 + 4 * count, 4)
        ]
        at = 1 + 4 * count
        self.of = [self.limits[_whole(number, 1) - 1][2:] for number in args[at : at + len(self.keys)]]
        self.requests: list[tuple[int, list[tuple[int, int, int]]]] = []
        at += len(self.keys)
        while at < len(args) or not self.requests:
            flags, uses = _whole(args[at], 0), _whole(args[at + 1], 1)
            self.requests.append((flags, [self._use(args, at + 2 + 3 * use) for use in range(uses)]))
            if len({cell for cell, _, _ in self.requests[-1][1]}) < uses or flags > 7:
                raise ValueError("a cell once a request, flags up to 7")
            at += 2 + 3 * uses

    def _use(self, args: Sequence[Any], at: int) -> tuple[int, int, int]:
        cell = _whole(args[at], 1) - 1
        emission, burst = self.of[cell]
        return cell, _whole(args[at + 1], 1) * emission, burst - _whole(args[at + 2], 0)

    def load(self, load: Load) -> None:
        cells = len(self.keys)
        self.tats, self.lines, self.backs = [0] * cells, [0] * cells, [0] * cells
        self.write, self.blocked = [False] * cells, [False] * cells
        for cell, key in enumerate(self.keys):
            parts = [int(part) for part in (load(key) or "0").split()]
            stored, self.lines[cell], self.backs[cell], pace = (*parts, 0, 0, 0)[:4]
            emission = self.of[cell][0]
            if pace > emission and self.lines[cell] > self.now:
                left = math.floor(float(self.lines[cell] - self.now) * float(emission) / float(pace))
                self.lines[cell], self.write[cell] = self.now + left, True
            top = self.now + self.of[cell][1]
            if stored > top:
                self.lines[cell], self.write[cell] = 0, True
            self.tats[cell] = max(self.now, min(stored, top))
        self.ends = list(self.tats)

    def decide(self, flags: int, uses: list[tuple[int, int, int]]) -> tuple[int, int]:
        wait, which = 0, 0
        for cell, need, usable in uses:
            late = self.ends[cell] + need - usable - self.now
            if late > 0 or self.blocked[cell]:
                if flags & 2 and late > 0:
                    end = max(self.lines[cell], self.tats[cell]) + need
                    self.lines[cell] = min(end, self.now + HORIZON)
                    late = max(late, self.lines[cell] - usable - self.now)
                    self.write[cell] = True
                late = min(max(late, 1), MOST)
                if late > wait:
                    wait, which = late, cell + 1
        for cell, need, _ in uses:
            if not wait:
                self.tats[cell] = self.ends[cell] = self.ends[cell] + need
                self.write[cell] = True
            elif flags & 1:
                self.blocked[cell] = True
                self.ends[cell] += need
        return wait, self.tats[uses[0][0]] if not wait and flags & 4 else which

    def store(self, store: Store) -> None:
        for cell, key in enumerate(self.keys):
            line = self.lines[cell] if self.lines[cell] > self.now else 0
            back = self.backs[cell] if self.now - BACK < self.backs[cell] <= self.now else 0
            last = max(self.tats[cell], line, back + BACK if back else 0)
            if self.write[cell] and last > self.now:
                text = str(self.tats[cell])
                if line or back:
                    text += f" {line} {back} {self.of[cell][0]}"
                store(key, text, _ttl_ms(last - self.now))


def gcra_return(now: int, key: str, args: Sequence[Any], load: Load, store: Store) -> int:
    """``lua/gcra_return.lua`` at ``now``, microseconds."""
    left, taken, amount = (_whole(arg, 0) for arg in args)
    parts = [int(part) for part in (load(key) or "0").split()]
    tat, line, back = (*parts, 0, 0)[:3]
    pace = f" {parts[3]}" if len(parts) > 3 else ""
    given = min(amount, left - now)
    if given < 1 or taken > now or now - taken > BACK // 2 or back >= taken or tat < left:
        return 0
    last = max(tat, line, now + BACK)
    store(key, f"{tat - given} {line} {now}{pace}", _ttl_ms(last - now))
    return given


def _ttl_ms(us: int) -> int:
    return math.ceil(us / 1000) + 1


def _whole(value: Any, low: int) -> int:
    number = int(value.decode() if isinstance(value, bytes) else value)
    if number < low:
        raise ValueError(f"{number} is below {low}")
    return number


class MemoryCells:
    """Limits in this process, for ``memory:``; expired cells are swept when their number has doubled."""

    def __init__(self) -> None:
        self._cells: dict[str, tuple[str, int]] = {}
        self.hashes: dict[str, dict[str, str]] = {}
        self._sweep_at = _SWEEP
        self._now_us = 0

    def run(self, name: str, now_us: int, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """What the script ``name`` would do at ``now_us``."""
        self._now_us = now_us
        if name == "gcra":
            settings = self.hashes.setdefault(keys[0], {})
            reply = gcra(now_us, keys, args, self._load, self._store, settings.get)
            if len(self._cells) > self._sweep_at:
                self._sweep()
            return reply
        if name == "gcra_return":
            return gcra_return(now_us, keys[0], args, self._load, self._store)
        hashed = self.hashes.setdefault(keys[0], {})
        if name == "gcra_note":
            if len(hashed) < MAX_NAMES:
                hashed[str(args[0])] = str(args[1])
            return 1
        if not int(args[1]):
            return int(hashed.pop(str(args[0]), None) is not None)
        before = hashed.get(str(args[0]), "0").split()[0]
        version = max(now_us, int(before) + 1)
        hashed[str(args[0])] = " ".join(map(str, (version, *args[1:])))
        return version

    def _load(self, key: str) -> str | None:
        text, expires_us = self._cells.get(key, ("", 0))
        return text if expires_us > self._now_us else None

    def _store(self, key: str, text: str, ttl_ms: int) -> None:
        self._cells[key] = (text, self._now_us + ttl_ms * 1000)

    def _sweep(self) -> None:
        self._cells = {key: cell for key, cell in self._cells.items() if cell[1] > self._now_us}
        self._sweep_at = max(_SWEEP, 2 * len(self._cells))
