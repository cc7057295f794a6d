"""Which queues are compared, what each needs, and how many tasks it is given.

Refuses to own settings, which are in the peer's program, and promises, which are observed (:mod:`benchmarks.peers.verify`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """One row of the comparison.

    ``tasks`` and ``sleeps``: how many a full drain of no-op and of sleeping agents has. Fewer for a slow peer, so that each
    of its figures is a rate over two seconds or more, and not over twenty.
    """

    name: str
    program: str
    requirements: tuple[str, ...] = ()
    minimum: tuple[int, int] = (3, 11)
    tasks: int
    sleeps: int = 10_000
    note: str = ""
    node: bool = False
    own: bool = False


PEERS = (
    Peer(
        name="orchestra",
        program="with_orchestra",
        tasks=400_000,
        note="queue and dispatcher, own ids",
        own=True,
    ),
    Peer(
        name="orchestra (generated ids)",
        program="with_orchestra_plain",
        tasks=400_000,
        note="queue and dispatcher, without own ids",
        own=True,
    ),
    Peer(
        name="orchestra (App)",
        program="with_orchestra_app",
        tasks=200_000,
        note="the front door, results kept",
        own=True,
    ),
    Peer(
        name="ardiq",
        program="with_ardiq",
        tasks=30_000,
        requirements=("ardiq", "uvloop"),
        minimum=(3, 12),
        note="core in Rust, results dropped",
    ),
    Peer(
        name="bullmq (Node)",
        program="with_bullmq_node",
        tasks=20_000,
        requirements=("bullmq", "ioredis"),
        node=True,
    ),
    Peer(
        name="repid",
        program="with_repid",
        tasks=20_000,
        sleeps=5_000,
        requirements=("repid[redis]", "hiredis", "uvloop", "typing_extensions"),
        note="stream entries are never deleted",
    ),
    Peer(
        name="dramatiq",
        program="with_dramatiq",
        tasks=10_000,
        sleeps=4_000,
        requirements=("dramatiq[redis]", "redis[hiredis]"),
        note="threads",
    ),
    Peer(
        name="huey",
        program="with_huey",
        tasks=10_000,
        sleeps=4_000,
        requirements=("huey", "redis[hiredis]", "gevent"),
        note="threads",
    ),
    Peer(
        name="faststream",
        program="with_faststream",
        tasks=10_000,
        sleeps=4_000,
        requirements=("faststream[redis]", "redis[hiredis]", "uvloop"),
        note="stream entries are never deleted",
    ),
    Peer(
        name="taskiq-redis",
        program="with_taskiq",
        tasks=10_000,
        sleeps=5_000,
        requirements=("taskiq", "taskiq-redis", "redis[hiredis]", "uvloop", "orjson"),
        note="stream entries are never deleted",
    ),
    Peer(
        name="bullmq (Python)",
        program="with_bullmq",
        tasks=8_000,
        sleeps=2_500,
        requirements=("bullmq", "redis[hiredis]", "uvloop"),
    ),
    Peer(
        name="pydocket",
        program="with_docket",
        tasks=8_000,
        sleeps=5_000,
        requirements=("pydocket", "hiredis", "uvloop"),
    ),
    Peer(
        name="arq",
        program="with_arq",
        tasks=6_000,
        sleeps=4_000,
        requirements=("arq", "redis[hiredis]", "uvloop"),
    ),
    Peer(
        name="saq",
        program="with_saq",
        tasks=6_000,
        sleeps=4_000,
        requirements=("saq[hiredis]", "redis[hiredis]", "uvloop", "orjson", "typing_extensions"),
    ),
    Peer(
        name="streaq",
        program="with_streaq",
        tasks=4_000,
        sleeps=4_000,
        requirements=("streaq", "uvloop"),
    ),
    Peer(
        name="tarsk-redis",
        program="with_tarsk",
        tasks=30_000,
        requirements=("tarsk-redis",),
        note="supervisor in Rust, one child",
    ),
    Peer(
        name="taskito",
        program="with_taskito",
        tasks=2_500,
        sleeps=2_500,
        requirements=("taskito",),
        note="core in Rust, results kept 1 s",
    ),
    Peer(
        name="celery",
        program="with_celery",
        tasks=3_000,
        sleeps=2_500,
        requirements=("celery[redis]", "redis[hiredis]", "gevent"),
        note="early acknowledgement (its default), which the solo pool writes late",
    ),
    Peer(
        name="rq",
        program="with_rq",
        tasks=1_000,
        sleeps=50,
        requirements=("rq", "redis[hiredis]"),
        note="one job at a time",
    ),
)
