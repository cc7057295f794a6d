"""Load balancing strategies: distribution, status, errors, threads."""

from __future__ import annotations

import math
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestra import load_balancer
from orchestra.errors import ConfigurationError
from orchestra.load_balancer import (
    BaseLoadBalancerStrategy,
    ConsistentHashStrategy,
    LeastLoadedStrategy,
    RandomStrategy,
    RoundRobinStrategy,
    WeightedRoundRobinStrategy,
    create_load_balancer,
    register_strategy,
)

NAMES = ["round_robin", "random", "weighted_round_robin", "least_loaded", "consistent_hash"]
WORKERS = ["worker1", "worker2", "worker3"]
BAD = (0, -1, 1.5, math.nan, math.inf, True, "2", None, 10_001, 2**70)


@dataclass(eq=False)
class Worker:
    worker_id: str


@pytest.fixture(params=NAMES)
def strategy(request):
    return create_load_balancer(request.param)


def picks(strategy, count, workers=WORKERS, task=None):
    return [strategy.select_worker(workers, task) for _ in range(count)]


def picks_of_sixteen_threads(strategy):
    """How often each worker was chosen by threads that choose 300 times each, at once."""
    with ThreadPoolExecutor(16) as threads:
        start = threading.Barrier(16)
        chosen = [threads.submit(lambda: (start.wait(), picks(strategy, 300))[1]) for _ in range(16)]
        return sum((Counter(each.result()) for each in chosen), Counter())


class TestEveryStrategy:
    def test_nobody_to_choose(self, strategy):
        assert strategy.select_worker([]) is None
        assert strategy.select_worker([], {"id": "x"}) is None

    def test_returns_one_of_the_offered(self, strategy):
        assert set(picks(strategy, 100)) <= set(WORKERS)
        assert picks(strategy, 3, ["only"]) == ["only"] * 3

    def test_workers_may_be_objects_or_any_hashable(self, strategy):
        offered = [Worker("a"), ("host", 7), 5, "text"]
        for _ in range(20):
            chosen = strategy.select_worker(offered)
            assert any(chosen is worker for worker in offered)
        with pytest.raises(TypeError, match="unhashable"):
            picks(strategy, 5, [[]])
            strategy.update_worker_status([], {"healthy": False})

    def test_unhealthy_and_full_workers_are_left_out(self, strategy):
        strategy.update_worker_status("worker1", {"healthy": False})
        strategy.update_worker_status(Worker("worker2"), {"capacity": 0, "healthy": True})
        assert set(picks(strategy, 50)) == {"worker3"}
        assert strategy.select_worker(["worker1", "worker2"]) is None
        strategy.update_worker_status("worker1", {"healthy": True})
        strategy.update_worker_status("worker2", {"capacity": 1})
        assert set(picks(strategy, 200)) == set(WORKERS)
        strategy.update_worker_status("worker1", {"healthy": False})
        strategy.remove_worker("worker1")
        assert "worker1" in picks(strategy, 200)

    def test_unknown_status_keys_are_ignored(self, strategy):
        strategy.update_worker_status("worker1", {"cpu": 0.3, "version": "1"})
        strategy.task_done("worker1")
        assert picks(strategy, 1)[0] in WORKERS

    @pytest.mark.parametrize(
        ("status", "field"),
        [({"healthy": 1}, "healthy"), ({"healthy": True, "capacity": -1}, "capacity"), ({"capacity": 1.5}, "capacity")],
    )
    def test_refuses_bad_status_and_takes_nothing_of_it(self, strategy, status, field):
        with pytest.raises(ConfigurationError, match=field) as caught:
            strategy.update_worker_status("worker1", {"healthy": False} | status)
        assert caught.value.field == field
        assert "worker1" in picks(strategy, 200)
        with pytest.raises(ConfigurationError, match="must be a dict"):
            strategy.update_worker_status("worker1", None)

    def test_the_offer_is_not_changed(self, strategy):
        offer = list(WORKERS)
        strategy.update_worker_status("worker1", {"healthy": False})
        picks(strategy, 10, offer)
        assert offer == WORKERS

    def test_sixteen_threads(self, strategy):
        """Selections, status reports and leavers at once: no error, and always an offered worker."""
        workers, errors, counts, lock = [f"w{number}" for number in range(8)], [], Counter(), threading.Lock()
        start = threading.Barrier(16)

        def run(number):
            try:
                start.wait()
                mine = Counter()
                for turn in range(400):
                    mine[strategy.select_worker(workers, {"affinity_key": turn % 5})] += 1
                    if number % 4 == 0:
                        strategy.update_worker_status(workers[turn % 8], {"capacity": 1 + turn % 5, "healthy": True})
                    if number == 1 and turn % 50 == 0:
                        strategy.remove_worker(workers[turn % 8])
                    strategy.task_done(workers[turn % 8])
                with lock:
                    counts.update(mine)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert set(counts) <= set(workers)
        assert counts.total() == 16 * 400


