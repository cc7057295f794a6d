"""One load balancer for each agent type, kept in step with the type's replicas. One event loop; not thread-safe."""

from __future__ import annotations

from orchestra.agents import AgentType, Replica
from orchestra.load_balancer import BaseLoadBalancerStrategy, WeightedRoundRobinStrategy, create_load_balancer


class Balancers:
    """``shared`` serves every type if given; else each gets a smooth weighted round robin of its own."""

    def __init__(self, shared: BaseLoadBalancerStrategy | None) -> None:
        self._shared = shared
        self._known: dict[str, tuple[tuple[Replica, ...], BaseLoadBalancerStrategy]] = {}

    def of(self, agent: AgentType) -> BaseLoadBalancerStrategy:
        """The balancer for ``agent``, told of its weights when its replicas have changed. O(1) while they have not."""
        known = self._known.get(agent.name)
        if known is not None and known[0] is agent.replicas:
            return known[1]
        balancer = self._shared or (known[1] if known else create_load_balancer("weighted_round_robin"))
        before: tuple[Replica, ...] = known[0] if known else ()
        if isinstance(balancer, WeightedRoundRobinStrategy):
            for replica in agent.replicas:
                if replica not in before:  # what was set for the others at run time stays
                    balancer.set_worker_weight(replica.worker_id, replica.weight)
        if self._shared is None:  # else another type may have a replica of that name
            for gone in {replica.worker_id for replica in before} - {replica.worker_id for replica in agent.replicas}:
                balancer.remove_worker(gone)
        self._known[agent.name] = (agent.replicas, balancer)
        return balancer
