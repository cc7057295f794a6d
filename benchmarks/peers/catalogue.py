"""Which queues are compared, what each needs, and what it promises in the configuration that is measured.

Owns facts about peers that the table shows. Refuses to own their settings, which are in the peer's program.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of the comparison. ``tasks``: how many a full drain has, so that it lasts seconds and not minutes."""

    name: str
    program: str
    requirements: tuple[str, ...] = ()
    minimum: tuple[int, int] = (3, 11)
    tasks: int = 20_000
    acknowledges: bool
    """A task stays in Redis until it has run; else a killed worker loses what it held."""
    deduplicates: bool
    """A second task of the same id, sent while the first waits, is not queued: part of what was measured."""
    note: str = ""
    node: bool = False
    own: bool = False


PEERS = (
    Peer(
        name="orchestra",
        program="with_orchestra",
        tasks=100_000,
        acknowledges=True,
        deduplicates=True,
        note="queue and dispatcher, own ids",
        own=True,
    ),
    Peer(
        name="orchestra (App)",
        program="with_orchestra_app",
        tasks=100_000,
        acknowledges=True,
        deduplicates=True,
        note="the front door, results kept",
        own=True,
    ),
    Peer(
        name="ardiq",
        program="with_ardiq",
        requirements=("ardiq", "uvloop"),
        minimum=(3, 12),
        tasks=50_000,
        acknowledges=True,
        deduplicates=True,
        note="core in Rust, results dropped",
    ),
    Peer(
        name="bullmq (Node)",
        program="with_bullmq_node",
        requirements=("bullmq", "ioredis"),
        acknowledges=True,
        deduplicates=True,
        node=True,
    ),
    Peer(
        name="repid",
        program="with_repid",
        requirements=("repid[redis]", "hiredis", "uvloop", "typing_extensions"),
        acknowledges=True,
        deduplicates=False,
        note="stream entries are never deleted",
    ),
    Peer(
        name="dramatiq",
        program="with_dramatiq",
        requirements=("dramatiq[redis]", "redis[hiredis]"),
        acknowledges=True,
        deduplicates=False,
        note="threads",
    ),
    Peer(
        name="huey",
        program="with_huey",
        requirements=("huey", "redis[hiredis]", "gevent"),
        acknowledges=False,
        deduplicates=False,
        note="threads",
    ),
    Peer(
        name="faststream",
        program="with_faststream",
        requirements=("faststream[redis]", "redis[hiredis]", "uvloop"),
        acknowledges=True,
        deduplicates=False,
        note="stream entries are never deleted",
    ),
    Peer(
        name="taskiq-redis",
        program="with_taskiq",
        requirements=("taskiq", "taskiq-redis", "redis[hiredis]", "uvloop", "orjson"),
        acknowledges=True,
        deduplicates=False,
        note="stream entries are never deleted",
    ),
    Peer(
        name="bullmq (Python)",
        program="with_bullmq",
        requirements=("bullmq", "redis[hiredis]", "uvloop"),
        acknowledges=True,
        deduplicates=True,
    ),
    Peer(
        name="pydocket",
        program="with_docket",
        requirements=("pydocket", "hiredis", "uvloop"),
        acknowledges=True,
        deduplicates=True,
    ),
    Peer(
        name="arq",
        program="with_arq",
        requirements=("arq", "redis[hiredis]", "uvloop"),
        acknowledges=True,
        deduplicates=True,
    ),
    Peer(
        name="saq",
        program="with_saq",
        requirements=("saq[hiredis]", "redis[hiredis]", "uvloop", "orjson", "typing_extensions"),
        acknowledges=True,
        deduplicates=True,
    ),
    Peer(
        name="streaq",
        program="with_streaq",
        requirements=("streaq", "uvloop"),
        acknowledges=True,
        deduplicates=True,
    ),
    Peer(
        name="tarsk-redis",
        program="with_tarsk",
        requirements=("tarsk-redis",),
        acknowledges=True,
        deduplicates=False,
        note="supervisor in Rust, one child",
    ),
    Peer(
        name="taskito",
        program="with_taskito",
        requirements=("taskito",),
        acknowledges=True,
        deduplicates=False,
        note="core in Rust, results kept 1 s",
    ),
    Peer(
        name="celery",
        program="with_celery",
        requirements=("celery[redis]", "redis[hiredis]", "gevent"),
        tasks=10_000,
        acknowledges=False,
        deduplicates=False,
        note="acknowledges before it runs (its default)",
    ),
    Peer(
        name="rq",
        program="with_rq",
        requirements=("rq", "redis[hiredis]"),
        tasks=5_000,
        acknowledges=True,
        deduplicates=False,
        note="one job at a time",
    ),
)
