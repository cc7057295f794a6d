"""Where values end in a stream of Redis's protocol. No I/O, no meaning."""

from __future__ import annotations

from typing import NamedTuple

HEAD = 3
"""Leading bulk strings of a value that are kept, to know a command by."""
HEAD_BYTES = 100_000


class Frame(NamedTuple):
    """One RESP value at top level: its bytes and its first bulk strings."""

    data: bytes
    head: tuple[bytes, ...]


class Framer:
    """Finds where values end in a stream of RESP 2 or 3, or of commands. What is no RESP passes unframed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.broken = False
        self._begin()

    def _begin(self) -> None:
        self._at, self._open, self._head = 0, 1, []

    def feed(self, data: bytes) -> list[Frame]:
        """The values that ``data`` completes."""
        self._buffer += data
        frames: list[Frame] = []
        try:
            while not self.broken and (end := self._end()):
                frames.append(Frame(bytes(self._buffer[:end]), tuple(self._head)))
                del self._buffer[:end]
                self._begin()
        except ValueError:
            self.broken = True
        if self.broken:
            frames.append(Frame(self.rest(), ()))
        return frames

    def rest(self) -> bytes:
        """What belongs to no complete value, taken out."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        self._begin()
        return rest

    def _end(self) -> int:
        buffer = self._buffer
        while self._open:
            eol = buffer.find(b"\r\n", self._at)
            if eol < 0:
                return 0
            kind, after = buffer[self._at : self._at + 1], eol + 2
            if kind in b"$=!":
                length = int(buffer[self._at + 1 : eol])
                after += length + 2 if length >= 0 else 0
                if len(buffer) < after:
                    return 0
                if len(self._head) < HEAD and length <= HEAD_BYTES:
                    self._head.append(bytes(buffer[eol + 2 : max(eol + 2, after - 2)]))
            elif kind in b"*~>%|":
                values = max(0, int(buffer[self._at + 1 : eol])) * (2 if kind in b"%|" else 1)
                self._open += values + (kind == b"|")  # an attribute stands before the value it belongs to
            elif kind not in b"+-:_#,(":
                self._head += bytes(buffer[self._at : eol]).split()[:HEAD]  # an inline command
            self._at = after
            self._open -= 1
        return self._at
