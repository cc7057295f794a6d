"""What the command line prints, and how it stays harmless: text from tasks never reaches the terminal unescaped.

Owns the consoles (results on standard output, everything else on standard error), tables and the words for times and
amounts. Refuses to own what is worth printing. Used by one thread.
"""

from __future__ import annotations

import base64
import json
import os
import re
import sys
import time
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI
    r"|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?"  # OSC, DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]?"
    r"|\x9b[0-?]*[ -/]*[@-~]"
)
_WIDE = 400
"""Columns of a table that does not go to a terminal."""


def _width(stream: Any) -> int | None:
    if stream.isatty():
        return None
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isdecimal() and int(columns) > 0 else _WIDE


def console(stream: Any = None) -> Console:
    """A console on ``stream`` (default: standard output), without markup, highlighting or emoji."""
    stream = stream or sys.stdout
    return Console(file=stream, width=_width(stream), markup=False, highlight=False, emoji=False, soft_wrap=False)


def say(text: str) -> None:
    """One line for people, on standard error."""
    print(clean(text), file=sys.stderr, flush=True)


def clean(text: Any, limit: int | None = None) -> str:
    """``text`` without terminal escapes; other control and direction characters are shown, not sent.

    Line breaks and tabs stay. With ``limit`` it becomes one line of at most so many characters.
    """
    plain = _ESCAPES.sub("", str(text))
    if limit is not None:
        plain = " ".join(plain.split())
    shown = "".join(ch if _is_harmless(ch) else f"\\u{ord(ch):04x}" for ch in plain)
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def _is_harmless(ch: str) -> bool:
    return ch.isprintable() or ch in "\n\t" or unicodedata.category(ch) == "Zs"


def print_json(value: Any) -> None:
    """``value`` as one line of JSON on standard output; what JSON does not know becomes text."""
    print(json.dumps(value, default=plain_value, ensure_ascii=False), flush=True)


def plain_value(value: Any) -> Any:
    """``value`` in terms of JSON: arrays as lists, bytes as base64, anything else as text."""
    if isinstance(value, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(bytes(value)).decode()}
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def pretty(value: Any) -> str:
    """``value`` as JSON over several lines, for people."""
    return clean(json.dumps(value, default=plain_value, ensure_ascii=False, indent=2))


def table(*columns: str | tuple[str, str]) -> Table:
    """A plain table; a column is its title, or title and justification."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        title, justify = (column, "left") if isinstance(column, str) else column
        made.add_column(title, justify=justify, overflow="fold" if justify == "left" else "ellipsis")  # type: ignore[arg-type]
    return made


def row(made: Table, cells: Sequence[Any], style: str | None = None) -> None:
    """Add a row of cleaned cells."""
    made.add_row(*(cell if isinstance(cell, Text) else Text(clean(cell)) for cell in cells), style=style)


def pairs(items: Iterable[tuple[str, Any]], indent: str = "  ") -> str:
    """Names and values under each other."""
    listed = [(name, clean(value)) for name, value in items]
    wide = max((len(name) for name, _ in listed), default=0)
    return "\n".join(f"{indent}{name:<{wide}}  {value}" for name, value in listed)


def ago(unix: float) -> str:
    """How long ago, in two units at most."""
    seconds = max(0.0, time.time() - unix)
    return f"{seconds:.0f} s ago" if seconds < 120 else f"{span(seconds)} ago"


def span(seconds: float) -> str:
    """A duration for people: ``0.3 s``, ``45 s``, ``3 min``, ``2 h 5 min``, ``4 d``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    if minutes < 120:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def hexdump(raw: bytes, limit: int = 256) -> str:
    """The first bytes as hexadecimal and text, as ``xxd`` has them."""
    lines = []
    for start in range(0, min(len(raw), limit), 16):
        part = raw[start : start + 16]
        digits = " ".join(f"{byte:02x}" for byte in part)
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"  {start:04x}  {digits:<47}  {text}")
    if len(raw) > limit:
        lines.append(f"  … {len(raw) - limit} more bytes")
    return "\n".join(lines) or "  (no bytes)"