class TestRoundRobin:
    def test_circular_sequence(self):
        assert picks(RoundRobinStrategy(), 7) == [*WORKERS, *WORKERS, "worker1"]

    def test_exact_with_sixteen_threads(self):
        """A lost or doubled turn would show as an uneven count."""
        assert picks_of_sixteen_threads(RoundRobinStrategy()) == {worker: 1600 for worker in WORKERS}

    def test_nobody_starves_when_the_offer_changes(self):
        strategy = RoundRobinStrategy()
        counts = Counter(strategy.select_worker(["a", "b"] if turn % 2 else ["a", "c"]) for turn in range(90))
        assert min(counts.values()) >= 20

    def test_one_worker_offered_twice_is_one_worker(self):
        counts = Counter(picks(RoundRobinStrategy(), 40, ["a", "a", "b"]))
        assert counts == {"a": 20, "b": 20}

    def test_workers_that_come_and_go_are_forgotten(self):
        strategy = RoundRobinStrategy()
        for number in range(5_000):
            strategy.select_worker([f"{number}-a", f"{number}-b"])
        assert len(strategy._ring) < 1_100


class TestWeightedRoundRobin:
    def test_the_example_of_the_specification(self):
        strategy = create_load_balancer("weighted_round_robin")
        assert isinstance(strategy, WeightedRoundRobinStrategy)
        for worker, weight in zip(WORKERS, (3, 1, 2), strict=True):
            strategy.set_worker_weight(worker, weight)
        choices = picks(strategy, 60)
        for start in range(54):
            assert Counter(choices[start : start + 6]) == {"worker1": 3, "worker2": 1, "worker3": 2}
        strategy.update_worker_status("worker1", {"weight": 2})
        assert strategy.get_worker_weight("worker1") == 2
        assert Counter(picks(strategy, 10)[5:]) == {"worker1": 2, "worker2": 1, "worker3": 2}

    def test_weights_belong_to_ids(self):
        strategy, one, other = WeightedRoundRobinStrategy(), Worker("one"), Worker("other")
        strategy.set_worker_weight(one, 3)
        assert strategy.get_worker_weight("one") == 3
        assert strategy.get_worker_weight("other") == 1
        assert Counter(worker.worker_id for worker in picks(strategy, 8, [one, other])) == {"one": 6, "other": 2}

    def test_capacity_is_a_weight_unless_one_is_given(self):
        strategy = WeightedRoundRobinStrategy()
        strategy.update_worker_status("worker1", {"capacity": 4})
        assert strategy.get_worker_weight("worker1") == 4
        strategy.update_worker_status("worker1", {"capacity": 4, "weight": 2})
        assert strategy.get_worker_weight("worker1") == 2
        strategy.update_worker_status("worker1", {"capacity": 0})
        assert strategy.get_worker_weight("worker1") == 2
        assert "worker1" not in picks(strategy, 20)

    def test_a_worker_keeps_its_weight_through_illness_and_crowds(self):
        strategy = WeightedRoundRobinStrategy()
        strategy.set_worker_weight("worker1", 7)
        strategy.update_worker_status("worker1", {"healthy": False})
        for number in range(3_000):
            strategy.select_worker([f"{number}"])
        strategy.update_worker_status("worker1", {"healthy": True})
        assert Counter(picks(strategy, 27)[18:]) == {"worker1": 7, "worker2": 1, "worker3": 1}
        strategy.remove_worker("worker1")
        assert strategy.get_worker_weight("worker1") == 1

    @pytest.mark.parametrize("bad", [0, -1, float("nan"), 1.5, True, "2", None, 10_001])
    def test_refuses_bad_weights(self, bad):
        strategy = WeightedRoundRobinStrategy()
        with pytest.raises(ConfigurationError, match=r"weight must be a whole number from 1 to 10000, got ") as caught:
            strategy.set_worker_weight("worker1", bad)
        assert isinstance(caught.value, ValueError)
        assert caught.value.field == "weight"
        with pytest.raises(ConfigurationError, match="weight"):
            strategy.update_worker_status("worker1", {"weight": bad})
        assert strategy.get_worker_weight("worker1") == 1

    def test_too_many_workers(self):
        strategy = WeightedRoundRobinStrategy()
        for number in range(65_536):
            strategy.set_worker_weight(number, 1)
        with pytest.raises(ConfigurationError, match="at most 65536"):
            strategy.set_worker_weight("one more", 1)

    def test_exact_with_sixteen_threads(self):
        strategy = WeightedRoundRobinStrategy()
        for worker, weight in zip(WORKERS, (3, 1, 2), strict=True):
            strategy.set_worker_weight(worker, weight)
        assert picks_of_sixteen_threads(strategy) == {"worker1": 2400, "worker2": 800, "worker3": 1600}


