"""The Lua scripts: one file each under ``lua/``, called by content hash; a long one names parts, in a folder of its name.

``EVALSHA`` first; a server that does not know the script (restart, failover, ``SCRIPT FLUSH``) gets ``EVAL`` with the
text, which also caches it. Content hashes let two releases run side by side, each calling the bytes it shipped with.
Every script may be repeated after a lost reply with the same effect.
"""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from importlib import resources
from typing import Any, Final, Protocol, TypeAlias, cast

import hiredis

Arg: TypeAlias = bytes | str | int | float

_PART: Final = re.compile(r"^-- part: (\w+/\w+)\n", re.MULTILINE)

# hiredis's own stub says that a command is a tuple of one element.
_pack: Callable[[tuple[Arg, ...]], bytes] = cast("Any", hiredis.pack_command)


class Script:
    """One script: ``name``, ``text`` and the ``sha`` that the server knows it by."""

    __slots__ = ("name", "sha", "text")

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        self.sha = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    def pack(self, keys: Sequence[str], args: Sequence[Arg]) -> bytes:
        """The call as bytes for a wire."""
        return _pack(("EVALSHA", self.sha, len(keys), *keys, *args))

    def pack_with_text(self, keys: Sequence[str], args: Sequence[Arg]) -> bytes:
        """The call for a server that has forgotten the script."""
        return _pack(("EVAL", self.text, len(keys), *keys, *args))


class Bound(Script):
    """``script`` with keys and first arguments that never change; ``more`` arguments (1 to 9) are packed call by call.

    What is fixed is packed once, here. ``pack`` and ``pack_with_text`` take no keys.
    """

    __slots__ = ("_fixed", "_head", "_keys", "_more")

    def __init__(self, script: Script, keys: Sequence[str], fixed: Sequence[Arg], more: int) -> None:
        super().__init__(script.name, script.text)
        self.sha = script.sha
        self._keys, self._fixed = tuple(keys), tuple(fixed)
        self._more = len(b"*%d\r\n" % more)
        packed = script.pack(self._keys, self._fixed)
        count, _, rest = packed.partition(b"\r\n")
        self._head = b"*%d\r\n%b" % (int(count[1:]) + more, rest)

    def pack(self, keys: Sequence[str], args: Sequence[Arg]) -> bytes:
        """The call as bytes for a wire; ``keys`` is empty."""
        return self._head + _pack(tuple(args))[self._more :]

    def pack_with_text(self, keys: Sequence[str], args: Sequence[Arg]) -> bytes:
        """The call for a server that has forgotten the script; ``keys`` is empty."""
        return super().pack_with_text(self._keys, (*self._fixed, *args))


class _Client(Protocol):
    async def execute_command(self, *args: Any, **options: Any) -> Any: ...


def _source(name: str) -> str:
    return resources.files("orchestra.lua").joinpath(f"{name}.lua").read_text("utf-8")


@functools.cache
def script(name: str) -> Script:
    """The script ``lua/<name>.lua``, each line ``-- part: <folder>/<file>`` of it replaced by the text of that file.

    Parts share the script's locals, as if they stood in it; a part has no parts.
    """
    return Script(name, _PART.sub(lambda line: _source(line[1]), _source(name)))


def forgotten(error: BaseException) -> bool:
    """Whether the server says that it does not know the script."""
    text = str(error)
    return text.startswith("NOSCRIPT") or "No matching script" in text


async def call(client: _Client, name: str, keys: Sequence[str], args: Sequence[Arg]) -> Any:
    """Run a script through a redis-py client; one round trip, two when the server has forgotten the script."""
    lua = script(name)
    try:
        return await client.execute_command("EVALSHA", lua.sha, len(keys), *keys, *args)
    except Exception as error:
        if not forgotten(error):
            raise
        return await client.execute_command("EVAL", lua.text, len(keys), *keys, *args)
