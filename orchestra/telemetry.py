"""What can be observed, as a contract: every event's name, measurements and metadata are listed in :data:`EVENTS`.

A handler is a plain function ``handler(name, measurements, metadata)``, called in the thread that emits, between two
steps of the engine: it must be quick, must not await, and may not raise (one that raises is logged and detached).
``measurements`` are numbers (``*_s`` seconds, otherwise counts); keys listed for an event are always present.
An event nobody listens to costs one dict lookup.

:class:`Counters` are the numbers that must add up: on a queue, ``produced + replayed == completed + dead + cancelled +
live``; they live in Redis and are moved by the same scripts that move the tasks.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

logger = logging.getLogger("orchestra.telemetry")

Handler: TypeAlias = Callable[[str, Mapping[str, float], Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Event:
    """One row of the catalogue."""

    doc: str
    measurements: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()


EVENTS: dict[str, Event] = {
    "queue.produced": Event("tasks were added to a queue", ("count", "duplicates", "duration_s"), ("queue",)),
    "queue.refused": Event("a full queue refused tasks", ("count", "limit"), ("queue",)),
    "queue.promoted": Event("delayed tasks became due", ("count",), ("queue",)),
    "queue.reclaimed": Event(
        "deliveries of dead or stalled consumers were taken over", ("count", "crashed"), ("queue",)
    ),
    "queue.corrupt": Event(
        "an entry could not be decoded; it is a dead letter now", (), ("queue", "message_id", "error")
    ),
    "queue.group_recreated": Event("the stream or its group was gone and was made again", (), ("queue", "lane")),
    "queue.reconnected": Event(
        "a connection to Redis was lost and is back", ("outage_s", "attempts"), ("queue", "role")
    ),
    "task.started": Event("an agent was handed a task", (), ("queue", "task_id", "type", "attempt")),
    "task.settled": Event(
        "a delivery ended",
        ("run_s",),
        ("queue", "task_id", "type", "attempt", "outcome", "error", "retry_in_s", "dead_reason"),
    ),
    "task.stale": Event("a settle came too late and changed nothing", (), ("queue", "task_id", "outcome")),
    "task.stuck": Event("an agent ignores its cancellation", ("over_s",), ("queue", "task_id", "type")),
    "lease.renewed": Event("leases were prolonged", ("count", "lost"), ("queue",)),
    "lease.lost": Event("a delivery is no longer ours", (), ("queue", "task_id")),
    "limiter.acquired": Event("a permit was given", ("cost",), ("limiter",)),
    "limiter.rejected": Event("a permit was refused", ("cost", "retry_after_s"), ("limiter", "local")),
    "breaker.changed": Event("a circuit breaker changed state", ("failures",), ("breaker", "old", "new")),
    "pool.resized": Event("a worker pool changed its concurrency", ("old", "new"), ("pool",)),
    "manager.recommendation": Event(
        "what the worker manager would change", ("current", "recommended"), ("pool", "reason")
    ),
    "dispatcher.started": Event("a dispatcher is ready", ("concurrency",), ("queue", "consumer")),
    "dispatcher.stopped": Event(
        "a dispatcher has drained", ("completed", "released", "duration_s"), ("queue", "consumer")
    ),
    "workflow.changed": Event(
        "a workflow or one of its steps changed state", ("completed", "total"), ("workflow_id", "status", "step")
    ),
    "service.loop_failed": Event("a background loop raised and is restarted", ("failures",), ("loop", "error")),
    "embedded.started": Event("a private redis-server was started", ("startup_s",), ("dir", "version", "pid")),
    "embedded.stopped": Event("a private redis-server was stopped", (), ("dir", "pid")),
}

_handlers: dict[str, tuple[Handler, ...]] = {}


def attach(handler: Handler, *names: str) -> Callable[[], None]:
    """Call ``handler`` for the events ``names`` (for all of them when none is given).

    Returns a function that detaches it again.

    Raises:
        KeyError: a name is not in :data:`EVENTS`; the message lists the valid ones.
    """
    for name in names:
        if name not in EVENTS:
            raise KeyError(f"unknown event {name!r}; events are {', '.join(sorted(EVENTS))}")
    chosen = names or tuple(EVENTS)
    for name in chosen:
        _handlers[name] = (*_handlers.get(name, ()), handler)

    def detach() -> None:
        for name in chosen:
            rest = tuple(h for h in _handlers.get(name, ()) if h is not handler)
            if rest:
                _handlers[name] = rest
            else:
                _handlers.pop(name, None)

    return detach


def wanted(name: str) -> bool:
    """Whether anybody listens to ``name``: hot paths ask before they build the arguments of :func:`emit`."""
    return name in _handlers


def emit(name: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """Tell everybody who listens to ``name``."""
    for handler in _handlers.get(name, ()):
        try:
            handler(name, measurements, metadata)
        except Exception:
            logger.exception("telemetry handler %r raised on %s and is detached", handler, name)
            _handlers[name] = tuple(h for h in _handlers.get(name, ()) if h is not handler)
            if not _handlers[name]:
                del _handlers[name]


_LEVELS = {
    "queue.corrupt": logging.ERROR,
    "queue.group_recreated": logging.WARNING,
    "queue.reconnected": logging.WARNING,
    "queue.refused": logging.WARNING,
    "queue.reclaimed": logging.WARNING,
    "task.stale": logging.WARNING,
    "task.stuck": logging.ERROR,
    "lease.lost": logging.WARNING,
    "breaker.changed": logging.WARNING,
    "manager.recommendation": logging.INFO,
    "dispatcher.started": logging.INFO,
    "dispatcher.stopped": logging.INFO,
    "embedded.started": logging.INFO,
    "embedded.stopped": logging.INFO,
}


def log_event(name: str, measurements: Mapping[str, float], metadata: Mapping[str, Any]) -> None:
    """A handler that writes events to the logger ``orchestra.events``, with all facts as attributes of the record."""
    facts = {**measurements, **metadata}
    text = " ".join(f"{key}={_short(value)}" for key, value in facts.items() if value is not None)
    logging.getLogger("orchestra.events").log(
        _LEVELS.get(name, logging.DEBUG), "%s %s", name, text, extra={"event": name, "facts": facts}
    )


def attach_default_logger() -> Callable[[], None]:
    """Log the events that an operator wants to see (level INFO and above); returns the detacher."""
    return attach(log_event, *_LEVELS)


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    text = str(value)
    clean = "".join(ch if ch.isprintable() else f"\\x{ord(ch):02x}" for ch in text[:300])  # no terminal escapes in logs
    return clean if " " not in clean else repr(clean)


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time level logger message`` and the facts of an event."""

    def format(self, record: logging.LogRecord) -> str:
        """The line for ``record``."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update(getattr(record, "facts", {}))
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