class TestRandom:
    def test_seed_makes_it_repeatable(self):
        assert picks(RandomStrategy(7), 50) == picks(RandomStrategy(seed=7), 50)
        assert picks(RandomStrategy(7), 50) != picks(RandomStrategy(8), 50)

    def test_even(self):
        counts = Counter(picks(RandomStrategy(1), 3_000))
        assert all(880 <= counts[worker] <= 1_120 for worker in WORKERS)


class TestLeastLoaded:
    def test_counts_what_it_gave_and_what_ended(self):
        strategy = LeastLoadedStrategy(seed=1)
        counts = Counter(picks(strategy, 100, ["a", "b"]))
        assert counts == {"a": 50, "b": 50}
        assert strategy.get_worker_load("a") == 50
        for _ in range(60):
            strategy.task_done("a")
        assert strategy.get_worker_load("a") == 0
        assert set(picks(strategy, 40, ["a", "b"])) == {"a"}

    def test_reports_replace_what_was_counted(self):
        strategy = LeastLoadedStrategy(seed=1)
        picks(strategy, 10, ["a"])
        strategy.update_worker_status("a", {"load": 0})
        strategy.update_worker_status("b", {"load": 2.5})
        assert picks(strategy, 2, ["a", "b"]) == ["a", "a"]
        with pytest.raises(ConfigurationError, match="load must be a number of tasks"):
            strategy.update_worker_status("a", {"load": float("nan")})

    def test_workers_that_come_and_go_are_forgotten(self):
        strategy = LeastLoadedStrategy()
        for number in range(5_000):
            strategy.select_worker([f"{number}-a", f"{number}-b"])
        assert len(strategy._loads) < 1_100

    def test_load_is_a_share_of_the_capacity(self):
        strategy = LeastLoadedStrategy(seed=1)
        strategy.update_worker_status("big", {"capacity": 30})
        strategy.update_worker_status("small", {"capacity": 10})
        counts = Counter(picks(strategy, 40, ["big", "small"]))
        assert 29 <= counts["big"] <= 31

    def test_two_choices_keep_many_workers_level(self):
        workers = [f"w{number}" for number in range(50)]
        counts = Counter(picks(LeastLoadedStrategy(seed=3), 5_000, workers))
        assert max(counts.values()) - min(counts.values()) <= 12  # one choice alone: about 45


