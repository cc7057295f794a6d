"""Who waits on whom, and how urgent that makes whom. Pure bookkeeping of ids and levels; no clock, no queue.

A task that others wait on is as urgent as the most urgent of them, transitively, for as long as they wait (Sha, Rajkumar
and Lehoczky, "Priority Inheritance Protocols", 1990). Waits that would close a circle are refused. Lower levels are more
urgent. One event loop; not thread-safe.
"""

from __future__ import annotations

from orchestra.errors import ConfigurationError

_NOBODY: frozenset[str] = frozenset()


class Inheritance:
    """The waits of one scheduler. An id is remembered while it waits or is waited on; others cost nothing.

    Invariant: ``_waiters`` mirrors ``_waits_on``; the graph they describe has no circle.
    """

    def __init__(self) -> None:
        self._waits_on: dict[str, set[str]] = {}
        self._waiters: dict[str, set[str]] = {}
        self._own: dict[str, int | None] = {}  # None: not known yet

    def __len__(self) -> int:
        return len(self._own)

    def __contains__(self, task_id: str) -> bool:
        return task_id in self._own

    def level(self, task_id: str, own: int) -> int:
        """How urgent ``task_id`` is, when nobody's waiting would make it ``own``. O(those who wait, transitively)."""
        best, seen, todo = own, {task_id}, list(self._waiters.get(task_id, _NOBODY))
        while todo:
            waiter = todo.pop()
            if waiter not in seen:
                seen.add(waiter)
                known = self._own[waiter]
                best = best if known is None else min(best, known)
                todo += self._waiters.get(waiter, _NOBODY)
        return best

    def own(self, task_id: str) -> int | None:
        """The level of its own that ``task_id`` was last known by; None if that is not known."""
        return self._own.get(task_id)

    def set_own(self, task_id: str, level: int) -> list[str]:
        """``task_id`` has another level of its own; returns whose urgency may have changed besides."""
        if task_id not in self._own:
            return []
        self._own[task_id] = level
        return self._below(task_id)

    def wait(self, waiter: str, level: int, on: str, on_level: int | None) -> list[str]:
        """``waiter`` waits for ``on`` from now on; returns whose urgency may have changed, ``on`` among them.

        ``level``, ``on_level``: their own; None is not known.

        Raises:
            ConfigurationError: ``on`` waits for ``waiter`` already, by itself or through others.
        """
        if waiter == on or waiter in self._below(on):
            raise ConfigurationError(
                f"inherit(waiter={waiter!r}, on={on!r}) would close a circle: {on!r} waits for {waiter!r} already",
                field="on",
                value=on,
            )
        self._own[waiter] = level
        if self._own.get(on) is None:
            self._own[on] = on_level
        self._waits_on.setdefault(waiter, set()).add(on)
        self._waiters.setdefault(on, set()).add(waiter)
        return self._below(waiter)

    def release(self, waiter: str, on: str | None = None) -> list[str]:
        """``waiter`` waits no more for ``on``, or for anything; returns whose urgency may have changed."""
        targets = list(self._waits_on.get(waiter, _NOBODY)) if on is None else [on]
        changed: dict[str, None] = {}
        for target in targets:
            if target in self._waits_on.get(waiter, _NOBODY):
                changed.update(dict.fromkeys((target, *self._below(target))))
                self._cut(waiter, target)
        return list(changed)

    def ended(self, task_id: str) -> list[str]:
        """Nobody waits for ``task_id`` any more and it waits for nobody; returns whose urgency may have changed."""
        for waiter in list(self._waiters.get(task_id, _NOBODY)):
            self._cut(waiter, task_id)
        return [task_id, *self.release(task_id)]

    def _below(self, task_id: str) -> list[str]:
        """Everything that ``task_id`` waits for, transitively."""
        found: dict[str, None] = {}
        todo = list(self._waits_on.get(task_id, _NOBODY))
        while todo:
            target = todo.pop()
            if target not in found:
                found[target] = None
                todo += self._waits_on.get(target, _NOBODY)
        return list(found)

    def _cut(self, waiter: str, on: str) -> None:
        for table, key, value in ((self._waits_on, waiter, on), (self._waiters, on, waiter)):
            table[key].discard(value)
            if not table[key]:
                del table[key]
        for task_id in (waiter, on):
            if task_id not in self._waits_on and task_id not in self._waiters:
                self._own.pop(task_id, None)
