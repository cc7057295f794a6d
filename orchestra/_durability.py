"""How sure a sender is that an added task survives: the value type :class:`Durability`, and nothing else.

Owns the three modes, their ranges and their text form. Refuses to own how Redis is asked
(:mod:`orchestra._redis.durable_send`). Immutable; safe from any thread. What each mode may still lose is the table of
``docs/durability.md``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Self

from orchestra.errors import ConfigurationError
from orchestra.tasks import require_int, require_number

MODES = ("accepted", "replicated", "fsynced")
_TEXT = re.compile(r"(accepted|replicated|fsynced)(?:\(([^()]*)\))?")


@dataclass(frozen=True, slots=True)
class Durability:
    """When ``produce`` returns.

    ``accepted``: the server has executed it (the default). ``replicated``: ``replicas`` (1 to 100) replicas have
    received it, too. ``fsynced``: it is on the server's disk. Use :meth:`replicated` and :meth:`fsynced`, or a text:
    ``"accepted"``, ``"replicated(2)"``, ``"replicated(2, timeout=3)"``, ``"fsynced"``, ``"fsynced(timeout=3)"``.

    ``timeout``: seconds (0.001 to 3600) that a round trip waits for it; afterwards DurabilityError.

    Raises:
        ConfigurationError: naming what is wrong.
    """

    mode: str = "accepted"
    replicas: int = 0
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigurationError(
                f"durability must be accepted, replicated(n) or fsynced, got {self.mode!r}",
                field="durability",
                value=self.mode,
            )
        low, high = (1, 100) if self.mode == "replicated" else (0, 0)
        require_int("durability replicas", self.replicas, low, high)
        require_number("durability timeout", self.timeout, 0.001, 3600.0, unit="seconds")

    @classmethod
    def replicated(cls, replicas: int = 1, timeout: float = 5.0) -> Self:
        """Wait until ``replicas`` replicas have received the task (in memory; not: on disk)."""
        return cls("replicated", replicas, timeout)

    @classmethod
    def fsynced(cls, timeout: float = 5.0) -> Self:
        """Wait until the task is on the server's disk."""
        return cls("fsynced", 0, timeout)

    @classmethod
    def parse(cls, given: Self | str) -> Self:
        """``given`` itself, or what its text says. Raises ConfigurationError."""
        if isinstance(given, cls):
            return given
        found = _TEXT.fullmatch(given.replace(" ", "").lower()) if isinstance(given, str) else None
        if found is None:
            raise _bad(given)
        mode, inside = found[1], found[2]
        if mode == "accepted" and inside is not None:
            raise _bad(given)
        replicas, timeout = _numbers(inside.split(",") if inside else [], found[0])
        return cls(mode, 1 if mode == "replicated" and replicas is None else replicas or 0, timeout)

    @property
    def wanted(self) -> int:
        """Copies that are waited for beyond the server's memory: replicas, or the one on disk."""
        return self.replicas if self.mode == "replicated" else int(self.mode == "fsynced")

    def __str__(self) -> str:
        if self.mode == "accepted":
            return self.mode
        first = f"{self.replicas}, " if self.mode == "replicated" else ""
        return f"{self.mode}({first}timeout={self.timeout:g})"


ACCEPTED = Durability()


def _numbers(parts: list[str], given: str) -> tuple[int | None, float]:
    """Replicas (None: not given) and timeout in the parentheses of ``given``."""
    seen: dict[str, str] = {}
    for part in parts:
        name, equals, text = part.rpartition("=")
        name = name if equals else "replicas"
        if name not in ("replicas", "timeout") or name in seen:
            raise _bad(given)
        seen[name] = text
    try:
        replicas = int(seen["replicas"]) if "replicas" in seen else None
        return replicas, float(seen.get("timeout", "5"))
    except ValueError:
        raise _bad(given) from None


def _bad(given: object) -> ConfigurationError:
    return ConfigurationError(
        f"durability must be accepted, replicated(n), replicated(n, timeout=seconds), fsynced or "
        f"fsynced(timeout=seconds), got {given!r}",
        field="durability",
        value=given,
    )
