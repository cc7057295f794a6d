"""What ``orchestra run`` shows at the end of how limits, balancing and breakers have steered the job's tasks.

Reads the App and the tally of the run, changes nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group
from rich.text import Text

from orchestra._jobs.tally import ReplicaTally
from orchestra.cli._output import pairs, row, table
from orchestra.cli._progress import duration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from orchestra._jobs.tally import Outage, Tally
    from orchestra._limiting.use import LimitUse
    from orchestra.agents import AgentType, Replica
    from orchestra.app import App

TITLE = "How it was steered"
NOTE = "A throttled task is sent back to wait; no attempt is charged for it."


def steering(app: App, tally: Tally) -> Group | None:
    """A row for each replica of the agents of this run, their limits and breakers; None where nothing was steered."""
    agents = [agent for name in app.agents if (agent := app.agents.get(name)) is not None and name in tally.types]
    if not any(map(_is_steered, agents)):
        return None
    numbers = ("tasks", "share", "weight", "p50", "p95", "failed", "throttled")
    made = table("agent", "replica", *((heading, "right") for heading in numbers))
    for agent in agents:
        for number, replica in enumerate(agent.replicas):
            row(made, _cells(agent, replica, tally, first=number == 0))
    told = [each for agent in agents for each in _told(agent, tally)]
    return Group(Text(TITLE, style="italic"), made, Text(pairs(told, indent="")), Text(NOTE, style="dim"))


def _is_steered(agent: AgentType) -> bool:
    breakers = any(replica.breaker is not None for replica in agent.replicas)
    return len(agent.replicas) > 1 or breakers or bool(agent.options.uses)


def _cells(agent: AgentType, replica: Replica, tally: Tally, *, first: bool) -> list[str]:
    whole = tally.of(agent.name)
    part = whole.replicas.get(replica.worker_id, ReplicaTally())
    many = len(agent.replicas) > 1
    throttled = first and (whole.throttled or agent.options.uses)
    return [
        agent.name if first else "",
        replica.worker_id if many else "",
        f"{part.times.count:,}",
        _share(part.times.count, sum(each.times.count for each in whole.replicas.values())) if many else "",
        _share(replica.weight, sum(each.weight for each in agent.replicas)) if many else "",
        *(duration(part.times.percentile(share)) for share in (0.5, 0.95)),
        f"{part.failed:,}" if part.failed else "",
        f"{whole.throttled:,}" if throttled else "",
    ]


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else ""


def _told(agent: AgentType, tally: Tally) -> Iterator[tuple[str, str]]:
    for use in agent.options.uses:
        yield f"limit of {agent.name}", _limit(use)
    for replica in agent.replicas:
        if replica.breaker is not None:
            name = replica.breaker.name
            yield f"breaker of {name}", _breaker(tally.outages(name), tally.began)


def _limit(use: LimitUse) -> str:
    rate = getattr(getattr(use.limiter, "config", None), "rate_limit", None)
    if rate is None:
        return "one of its own" if not isinstance(use.limiter, str) else use.limiter
    per = "s" if rate.period == 1 else f"{rate.period:g} s"
    return f"{rate.rate:g} per {per}, {rate.burst:,} at once{'' if use.key is None else ', for each key'}"


def _breaker(outages: Sequence[Outage], began: float) -> str:
    if not outages:
        return "stayed closed"
    last, times = outages[-1], f"{len(outages)} times, at last" if len(outages) > 1 else ""
    opened = " ".join(filter(None, ("opened", times, f"at {last.began - began:.1f} s")))
    if last.ended is None:
        return f"{opened}, still open"
    return f"{opened}, recovered after {last.ended - last.began:.1f} s"