class TestConsistentHash:
    @staticmethod
    def homes(strategy, workers, keys=200):
        found = {}
        for key in range(keys):
            found[key] = strategy.select_worker(workers, {"affinity_key": key})
            strategy.task_done(found[key])
        return found

    def test_a_key_has_a_home_and_few_move_when_a_worker_goes(self):
        strategy, workers = ConsistentHashStrategy(), [f"w{number}" for number in range(5)]
        before = self.homes(strategy, workers)
        assert self.homes(ConsistentHashStrategy(), workers[::-1]) == before
        after = self.homes(strategy, workers[1:])
        assert {key for key in before if before[key] != after[key]} == {key for key in before if before[key] == "w0"}
        assert all(20 <= count <= 65 for count in Counter(before.values()).values())

    def test_a_hot_key_overflows_at_the_bound(self):
        strategy = ConsistentHashStrategy(bound=1.5)
        counts = Counter(picks(strategy, 300, WORKERS, {"metadata": {"affinity_key": "hot"}}))
        assert max(counts.values()) <= 151
        assert len(counts) == 3 or min(counts.values()) >= 100

    def test_the_bound_is_a_share_of_the_capacity(self):
        strategy = ConsistentHashStrategy(bound=1.01)
        strategy.update_worker_status("worker1", {"capacity": 8})
        counts = Counter(picks(strategy, 300, WORKERS, {"affinity_key": "hot"}))
        assert 235 <= counts["worker1"] <= 244

    def test_a_task_without_a_key_goes_to_the_least_loaded(self):
        strategy = ConsistentHashStrategy()
        assert Counter(picks(strategy, 9, WORKERS, {"id": "x", "metadata": None})) == dict.fromkeys(WORKERS, 3)
        assert Counter(picks(strategy, 9)) == dict.fromkeys(WORKERS, 3)

    @pytest.mark.parametrize(
        ("key", "task"),
        [
            ("tenant", {"tenant": "a"}),
            ("tenant", {"metadata": {"tenant": "a"}}),
            ("tenant", {"input": {"tenant": "a"}, "metadata": {}}),
            ("input.user.id", {"input": {"user": {"id": "a"}}}),
            ("tenant", {"tenant": "a", "input": {"tenant": "other"}}),
        ],
    )
    def test_key_of_a_field(self, key, task):
        strategy, plain = create_load_balancer("consistent_hash", options={"key": key}), ConsistentHashStrategy()
        assert strategy.select_worker(WORKERS, task) == plain.select_worker(WORKERS, {"affinity_key": "a"})

    @pytest.mark.parametrize("task", [{}, {"input": None}, {"input": "text"}, {"input": {"user": [1]}}, {"x": 1}])
    def test_a_field_that_is_not_there(self, task):
        for key in ("tenant", "input.user.id"):
            strategy = ConsistentHashStrategy(key)
            assert Counter(picks(strategy, 9, WORKERS, task)) == dict.fromkeys(WORKERS, 3)

    @pytest.mark.parametrize("bad", ["", ".", "a..b", 7, None, ["a"]])
    def test_bad_key(self, bad):
        with pytest.raises(ConfigurationError, match=r"ConsistentHashStrategy.key must be"):
            create_load_balancer("consistent_hash", options={"key": bad})

    def test_own_key_and_bad_bound(self):
        strategy = ConsistentHashStrategy(lambda task: task["input"]["user"])
        chosen = set()
        for _ in range(10):
            chosen.add(strategy.select_worker(WORKERS, {"input": {"user": 1}}))
            strategy.task_done(next(iter(chosen)))
        assert len(chosen) == 1
        for bad in (1.0, 0, float("nan"), True, "2"):
            with pytest.raises(ConfigurationError, match="bound"):
                ConsistentHashStrategy(bound=bad)


OFFERS = st.lists(
    st.tuples(
        st.sets(st.sampled_from("abcde"), min_size=1),
        st.dictionaries(st.sampled_from("abcde"), st.integers(1, 9), max_size=2),
        st.dictionaries(st.sampled_from("abcde"), st.booleans(), max_size=2),
        st.integers(0, 30),
    ),
    min_size=1,
    max_size=15,
)


@settings(max_examples=200)
@given(OFFERS)
def test_weights_are_exact_while_replicas_come_and_go(changes):
    """After each change (of offer, weight or health) the very next window of sum(weights) selections is exact."""
    strategy, weights, ill, before = WeightedRoundRobinStrategy(), {}, set(), None
    for offer, reweighed, health, more in changes:
        for worker, weight in reweighed.items():
            strategy.update_worker_status(worker, {"weight": weight})
            weights[worker] = weight
        for worker, healthy in health.items():
            strategy.update_worker_status(worker, {"healthy": healthy})
            ill = ill - {worker} if healthy else ill | {worker}
        wanted = {worker: weights.get(worker, 1) for worker in offer - ill}
        total = sum(wanted.values())
        if not wanted:
            assert strategy.select_worker(sorted(offer)) is None
        elif wanted != before:
            assert Counter(picks(strategy, total, sorted(offer))) == Counter(wanted)
            later = picks(strategy, 2 * total, sorted(offer))
            assert all(Counter(later[start : start + total]) == Counter(wanted) for start in range(total))
        if wanted:
            picks(strategy, more, sorted(offer))
            before = wanted


