"""Which replica of an agent runs a task: one with room, whose breaker lets it through, and whose own limits give.

Owns that choice and what it takes on the way (a probe's place, the balancer's count), which goes back when the choice does
not stand. Refuses to know attempts, and how a strategy chooses. One event loop; only :meth:`ReplicaChoice.admitted` awaits,
and the replica it asks for counts as running meanwhile, so that its ``max_concurrency`` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from orchestra._delivery import Again
from orchestra._dispatch.admission import AWAY_DELAY, BadLimitError, Gate, ask_once
from orchestra._pool.slots import Slot
from orchestra.agents import AgentType, Replica
from orchestra.circuit_breaker import CircuitState
from orchestra.errors import StoreError
from orchestra.load_balancer import BaseLoadBalancerStrategy
from orchestra.tasks import BaseTask

BUSY_DELAY = 0.05
"""Seconds a task waits at least when every replica of its agent is full."""
LEAST_DELAY = 0.001
LEAST_STEP = 0.0005
"""Seconds between two tasks that come back because every replica was full, at least."""
PROBED_SHARE = 0.1
"""Of ``recovery_timeout``: what a task waits at most while probes find out whether a replica works again."""


class ReplicaChoice:
    """The choice among replicas for one worker. ``balancer_for``: who chooses where there is something to choose."""

    def __init__(self, gate: Gate, balancer_for: Callable[[AgentType], BaseLoadBalancerStrategy]) -> None:
        self._gate = gate
        self._balancer_for = balancer_for

    def now(
        self, agent: AgentType, task: BaseTask, slot: Slot, without: Mapping[Replica, float] | None = None
    ) -> Replica | None:
        """A replica with room whose breaker lets this task through, which takes a probe's place where there are any."""
        slot.balancer = slot.era = None
        free = [] if agent.full else [replica for replica in agent.replicas if replica.open_to_tasks]
        if without:
            free = [replica for replica in free if replica not in without]
        while free:
            replica = self._balanced(agent, task, free, slot)
            if replica is None:
                break
            if replica.breaker is None:
                return replica
            slot.era = replica.breaker.enter()
            if slot.era is not None:
                return replica
            tell_balancer(replica, slot)
            free.remove(replica)
        slot.balancer = None
        return None

    def _balanced(self, agent: AgentType, task: BaseTask, free: list[Replica], slot: Slot) -> Replica | None:
        if len(agent.replicas) == 1 and not agent.steered:
            return free[0]
        info = {
            "id": task.id,
            "type": task.type,
            "priority": task.priority,
            "input": task.input,
            "metadata": task.metadata,
        }
        slot.balancer = self._balancer_for(agent)
        chosen = slot.balancer.select_worker(free, info)
        if isinstance(chosen, Replica):
            return chosen
        # a strategy may answer with the id; None says that it finds all of them unhealthy
        return next((replica for replica in free if replica.worker_id == chosen), None)

    async def admitted(self, agent: AgentType, task: BaseTask, slot: Slot, first: Replica) -> Replica | Again:
        """``first``, or another one whose own limits give; else when the task comes back. No attempt is consumed.

        Raises:
            BadLimitError: a key or cost could not be told, or can never be admitted.
        Cost: a round trip for each replica with limits that is tried; none where a refusal is known.
        """
        refused: dict[Replica, float] = {}
        replica: Replica | None = first
        while replica is not None:
            wait = await self._refusal(task, slot, replica) if replica.uses else None
            if wait is None:
                return replica
            refused[replica] = wait
            replica = self.now(agent, task, slot, refused)
        return self.none_free(agent, refused)

    async def _refusal(self, task: BaseTask, slot: Slot, replica: Replica) -> float | None:
        """None when the limits of ``replica`` give; else seconds until they may, and it is no longer taken."""
        wait: float | None = AWAY_DELAY
        given = False
        replica.running += 1
        try:
            wait = await ask_once(task, replica)
            given = wait is None
        except StoreError:
            pass
        except Exception as error:
            raise BadLimitError from error
        finally:
            replica.running -= 1
            if not given:
                tell_balancer(replica, slot)
                if replica.breaker is not None:
                    replica.breaker.release(era=slot.era)
        return wait

    def none_free(self, agent: AgentType, refused: Mapping[Replica, float] | None = None) -> Again:
        """When a task comes back that no replica can take; ``refused``: how long the limits of some want it to wait."""
        refused = refused or {}
        shut = [r for r in agent.replicas if r not in refused and r.breaker is not None and not r.breaker.available]
        waits = [*refused.values(), *[max(BUSY_DELAY, _wait_of(replica)) for replica in shut]]
        if len(waits) == len(agent.replicas):
            return self._gate.later(agent.name, max(LEAST_DELAY, min(waits)))
        running = sum([replica.running for replica in agent.replicas])
        return self._gate.later(agent.name, BUSY_DELAY, max(LEAST_STEP, agent.mean_run / max(1, running)))


def tell_balancer(replica: Replica, slot: Slot) -> None:
    """The one who chose ``replica`` learns that its task has left."""
    balancer, slot.balancer = slot.balancer, None
    if balancer is not None:
        balancer.task_done(replica.worker_id)


def _wait_of(replica: Replica) -> float:
    breaker = replica.breaker
    assert breaker is not None, "asked of replicas with a breaker"
    if breaker.state is CircuitState.OPEN:
        return breaker.retry_after
    return min(breaker.retry_after, breaker.config.recovery_timeout * PROBED_SHARE)
