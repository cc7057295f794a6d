"""J7: every class and module that says it is thread-safe, under sixteen threads; and that this list is complete."""

from __future__ import annotations

import random
import re
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from orchestra import telemetry
from orchestra._redis.address import parse_address
from orchestra.circuit_breaker import CircuitBreaker, CircuitBreakerConfig, CircuitState
from orchestra.errors import OrchestraError
from orchestra.load_balancer import (
    ConsistentHashStrategy,
    LeastLoadedStrategy,
    RandomStrategy,
    RoundRobinStrategy,
    WeightedRoundRobinStrategy,
    create_load_balancer,
)
from orchestra.serialization import decode_task, encode_task, new_task_id
from orchestra.testing import Recorder
from tests.ext.test_threads import THREADS, switching, together  # noqa: F401 - the fixture switches threads here too

ROOT = Path(__file__).parents[2]
WORKERS = [f"w{number}" for number in range(8)]

CLAIMS = {
    "_ext/gcra.pyi": "tests/ext/test_threads.py::test_gcra_table",
    "_ext/heap.pyi": "tests/ext/test_threads.py::test_heap_loses_and_doubles_nothing",
    "_ext/wrr.pyi": "tests/ext/test_threads.py::test_ring_is_exact",
    "orchestra/_redis/address.py": "test_addresses",
    "orchestra/_durability.py": "immutable",
    "orchestra/_front/signature.py": "immutable",
    "orchestra/circuit_breaker.py": "test_breaker_counts_every_call",
    "orchestra/load_balancer.py": "test_rotations_are_exact",
    "orchestra/serialization.py": "test_serialization",
    "orchestra/telemetry.py": "test_telemetry_loses_no_event",
    "orchestra/testing/_watch.py": "test_the_recorder_hears_all_threads",
    "orchestra/testing/events.py": "test_the_recorder_hears_all_threads",
}
"""Where thread safety is claimed, and what shows it."""
CLAIM = re.compile(r"(?<!not )thread-safe(?! by)|from any thread", re.IGNORECASE)
ELSEWHERE = {"it must be thread-safe": "asked of a strategy of one's own"}


def test_nothing_else_claims_thread_safety():
    """A claim in a docstring without a row above is a claim without a test."""
    found = set()
    for path in [*ROOT.glob("orchestra/**/*.py"), *ROOT.glob("_ext/*.pyi")]:
        text = path.read_text("utf-8")
        for phrase in ELSEWHERE:
            text = text.replace(phrase, "")
        if CLAIM.search(text):
            found.add(path.relative_to(ROOT).as_posix())
    assert found == set(CLAIMS)


# --- load balancers


@pytest.mark.parametrize("kind", [RoundRobinStrategy, WeightedRoundRobinStrategy])
def test_rotations_are_exact(kind):
    """No turn is lost or doubled: after whole rounds everybody has had the same."""
    strategy = kind()
    counts = together(lambda number: Counter(strategy.select_worker(WORKERS) for _ in range(8 * 30)))
    assert sum(counts, Counter()) == {worker: 30 * THREADS for worker in WORKERS}


def test_weights_are_exact():
    strategy = WeightedRoundRobinStrategy()
    weights = {worker: 1 + number % 4 for number, worker in enumerate(WORKERS)}
    for worker, weight in weights.items():
        strategy.set_worker_weight(worker, weight)
    rounds = sum(weights.values())
    counts = together(lambda number: Counter(strategy.select_worker(WORKERS) for _ in range(rounds * 10)))
    assert sum(counts, Counter()) == {worker: weight * 10 * THREADS for worker, weight in weights.items()}


@pytest.mark.parametrize("kind", [LeastLoadedStrategy, ConsistentHashStrategy])
def test_loads_add_up(kind):
    """As many tasks as were given and have not ended are counted, to the last one."""
    strategy = kind()

    def work(number):
        kept = Counter()
        for turn in range(200):
            worker = strategy.select_worker(WORKERS, {"affinity_key": f"{number}:{turn}"})
            if turn % 2:
                strategy.task_done(worker)
            else:
                kept[worker] += 1
        return kept

    kept = sum(together(work), Counter())
    assert kept.total() == 100 * THREADS
    assert {worker: strategy.get_worker_load(worker) for worker in WORKERS} == {
        worker: kept[worker] for worker in WORKERS
    }


