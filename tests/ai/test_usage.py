"""Budgets stop before the next call; the sum of a workflow counts each call once, whoever repeats what."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from orchestra.ai import Budget, Usage
from orchestra.ai.usage import Meter, WorkflowUsage, total
from orchestra.errors import BudgetExceededError, ConfigurationError, Reject

numbers = itertools.count(1)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", 10**15 + 1])
@pytest.mark.parametrize("field", ["requests", "input_tokens", "output_tokens", "total_tokens"])
def test_a_budget_of_nothing_or_nonsense_is_refused(field, value):
    with pytest.raises(ConfigurationError, match=f"Budget.{field}"):
        Budget(**{field: value})


@pytest.mark.parametrize(
    ("budget", "used", "limit"),
    [
        (Budget(requests=2), Usage(2, 0, 0), "requests"),
        (Budget(input_tokens=10), Usage(1, 10, 0), "input_tokens"),
        (Budget(output_tokens=10), Usage(1, 0, 11), "output_tokens"),
        (Budget(total_tokens=10), Usage(1, 6, 4), "total_tokens"),
        (Budget(requests=9, total_tokens=10), Usage(1, 6, 4), "total_tokens"),
    ],
)
def test_a_used_up_budget_says_which_and_what_was_used(budget, used, limit):
    with pytest.raises(BudgetExceededError) as error:
        budget.check(used, scope="task")
    assert isinstance(error.value, Reject)
    assert (error.value.limit, error.value.scope, error.value.code) == (limit, "task", "budget_exceeded")
    assert error.value.allowed == getattr(budget, limit)
    assert error.value.used == used.as_dict()
    assert "the next model call was not made" in str(error.value)


def test_below_its_limits_a_budget_lets_pass():
    Budget(requests=3, input_tokens=10, output_tokens=10, total_tokens=20).check(Usage(2, 9, 9), scope="task")
    Budget().check(Usage(10**6, 10**9, 10**9), scope="task")


async def test_calls_in_flight_count_against_a_budget_of_requests():
    meter = Meter(Budget(requests=2), Usage, None)
    await meter.before()
    await meter.before()
    with pytest.raises(BudgetExceededError):
        await meter.before()
    await meter.failed()
    await meter.before()
    meter.interrupted()
    await meter.before()


async def test_parallel_steps_cannot_exceed_a_budget_of_requests_together(memory):
    key, budget, let = f"w{next(numbers)}", Budget(requests=7), []

    async def step(name: str) -> None:
        meter = Meter(None, lambda: used, WorkflowUsage(memory, key, name, budget))
        used = Usage()
        while True:
            await meter.before()
            let.append(name)
            used = used.plus(Usage(1, 10, 1))
            await meter.after()

    done = await asyncio.gather(*(step(str(n)) for n in range(5)), return_exceptions=True)
    assert [type(error) for error in done] == [BudgetExceededError] * 5
    assert len(let) == 7
    assert total(await memory.get(key)) == Usage(7, 70, 7)
    assert done[0].scope == "workflow"


async def test_repeated_and_ended_steps_count_once(memory):
    key = f"w{next(numbers)}"
    first, second = (WorkflowUsage(memory, key, name, None) for name in "ab")
    await first.settle(Usage(1, 10, 1))
    await first.settle(Usage(1, 10, 1))
    await second.settle(Usage(2, 20, 2))
    assert total(await memory.get(key)) == Usage(3, 30, 3)
    await first.settle(Usage(2, 15, 2), ended=True)
    assert total(await memory.get(key)) == Usage(4, 35, 4)
    assert list((await memory.get(key))["steps"]) == ["b"]


async def test_a_reservation_of_a_lost_attempt_is_put_right_by_the_next(memory):
    key, budget = f"w{next(numbers)}", Budget(requests=2)
    lost = Meter(None, lambda: Usage(1, 5, 5), WorkflowUsage(memory, key, "0", budget))
    await lost.before()
    assert total(await memory.get(key)).requests == 2
    again = Meter(None, lambda: Usage(1, 5, 5), WorkflowUsage(memory, key, "0", budget))
    await again.before()
    assert total(await memory.get(key)) == Usage(2, 5, 5)


async def test_a_call_that_failed_gives_its_reservation_back(memory):
    key = f"w{next(numbers)}"
    meter = Meter(None, Usage, WorkflowUsage(memory, key, "0", Budget(requests=1)))
    await meter.before()
    await meter.failed()
    await meter.before()
    assert total(await memory.get(key)) == Usage(1, 0, 0)


def test_of_nothing_the_sum_is_nothing():
    assert total(None) == Usage()
    assert Usage(1, 2, 3).total_tokens == 5