def test_weights_change_while_sixteen_threads_select():
    """Nobody is lost or doubled, and with the last weights every window is exact again."""
    strategy, counts, lock = WeightedRoundRobinStrategy(), Counter(), threading.Lock()
    start = threading.Barrier(16)

    def run(number):
        start.wait(10)
        mine = Counter()
        for turn in range(300):
            if number < 4:
                strategy.update_worker_status(WORKERS[turn % 3], {"weight": 1 + (turn + number) % 7, "capacity": 5})
            mine[strategy.select_worker(WORKERS)] += 1
        with lock:
            counts.update(mine)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counts.total() == 16 * 300
    assert set(counts) == set(WORKERS)
    for worker, weight in zip(WORKERS, (3, 1, 2), strict=True):
        strategy.set_worker_weight(worker, weight)
    assert Counter(picks(strategy, 60)) == {"worker1": 30, "worker2": 10, "worker3": 20}


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        *(
            ("weighted_round_robin", {"weight": bad}, "weight must be a whole number from 1 to 10000, got")
            for bad in BAD
        ),
        *(
            ("least_loaded", {"capacity": bad}, "capacity must be a whole number of tasks from 0 to 10000")
            for bad in BAD[1:]
        ),
        *(
            ("least_loaded", {"load": bad}, "load must be a number of tasks, 0 or more")
            for bad in (-1, math.nan, True, "1")
        ),
        *(("random", {"healthy": bad}, "healthy must be True or False, got") for bad in (1, 0, None, "yes")),
        *(("round_robin", bad, "worker status must be a dict") for bad in (None, 7, "weight", [("weight", 1)])),
    ],
)
def test_bad_status_table(name, status, message):
    with pytest.raises(ValueError, match=message):
        create_load_balancer(name).update_worker_status("a", status)


class TestRegistry:
    @pytest.mark.parametrize(
        ("name", "options", "message"),
        [
            ("round_robin", {"seed": 1}, "strategy 'round_robin' has no option 'seed'; options are none"),
            ("consistent_hash", {"field": "x"}, "has no option 'field'; options are key, bound"),
            ("random", ["seed"], "options must be a dict"),
            ("consistent_hash", {"bound": 0.5}, "ConsistentHashStrategy.bound must be a number, above 1"),
        ],
    )
    def test_bad_options(self, name, options, message):
        with pytest.raises(ConfigurationError, match=message):
            create_load_balancer(name, options=options)

    def test_options_reach_the_strategy(self):
        one, other = (create_load_balancer("random", options={"seed": 5}) for _ in range(2))
        assert picks(one, 30) == picks(other, 30)

    def test_default_is_round_robin(self):
        assert isinstance(create_load_balancer(), RoundRobinStrategy)

    @pytest.mark.parametrize("name", ["", "fastest", None, 3, ["random"]])
    def test_unknown_name_lists_the_known(self, name):
        with pytest.raises(ConfigurationError, match="consistent_hash, least_loaded, random, round_robin, weighted"):
            create_load_balancer(name)

    def test_own_strategy(self, monkeypatch):
        class First(BaseLoadBalancerStrategy):
            def select_worker(self, available_workers, task_info=None):
                return available_workers[0] if available_workers else None

        monkeypatch.setattr(load_balancer, "_strategies", dict(load_balancer._strategies))
        register_strategy("first", First)
        strategy = create_load_balancer("first")
        assert strategy.select_worker(WORKERS) == "worker1"
        strategy.update_worker_status("worker1", {"anything": 1})
        strategy.task_done("worker1")
        strategy.remove_worker("worker1")
        with pytest.raises(ConfigurationError, match="registered already"):
            register_strategy("first", First)
        register_strategy("first", lambda: None, replace=True)
        with pytest.raises(ConfigurationError, match="must make a BaseLoadBalancerStrategy"):
            create_load_balancer("first")

    def test_refuses_bad_registrations(self):
        with pytest.raises(ConfigurationError, match="strategy name"):
            register_strategy("has space", RoundRobinStrategy)
        with pytest.raises(ConfigurationError, match="callable"):
            register_strategy("nothing", None)

    def test_the_base_is_abstract(self):
        with pytest.raises(TypeError, match="abstract"):
            BaseLoadBalancerStrategy()