@pytest.mark.parametrize("name", ["round_robin", "weighted_round_robin", "random", "least_loaded", "consistent_hash"])
def test_strategies_while_workers_come_and_go(name):
    """Reports, leavers and a list that changes under the selection: always somebody who was offered, or nobody."""
    strategy = create_load_balancer(name)
    offer = list(WORKERS)

    def work(number):
        rng = random.Random(number)
        for turn in range(150):
            if number == 0:
                offer[rng.randrange(len(offer))] = f"w{rng.randrange(12)}"
            elif number == 1:
                strategy.remove_worker(f"w{rng.randrange(12)}")
            elif number == 2:
                strategy.update_worker_status(f"w{rng.randrange(12)}", {"healthy": rng.random() < 0.7, "capacity": 5})
            chosen = strategy.select_worker(offer, {"affinity_key": turn % 5})
            assert chosen is None or re.fullmatch(r"w\d+", chosen)

    together(work)


def test_a_random_choice_is_of_the_offer():
    strategy = RandomStrategy(7)
    counts = sum(together(lambda number: Counter(strategy.select_worker(WORKERS) for _ in range(500))), Counter())
    assert counts.total() == 500 * THREADS
    assert all(500 < counts[worker] < 1500 for worker in WORKERS), "1000 expected, 30 its deviation"


# --- breaker


def test_breaker_counts_every_call():
    """Failures below the threshold: none is lost, and it opens at exactly the right one."""
    breaker = CircuitBreaker("b", CircuitBreakerConfig(failure_threshold=THREADS * 50 + 1, window=3600.0))

    def work(number):
        for _ in range(50):
            assert breaker.allow_nowait()
            breaker.record_failure()

    together(work)
    assert breaker.state is CircuitState.CLOSED
    assert breaker.failures == THREADS * 50
    breaker.record_failure()
    assert breaker.state is CircuitState.OPEN


def test_breaker_probes_one_at_a_time():
    """Half-open lets one probe through at a time, whoever asks; nobody's place is lost."""
    config = CircuitBreakerConfig(failure_threshold=1, recovery_timeout=1e-9, success_threshold=1000)
    breaker = CircuitBreaker("b", config)
    breaker.record_failure()
    running = []

    def work(number):
        most = 0
        for _ in range(200):
            if breaker.allow_nowait():
                running.append(number)
                most = max(most, len(running))
                running.remove(number)
                breaker.release()
        return most

    slow = CircuitBreaker("c", CircuitBreakerConfig(failure_threshold=1, recovery_timeout=3600.0))
    slow.record_failure()
    assert not any(together(lambda number: slow.allow_nowait()))
    assert max(together(work)) >= 1
    assert breaker.state is CircuitState.HALF_OPEN
    assert breaker.allow_nowait()


# --- telemetry


def test_telemetry_loses_no_event():
    """Handlers come and go while sixteen threads emit: one that stays hears everything, one that raises goes once."""
    heard = Counter()
    lock = threading.Lock()

    def listen(name, measurements, metadata):
        with lock:
            heard[metadata["queue"]] += 1

    def broken(name, measurements, metadata):
        raise ValueError("on purpose")

    detach = telemetry.attach(listen, "lease.renewed")

    def work(number):
        for turn in range(60):
            leave = telemetry.attach(broken if turn % 10 == 0 else lambda *_: None, "lease.renewed")
            telemetry.emit("lease.renewed", {"count": 1, "lost": 0}, {"queue": str(number)})
            leave()
            leave()

    try:
        telemetry.logger.disabled = True
        together(work)
    finally:
        telemetry.logger.disabled = False
        detach()
    assert heard == {str(number): 60 for number in range(THREADS)}
    assert not telemetry.wanted("lease.renewed")


def test_the_recorder_hears_all_threads():
    with Recorder("lease.renewed") as recorder:
        together(
            lambda number: [
                telemetry.emit("lease.renewed", {"count": turn, "lost": 0}, {"queue": str(number)})
                for turn in range(100)
            ]
        )
        heard = Counter(event.metadata["queue"] for event in recorder.events)
    assert heard == {str(number): 100 for number in range(THREADS)}


# --- functions


def test_serialization():
    """Ids are unique over threads; tasks come back as they went."""

    def work(number):
        ids = []
        for turn in range(150):
            ids.append(new_task_id())
            task = {"id": ids[-1], "type": f"t{number}", "priority": 2, "input": {"n": [number, turn]}}
            assert decode_task(encode_task(task).frame) == task
        return ids

    made = together(work)
    assert len({task_id for mine in made for task_id in mine}) == 150 * THREADS


def test_addresses():
    def work(number):
        for turn in range(60):
            address = parse_address(f"redis://user:secret{number}@host{turn}:{1 + turn}/{number}")
            assert (tuple(address.hosts), address.db) == (((f"host{turn}", 1 + turn),), number)
            assert "secret" not in address.safe
            with pytest.raises(OrchestraError):
                parse_address(f"nothing-{number}://x")

    together(work)


def test_the_switch_interval_was_that_short():
    assert sys.getswitchinterval() < 1e-5
