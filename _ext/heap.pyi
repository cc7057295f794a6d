"""A heap of objects ordered by (priority, order of arrival)."""

from typing import Any, final

@final
class TaskHeap:
    """Lowest priority number first; first in, first out within a priority.

    Holds any object, None too. Thread-safe under the GIL: each method is one step. Seen by the garbage collector.
    24 bytes an entry besides the list of objects; the memory of a burst is given back when the heap runs empty.
    """

    def push(self, priority: int, obj: Any) -> None:
        """Add ``obj``. O(log n), amortised.

        Raises:
            TypeError: ``priority`` is not an int.
            OverflowError: ``priority`` does not fit 64 signed bits.
        """

    @property
    def arrivals(self) -> int:
        """How many objects were pushed so far: the next one's place in the order of arrival."""

    def insert(self, priority: int, sequence: int, obj: Any) -> None:
        """Add ``obj`` as if it had arrived as number ``sequence`` (from 0), which may be in the heap already. O(log n).

        Of two entries with the same priority and sequence either may come first.

        Raises:
            TypeError, OverflowError: as :meth:`push`.
            ValueError: there were not so many arrivals yet.
        """

    def pop(self) -> Any:
        """Remove and return the next object. O(log n). Raises IndexError when empty."""

    def pop_item(self) -> tuple[int, Any]:
        """Remove the next object and return ``(priority, object)``. O(log n). Raises IndexError when empty."""

    def peek(self) -> Any:
        """The next object, which stays. O(1). Raises IndexError when empty."""

    def pop_many(self, count: int) -> list[Any]:
        """Remove and return the next ``count`` objects, or all there are, in order. O(count * log n).

        Raises:
            ValueError: ``count`` is negative.
        """

    def entries(self) -> list[tuple[int, int, Any]]:
        """All as ``(priority, sequence, object)``, which stay, in no order: what :meth:`insert` takes. O(n)."""

    def clear(self) -> int:
        """Drop everything and return how many there were. A ``__del__`` that runs meanwhile finds an empty heap."""

    def __len__(self) -> int: ...
    def __sizeof__(self) -> int: ...
