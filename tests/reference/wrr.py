"""Oracle of ``orchestra._ext.wrr``: nginx's smooth weighted round robin over a plain list, kept exact in books."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

UNIT = 1 << 16


class SmoothRing:
    def __init__(self, *, default_weight: int = 0) -> None:
        self.default_weight = default_weight
        self._members: list[list[Any]] = []  # [ident, weight, current], in order of arrival
        self._book: dict[Any, int] = {}  # turns that each candidate may still have; empty: none is open
        self._whole = False

    def __len__(self) -> int:
        return len(self._members)

    def ids(self) -> list[Any]:
        return [member[0] for member in self._members]

    def weight(self, ident: Any) -> int:
        return next((member[1] // UNIT for member in self._members if member[0] == ident), 0)

    def set_weight(self, ident: Any, weight: int) -> None:
        if weight == 0:
            self.remove(ident)
        elif ident in self.ids():
            member = self._members[self.ids().index(ident)]
            if member[1] == weight * UNIT:
                return
            self._rebase(self._total() - member[1] + weight * UNIT)
            member[1] = weight * UNIT
        else:
            self._rebase(self._total() + weight * UNIT)
            self._members.append([ident, weight * UNIT, 0])

    def remove(self, ident: Any) -> bool:
        if ident not in self.ids():
            return False
        before = self._total()
        gone = self._members.pop(self.ids().index(ident))
        self._rebase(before - gone[1], before)
        return True

    def select(self, available: Iterable[Any] | None = None) -> Any:
        candidates = self._members
        if available is not None:
            wanted = list(available)
            for ident in wanted:
                if self.default_weight and ident not in self.ids():
                    self.set_weight(ident, self.default_weight)
            candidates = [member for member in self._members if member[0] in wanted]
        if not candidates:
            return None
        for member in candidates:
            member[2] += member[1]
        if self._book.keys() != {member[0] for member in candidates} or self._whole != (available is None):
            self._whole = available is None
            self._book = {member[0]: member[1] // UNIT for member in candidates}
        able = [member for member in candidates if self._book[member[0]]]
        chosen = max(able, key=lambda member: member[2])  # max keeps the first of equals
        chosen[2] -= sum(member[1] for member in candidates)
        self._book[chosen[0]] -= 1
        if not any(self._book.values()):
            self._book = {}
            for member in candidates:
                member[2] = 0
        return chosen[0]

    def _total(self) -> int:
        return sum(member[1] for member in self._members)

    def _rebase(self, total: int, before: int = 0) -> None:
        self._book = {}
        if not self._members:
            return
        ratio = float(total) / float(before or self._total())
        for member in self._members:
            member[2] = int(member[2] * ratio)
        owed = sum(member[2] for member in self._members)
        mean = abs(owed) // len(self._members) * (1 if owed > 0 else -1)
        for member in self._members:
            member[2] = max(-total, min(total, member[2] - mean))
