"""What can be observed, as a contract: every event's name, measurements and metadata are listed in :data:`EVENTS`.

A handler is a plain function ``handler(name, measurements, metadata)``, called in the thread that emits, between two
steps of the engine: it must be quick, must not await, and may not raise (one that raises is logged and detached).
``measurements`` are numbers (``*_s`` seconds, otherwise counts); keys listed for an event are always present.
An event nobody listens to costs one dict lookup. Thread-safe: handlers come and go under a lock, emitting takes none.

:class:`Counters` are the numbers that must add up: on a queue, ``produced + replayed == completed + dead + cancelled +
live``; they live in Redis and are moved by the same scripts that move the tasks.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping
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
    "queue.refused": Event(
        "tasks were refused; reason: length, dead_letters or memory (then the limit is 0)",
        ("count", "limit"),
        ("queue", "reason"),
    ),
    "queue.promoted": Event("delayed tasks became due", ("count",), ("queue",)),
    "queue.reclaimed": Event(
        "deliveries of dead or stalled consumers were taken over", ("count", "crashed"), ("queue",)
    ),
    "queue.quiet": Event(
        "nothing is reclaimed for a lease: idle times may include an outage; reason reconnect, server_changed, "
        "clock_jump or late",
        ("quiet_s",),
        ("queue", "reason"),
    ),
    "queue.ghosts": Event(
        "deliveries whose hand-over was lost on its way were taken at once", ("count",), ("queue", "consumer")
    ),
    "queue.lost": Event(
        "entries in flight or delayed were deleted by somebody else", ("count",), ("queue", "lane", "message_ids")
    ),
    "queue.data_loss_suspected": Event(
        "streams that held this queue were gone, or the server came back without them; what was held is given up",
        ("held",),
        ("queue", "lanes", "restarted"),
    ),
    "queue.reaped": Event("names of consumers that died long ago were forgotten", ("count",), ("queue",)),
    "queue.corrupt": Event(
        "an entry could not be decoded; it is a dead letter now", (), ("queue", "message_id", "reason", "error")
    ),
    "queue.cancelled": Event("tasks ended as cancelled", ("count",), ("queue",)),
    "queue.group_recreated": Event("the stream or its group was gone and was made again", (), ("queue", "lane")),
    "queue.reconnected": Event(
        "a connection to Redis was lost and is back", ("outage_s", "attempts"), ("queue", "role")
    ),
    "task.started": Event("an agent was handed a task", (), ("queue", "task_id", "type", "attempt", "worker_id")),
    "task.settled": Event(
        "a delivery ended",
        ("run_s",),
        ("queue", "task_id", "type", "attempt", "outcome", "error", "retry_in_s", "dead_reason"),
    ),
    "task.stale": Event("a settle came too late and changed nothing", (), ("queue", "task_id", "outcome")),
    "retry.throttled": Event(
        "retries wait longer than their backoff, because the retry budget is used up", ("count", "delay_s"), ("queue",)
    ),
    "task.stuck": Event("an agent ignores its cancellation", ("over_s",), ("queue", "task_id", "type")),
    "lease.renewed": Event("leases were prolonged", ("count", "lost"), ("queue",)),
    "lease.lost": Event("a delivery is no longer ours", (), ("queue", "task_id")),
    "lease.let_go": Event(
        "the event loop was blocked for max_stall: leases are no longer renewed", ("count", "blocked_s"), ("queue",)
    ),
    "loop.blocked": Event(
        "the event loop (kind loop) or the whole process (kind process) stood still; stack is what the loop runs",
        ("blocked_s",),
        ("queue", "kind", "stack"),
    ),
    "key.parked": Event(
        "tasks of a key (of a limit, an agent type or a breaker) wait until it is their turn",
        ("retry_after_s",),
        ("queue", "key"),
    ),
    "key.resumed": Event("tasks of a parked key start at once again", ("parked_s",), ("queue", "key")),
    "limiter.acquired": Event("a permit was given", ("cost",), ("limiter",)),
    "limiter.rejected": Event("a permit was refused", ("cost", "retry_after_s"), ("limiter", "local")),
    "breaker.changed": Event("a circuit breaker changed state", ("failures",), ("breaker", "old", "new")),
    "pool.resized": Event("a worker pool changed its concurrency", ("old", "new"), ("pool",)),
    "scheduler.expired": Event(
        "a task was dropped from a scheduler: its turn came after its deadline", ("late_s",), ("task_id", "type")
    ),
    "manager.recommendation": Event(
        "what the worker manager would change", ("current", "recommended"), ("pool", "reason")
    ),
    "dispatcher.started": Event("a dispatcher is ready", ("concurrency",), ("queue", "consumer")),
    "dispatcher.stopped": Event(
        "a dispatcher has drained", ("completed", "released", "duration_s"), ("queue", "consumer")
    ),
    "workflow.swept": Event("what workflows were ready for and nobody had sent was sent", ("count",), ("namespace",)),
    "dispatcher.exhausted": Event(
        "so many agents ignore their cancellation that fewer can run: restart the process",
        ("stuck", "capacity"),
        ("queue", "what"),
    ),
    "workflow.changed": Event(
        "a workflow or one of its steps changed state", ("completed", "total"), ("workflow_id", "status", "step")
    ),
    "service.loop_failed": Event("a background loop raised and is restarted", ("failures",), ("loop", "error")),
    "service.failed": Event("a background loop kept failing: its service stops", (), ("loop", "error")),
    "embedded.started": Event("a private redis-server was started", ("startup_s",), ("dir", "version", "pid")),
    "embedded.stopped": Event("a private redis-server was stopped", (), ("dir", "pid")),
}

_handlers: dict[str, tuple[Handler, ...]] = {}
listened = _handlers.keys()
"""The events that somebody listens to, as they are now: what :func:`wanted` asks, for paths that count every call."""
_changing = threading.Lock()


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
    with _changing:
        for name in chosen:
            _handlers[name] = (*_handlers.get(name, ()), handler)
    return lambda: _detach(handler, chosen)


def _detach(handler: Handler, names: Iterable[str]) -> None:
    with _changing:
        for name in names:
            rest = tuple(h for h in _handlers.get(name, ()) if h is not handler)
            if rest:
                _handlers[name] = rest
            else:
                _handlers.pop(name, None)


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
            _detach(handler, (name,))


_LEVELS = {
    "queue.corrupt": logging.ERROR,
    "queue.group_recreated": logging.WARNING,
    "queue.reconnected": logging.WARNING,
    "queue.refused": logging.WARNING,
    "queue.reclaimed": logging.WARNING,
    "queue.quiet": logging.INFO,
    "queue.ghosts": logging.WARNING,
    "queue.lost": logging.ERROR,
    "queue.data_loss_suspected": logging.ERROR,
    "task.stale": logging.WARNING,
    "task.stuck": logging.ERROR,
    "retry.throttled": logging.WARNING,
    "lease.lost": logging.WARNING,
    "lease.let_go": logging.ERROR,
    "loop.blocked": logging.WARNING,
    "breaker.changed": logging.WARNING,
    "manager.recommendation": logging.INFO,
    "dispatcher.started": logging.INFO,
    "dispatcher.stopped": logging.INFO,
    "dispatcher.exhausted": logging.ERROR,
    "service.failed": logging.ERROR,
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
