"""Smooth weighted round robin over hashable ids."""

from collections.abc import Hashable, Iterable
from typing import Any, Final, Self, final

MAX_WEIGHT: Final[int]
"""10_000."""
MAX_IDS: Final[int]
"""65_536 ids in a ring."""

@final
class SmoothRing:
    """Chooses ids in proportion to their weights, as evenly spread as possible (nginx's algorithm).

    After any change of weights or availability, the next ``sum(weights)`` selections contain each id exactly its weight
    times, and so does every such window from then on, wherever it begins; one that begins among the first may be uneven.
    Ids that are left out neither gain nor lose turns. Of equals, the one that joined first is chosen.

    A change of weights, a newcomer or a leaver keeps each lag (turns owed) in turns, centred on zero and bounded to one.

    ``default_weight``: an unknown id in an availability list joins with this weight; 0: it is ignored.
    Thread-safe under the GIL: each method is one step, whatever ``__hash__`` and ``__eq__`` of the ids do.

    Raises:
        ValueError: ``default_weight`` is not from 0 to 10_000.
    """

    @property
    def default_weight(self) -> int: ...
    def __new__(cls, *, default_weight: int = 0) -> Self: ...
    def set_weight(self, ident: Hashable, weight: int) -> None:
        """Let ``ident`` join or change its weight, 1 to 10_000; 0 removes it. O(n); O(1) in a ring not used yet.

        Raises:
            TypeError: ``ident`` is not hashable.
            ValueError: ``weight`` is not an int in range (a bool is not an int), or the ring has MAX_IDS ids.
        """

    def weight(self, ident: Hashable) -> int:
        """The weight of ``ident``, 0 if it is not in the ring. O(1)."""

    def remove(self, ident: Hashable) -> bool:
        """Take ``ident`` out. True if it was in. O(n)."""

    def ids(self) -> list[Any]:
        """The ids in order of arrival. O(n)."""

    def select(self, available: Iterable[Hashable] | None = None) -> Any:
        """The next id out of ``available`` (None: the whole ring), or None if there is none. O(n).

        Raises:
            TypeError: an id is not hashable.
            RuntimeError: hashing or comparing ids changed the ring a hundred times in a row.
        """

    def select_index(self, available: Iterable[Hashable]) -> int:
        """As :meth:`select`, but the position of the choice in ``available``, or -1. O(n)."""

    def __contains__(self, ident: Hashable, /) -> bool: ...
    def __len__(self) -> int: ...
