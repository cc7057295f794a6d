"""The event loop and the garbage collector of a process that is orchestra's own.

Owns what only the owner of a process may decide: which event loop it runs on, and what its collector looks at. The
commands are such owners; an App inside another program takes what it finds there and changes neither. Refuses to own
signals and how a process ends. For the main thread, once in a process. What each choice gains: docs/deployment.md.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from orchestra.errors import ConfigurationError

T = TypeVar("T")

LOOPS = ("auto", "asyncio", "uvloop")
"""Names of event loops; auto: uvloop where it is installed."""


def loop_factory(name: str = "auto") -> Callable[[], asyncio.AbstractEventLoop] | None:
    """What makes the event loop called ``name``, one of :data:`LOOPS`; None: asyncio's own.

    Raises:
        ConfigurationError: there is no such name, or uvloop is asked for and not installed.
    """
    if name not in LOOPS:
        raise ConfigurationError(f"--loop must be {', '.join(LOOPS)}, got {name!r}", field="--loop", value=name)
    if name == "asyncio":
        return None
    try:
        import uvloop  # noqa: PLC0415 - an extra
    except ImportError:
        if name == "auto":
            return None
        raise ConfigurationError(
            "--loop uvloop needs uvloop: pip install 'orchestra-engine[uvloop]'", field="--loop", value=name
        ) from None
    made: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return made


def run(main: Coroutine[Any, Any, T], loop: str = "auto") -> T:
    """:func:`asyncio.run` on the event loop called ``loop``.

    Raises:
        ConfigurationError: as :func:`loop_factory`; ``main`` is closed then.
    """
    try:
        factory = loop_factory(loop)
    except ConfigurationError:
        main.close()
        raise
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


def set_heap_aside() -> None:
    """Collect once, and let no later collection look at what is alive now. Tens of milliseconds.

    For the moment when a worker has loaded its App and has no task yet: modules, agents and scripts stay for as long as
    the process does, and are most of what a full collection would go through. Thresholds stay as they are.
    """
    gc.collect()
    gc.freeze()
