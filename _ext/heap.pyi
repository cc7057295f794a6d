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

    def clear(self) -> int:
        """Drop everything and return how many there were. A ``__del__`` that runs meanwhile finds an empty heap."""

    def __len__(self) -> int: ...
    def __sizeof__(self) -> int: ...
