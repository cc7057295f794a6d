"""WorkflowEngine as workers drive it: readiness, phases, waiting, maps, children, the outbox; on Redis and in this process."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from orchestra import _keys
from orchestra.errors import ConfigurationError, CorruptEntryError, TaskTooLargeError, WorkflowError
from orchestra.memory import MemoryManager
from orchestra.tasks import BaseTask, TaskState
from orchestra.workflow import StepState, WorkflowEngine

DONE, FAILED, SKIPPED = StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED
PENDING, RUNNING, WAITING = StepState.PENDING, StepState.RUNNING, StepState.WAITING


@pytest.fixture(params=["redis", "memory"])
def memory(request):
    place = request.getfixturevalue("manager") if request.param == "redis" else "memory:"
    return MemoryManager(place, namespace="d")


@pytest.fixture
def engine(memory):
    return WorkflowEngine(memory)


def a_task(name="w"):
    return BaseTask(name, "kind", input={"n": 1}, metadata={"m": 1})


async def make(engine, plan, name="w", **options):
    state = await engine.initialize_workflow(a_task(name), plan, driven=True, **options)
    return [ready.index for ready in state.ready]


async def run(engine, index, result=None, *, state=DONE, error=None, name="w", series=1, fence=1):
    """Begin and finish a step; what may be sent then."""
    begun = await engine.begin(name, index, series, fence)
    assert begun.verdict == "go", begun
    return await engine.finish(name, index, series, state, result, error, fence=fence)


def sent(moved):
    return [(ready.index, ready.series) for ready in moved.ready]


async def states(engine, name="w"):
    return [step.state for step in (await engine.load_workflow_state(name)).steps]


DIAMOND = [
    {"action": "a", "id": "top"},
    {"action": "b", "id": "left", "depends_on": ["top"], "args": {"x": {"$ref": "top.n"}}},
    {"action": "c", "id": "right", "depends_on": ["top"]},
    {"action": "d", "id": "end", "depends_on": ["left", "right"]},
]


async def test_a_step_is_ready_when_all_it_depends_on_has_ended(engine):
    assert await make(engine, DIAMOND) == [0]
    assert sent(await run(engine, 0, {"n": 7})) == [(1, 1), (2, 1)]
    begun = await engine.begin("w", 1, 1, 5)
    assert (begun.step.id, begun.step.attempt, begun.total, begun.task["priority"]) == ("left", 1, 4, 2)
    assert begun.known.input == {"n": 1}
    assert begun.known.results == {0: {"n": 7}}
    assert begun.known.step("top").result == {"n": 7}
    assert sent(await engine.finish("w", 1, 1, DONE, "l", fence=5)) == []
    assert sent(await run(engine, 2, "r")) == [(3, 1)]
    moved = await run(engine, 3, "out")
    assert (moved.status, moved.left, moved.running) == (TaskState.COMPLETED, 0, 0)
    state = await engine.load_workflow_state("w")
    assert state.workflow_context == {"final_output": "out"}
    assert state.steps[3].depends_on == (1, 2)


async def test_the_output_of_several_ends_is_theirs_by_id(engine):
    await make(engine, [*DIAMOND[:3], {"action": "d", "id": "off", "depends_on": ["top"], "on_failure": "continue"}])
    await run(engine, 0, {"n": 1})
    await run(engine, 1, "l")
    await run(engine, 2, None)
    await run(engine, 3, state=FAILED, error="no")
    output = (await engine.wait_end("w", 5)).workflow_context["final_output"]
    assert output == {"left": "l", "right": None, "off": None}


async def test_a_fence_decides_between_two_deliveries(engine):
    await make(engine, DIAMOND)
    assert (await engine.begin("w", 0, 1, 5)).verdict == "go"
    assert (await engine.begin("w", 0, 1, 4)).verdict == "stale"
    assert (await engine.begin("w", 0, 2, 9)).verdict == "stale"
    heir = await engine.begin("w", 0, 1, 6)
    assert (heir.verdict, heir.step.attempt) == ("go", 2)
    late = await engine.finish("w", 0, 1, DONE, "zombie", fence=5)
    assert (late.done, late.why) == (False, "stale")
    assert (await engine.finish("w", 0, 1, DONE, {"n": 1}, fence=6)).done
    assert (await engine.begin("w", 0, 1, 7)).verdict == "done"
    assert (await engine.begin("w", 3, 1, 1)).verdict == "stale"  # its turn has not come
    assert (await engine.load_workflow_state("w")).steps[0].result == {"n": 1}


async def test_a_repeated_end_tells_what_was_not_sent(engine):
    await make(engine, DIAMOND)
    first = await run(engine, 0, {"n": 1})
    again = await engine.finish("w", 0, 1, DONE, "other", fence=1)
    assert (again.done, again.why, again.ready) == (True, "repeated", first.ready)
    assert again.version == first.version
    await engine.begin("w", 1, 1, 1)
    assert sent(await engine.finish("w", 0, 1, DONE)) == [(2, 1)]
    assert [r.index for r in (await engine.begin("w", 0, 1, 9)).ready] == [2]
    assert (await engine.finish("w", 0, 1, FAILED)).why == "ended"
    assert (await engine.load_workflow_state("w")).steps[0].result == {"n": 1}


async def test_steps_after_skipped_ones_are_skipped_too(engine):
    plan = [
        {"action": "a", "id": "a"},
        {"action": "b", "id": "b", "on_failure": "skip"},
        {"action": "c", "id": "c", "depends_on": ["a"]},
        {"action": "d", "id": "d", "depends_on": ["c"]},
        {"action": "e", "id": "e", "depends_on": ["c", "b"]},
        {"action": "f", "id": "f", "depends_on": ["d", "e"]},
    ]
    assert await make(engine, plan) == [0, 1]
    assert sent(await engine.finish("w", 0, 1, SKIPPED)) == []
    assert await states(engine) == [SKIPPED, PENDING, SKIPPED, SKIPPED, PENDING, PENDING]
    moved = await run(engine, 1, state=FAILED, error="b is not well")
    assert moved.status is TaskState.COMPLETED
    state = await engine.load_workflow_state("w")
    assert {step.state for step in state.steps} == {SKIPPED}
    assert state.steps[1].error == {"message": "b is not well"}
    assert state.workflow_context["final_output"] is None


async def test_a_sequential_plan_goes_on_after_a_skipped_step(engine):
    await make(engine, [{"action": "a"}, {"action": "b"}])
    assert sent(await engine.finish("w", 0, 1, SKIPPED)) == [(1, 1)]


async def test_a_failure_lets_what_runs_end_and_undoes_the_rest_last_first(engine):
    plan = [
        {"action": "a", "id": "a", "compensate": {"action": "undo_a", "args": {"r": {"$ref": "a"}}}},
        {"action": "b", "id": "b", "compensate": {"action": "undo_b"}},
        {"action": "c", "id": "c"},
        {"action": "late", "id": "d", "depends_on": ["a"], "compensate": {"action": "never"}},
    ]
    plan[0]["depends_on"] = []
    await make(engine, plan)
    await engine.begin("w", 1, 1, 1)
    await run(engine, 0, "made")
    failing = await run(engine, 2, state=FAILED, error={"message": "bad", "type": "E"})
    assert (failing.phase, failing.attention) == ("failing", False)
    assert (await engine.begin("w", 3, 1, 1)).verdict == "stop"
    assert (await engine.signal("w", "s", 1)).why == "stop"
    moved = await engine.finish("w", 1, 1, DONE, "b", fence=1)
    assert (moved.phase, moved.attention) == ("failing", True)
    undo = await engine.next_phase("w")
    assert (undo.phase, sent(undo)) == ("compensating", [(4, 1)])
    assert sent(await engine.next_phase("w")) == [(4, 1)]
    assert sent(await run(engine, 4, state=FAILED, error="undoing failed too")) == [(5, 1)]
    begun = await engine.begin("w", 5, 1, 1)
    assert (begun.step.action, begun.step.role, begun.step.parent) == ("undo_a", "compensation", 0)
    assert begun.known.step("a").result == "made"
    assert (await engine.finish("w", 5, 1, DONE, fence=1)).status is TaskState.FAILED
    state = await engine.load_workflow_state("w")
    assert [s.action for s in state.steps[4:]] == ["undo_b", "undo_a"]
    assert [s.state for s in state.steps] == [DONE, DONE, FAILED, SKIPPED, FAILED, DONE]
    assert state.error == {"message": "bad", "type": "E", "step_index": 2, "action": "c"}
    assert (await engine.resume("w")).why == "compensated"
    kinds = [event.kind async for event in engine.events("w") if event.kind.startswith("workflow.")]
    assert kinds == ["workflow.started", "workflow.failing", "workflow.compensating", "workflow.failed"]


async def test_a_failed_workflow_is_resumed_where_it_failed(engine):
    await make(engine, [*DIAMOND[:3], {"action": "d", "depends_on": ["left", "right"]}])
    await run(engine, 0, {"n": 1})
    await engine.begin("w", 2, 1, 1)
    await run(engine, 1, state=FAILED, error="no")
    assert (await engine.retrying("w", 2, 1, "later", 1.0, fence=1)).status is TaskState.FAILED
    assert (await engine.load_workflow_state("w")).steps[2].state is SKIPPED
    moved = await engine.resume("w")
    assert (moved.status, sent(moved)) == (TaskState.RUNNING, [(1, 2), (2, 2)])
    assert (await engine.begin("w", 1, 1, 99)).verdict == "stale"
    await run(engine, 1, "l", series=2)
    assert sent(await run(engine, 2, "r", series=2)) == [(3, 1)]
    assert (await run(engine, 3, "out")).status is TaskState.COMPLETED
    assert (await engine.load_workflow_state("w")).error is None
    assert (await engine.resume("w")).why == "over"


async def test_cancel_names_what_runs_and_ends_when_it_has(engine):
    await make(engine, DIAMOND)
    await engine.begin("w", 0, 1, 1)
    moved = await engine.cancel("w", "not wanted")
    assert (moved.phase, moved.in_flight) == ("cancelling", ((0, 1),))
    assert (await engine.cancel("w")).done
    stopped = await engine.begin("w", 0, 1, 2)  # its worker died
    assert (stopped.verdict, stopped.moved.status) == ("stop", TaskState.CANCELLED)
    state = await engine.wait_end("w", 5)
    assert (state.status, state.error["message"]) == (TaskState.CANCELLED, "not wanted")
    assert {step.state for step in state.steps} == {SKIPPED}
    assert (await engine.cancel("w")).done
    assert (await engine.finish("w", 1, 1, DONE)).done is False


async def test_pause_holds_what_is_ready_and_resume_sends_it_anew(engine):
    await make(engine, DIAMOND)
    await engine.begin("w", 0, 1, 1)
    assert (await engine.pause("w")).phase == "paused"
    assert sent(await engine.finish("w", 0, 1, DONE, {"n": 1}, fence=1)) == []
    assert (await engine.begin("w", 1, 1, 1)).verdict == "held"
    assert (await engine.load_workflow_state("w")).steps[1].waiting == {"for": "resume"}
    assert await engine.overdue() == []
    assert sent(await engine.resume("w")) == [(1, 2), (2, 2)]
    assert (await engine.begin("w", 1, 1, 9)).verdict == "stale"
    assert (await engine.begin("w", 1, 2, 1)).verdict == "go"
    assert (await engine.resume("w")).done


async def test_a_retried_step_is_pending_until_the_queue_brings_it_back(engine):
    await make(engine, DIAMOND)
    await engine.begin("w", 0, 1, 1)
    moved = await engine.retrying("w", 0, 1, "busy", 2.0, fence=1)
    assert (moved.done, moved.running) == (True, 0)
    assert (await engine.retrying("w", 0, 1, fence=1)).why == "repeated"
    assert (await engine.begin("w", 0, 1, 2)).step.attempt == 2
    await engine.retrying("w", 0, 1, fence=2, counted=False)
    assert (await engine.begin("w", 0, 1, 3)).step.attempt == 2
    told = [event.data async for event in engine.events("w") if event.kind == "step.retrying"]
    assert told == [{"error": {"message": "busy"}, "delay": 2.0}]


async def test_an_agent_that_waits_for_a_signal_runs_again_with_it(engine):
    await make(engine, [{"action": "a"}])
    await engine.begin("w", 0, 1, 1)
    moved = await engine.park("w", 0, 1, signal="approve", prompt="Send it?", fence=1)
    assert (moved.done, moved.running) == (True, 0)
    state = await engine.load_workflow_state("w")
    assert state.steps[0].state is WAITING
    assert state.steps[0].waiting == {"for": "signal", "name": "approve", "due": None, "prompt": "Send it?"}
    assert (await engine.begin("w", 0, 1, 2)).verdict == "done"
    signalled = await engine.signal("w", "approve", {"ok": True}, by="ada")
    assert sent(signalled) == [(0, 2)]
    assert (await engine.signal("w", "approve", False)).why == "answered"
    begun = await engine.begin("w", 0, 2, 1)
    assert begun.known.signals == {"approve": {"ok": True}}
    assert (await engine.finish("w", 0, 2, DONE, "sent", fence=1)).status is TaskState.COMPLETED
    assert (await engine.signal("w", "other")).why == "over"


async def test_a_signal_step_completes_with_the_value_also_of_one_that_came_before(engine):
    plan = [{"action": "orchestra.signal", "args": {"name": n}, "depends_on": []} for n in ("early", "late")]
    await make(engine, plan)
    await engine.signal("w", "early", 1)
    assert (await engine.park("w", 0, 1, signal="early")).why == "signalled"
    assert (await engine.park("w", 1, 1, signal="late")).why == ""
    assert (await engine.signal("w", "late", 2)).status is TaskState.COMPLETED
    assert [step.result for step in (await engine.load_workflow_state("w")).steps] == [1, 2]


async def test_timers_and_timeouts_fire_when_they_are_due(engine):
    await make(engine, [{"action": "a", "depends_on": []}, {"action": "b"}, {"action": "c"}])
    assert (await engine.fire("w", 0, 1)).why == "repeated"
    await engine.park("w", 0, 1, timer=True, due=60)
    assert (await engine.fire("w", 0, 1)).why == "early"
    await engine.park("w", 1, 1, timer=True, due=0.001)
    await engine.begin("w", 2, 1, 1)
    await engine.park("w", 2, 1, signal="s", due=0.001, fence=1)
    await asyncio.sleep(0.005)
    assert (await engine.fire("w", 1, 1)).left == 2
    moved = await engine.fire("w", 2, 1)
    assert moved.status is TaskState.FAILED
    state = await engine.load_workflow_state("w")
    assert [step.state for step in state.steps] == [SKIPPED, DONE, FAILED]
    assert state.error["type"] == "SignalTimeout"


MAP = [{"action": "orchestra.map", "id": "m", "args": {"over": [5, 6, 7], "step": {"action": "each"}}}]


def items(count, **more):
    return [{"action": "each", "id": f"m[{k}]", "item": 5 + k, "index": k, **more} for k in range(count)]


async def test_a_map_runs_its_items_and_gathers_their_results_in_order(engine):
    await make(engine, [*MAP, {"action": "after"}])
    grown = await engine.grow("w", items(3), parent=0, series=1, max_parallel=2)
    assert (sent(grown), grown.total) == ([(2, 1), (3, 1)], 5)
    assert sent(await engine.grow("w", items(3), parent=0, series=1, max_parallel=2)) == [(2, 1), (3, 1)]
    assert (await engine.begin("w", 4, 1, 1)).verdict == "stale"
    begun = await engine.begin("w", 3, 1, 1)
    assert (begun.known.item, begun.known.index, begun.step.role, begun.step.parent) == (6, 1, "item", 0)
    assert sent(await engine.finish("w", 3, 1, DONE, 60, fence=1)) == [(4, 1)]
    await run(engine, 4, 70)
    assert sent(await run(engine, 2, 50)) == [(1, 1)]
    state = await engine.load_workflow_state("w")
    assert (state.steps[0].state, state.steps[0].result) == (DONE, [50, 60, 70])
    assert (len(state.plan), len(state.steps)) == (2, 5)


async def test_no_items_are_an_empty_list(engine):
    await make(engine, MAP)
    assert (await engine.grow("w", [], parent=0)).status is TaskState.COMPLETED
    assert (await engine.load_workflow_state("w")).workflow_context["final_output"] == []


async def test_a_failed_item_fails_the_map_and_those_that_wait_begin_no_more(engine):
    await make(engine, [{**MAP[0], "on_failure": "continue"}, {"action": "after"}])
    await engine.grow("w", items(4), parent=0, max_parallel=2)
    await engine.begin("w", 2, 1, 1)
    assert sent(await run(engine, 3, state=FAILED, error="no")) == []
    assert await states(engine) == [WAITING, PENDING, RUNNING, FAILED, SKIPPED, SKIPPED]
    assert sent(await engine.finish("w", 2, 1, DONE, 1, fence=1)) == [(1, 1)]
    step = (await engine.load_workflow_state("w")).steps[0]
    assert (step.state, step.error) == (FAILED, {"message": "no"})


async def test_items_that_may_fail_leave_a_hole(engine):
    await make(engine, MAP)
    await engine.grow("w", items(2, on_failure="continue"), parent=0)
    await run(engine, 1, state=FAILED, error="no")
    await run(engine, 2, 2)
    assert (await engine.load_workflow_state("w")).steps[0].result == [None, 2]


async def test_results_of_a_map_beyond_the_limit_fail_it(memory):
    engine = WorkflowEngine(MemoryManager(memory._manager, namespace="d", max_bytes=600))
    await make(engine, MAP)
    await engine.grow("w", items(3), parent=0)
    for index in (1, 2, 3):
        moved = await run(engine, index, "x" * 300)
    assert moved.status is TaskState.FAILED
    assert (await engine.load_workflow_state("w")).error["type"] == "TaskTooLargeError"
    with pytest.raises(WorkflowError, match="at most 10000 items"):
        await engine.grow("w", items(10_001), parent=0)


async def test_the_end_of_a_child_is_the_end_of_its_parents_step(engine):
    await make(engine, [{"action": "orchestra.workflow", "args": {"plan": [{"action": "x"}]}}, {"action": "after"}])
    await make(engine, [{"action": "x"}], name="child", parent=("w", 0))
    assert (await engine.park("w", 0, 1, child="child")).done
    ended = await run(engine, 0, "from the child", name="child")
    assert ended.status is TaskState.COMPLETED
    parent, moved = ended.parent
    assert (parent, sent(moved)) == ("w", [(1, 1)])
    state = await engine.load_workflow_state("w")
    assert (state.steps[0].state, state.steps[0].result) == (DONE, "from the child")
    assert (await engine.load_workflow_state("child")).parent == ("w", 0)
    assert (await engine.next_phase("child")).parent[1].why == "repeated"


async def test_a_child_is_kept_until_its_parent_has_been_told(manager):
    engine = WorkflowEngine(MemoryManager(manager, namespace="d"), retention=100)
    await make(engine, [{"action": "orchestra.workflow", "args": {"plan": [{"action": "x"}]}}])
    await make(engine, [{"action": "x"}], name="child", parent=("w", 0))
    key = _keys.WorkflowKeys("d").state("child")
    await engine.begin("child", 0, 1, 1)
    store = await engine._store()
    args = (0, 1, 1, "completed", engine._packed("r", "out"), b"")
    await store.move("finish", "child", 100_000, 1_000, args)  # and then the process dies
    assert await manager.client.pttl(key) == -1
    assert (await engine.load_workflow_state("w")).steps[0].state is PENDING
    await hasten(engine, manager)
    assert "child" in dict(await engine.overdue())
    name, moved = (await engine.next_phase("child")).parent
    assert (name, moved.status) == ("w", TaskState.COMPLETED)
    assert 0 < await manager.client.pttl(key) <= 100_000
    await hasten(engine, manager)
    assert await engine.overdue() == []


async def test_a_child_that_ends_before_its_parent_waits_is_not_lost(engine):
    await make(
        engine, [{"action": "orchestra.workflow", "args": {"plan": [{"action": "x"}]}, "on_failure": "continue"}]
    )
    await make(engine, [{"action": "x"}], name="child", parent=("w", 0))
    ended = await run(engine, 0, state=FAILED, error="no", name="child")
    assert ended.parent[1].status is TaskState.COMPLETED
    assert (await engine.park("w", 0, 1, child="child")).why == "repeated"
    error = (await engine.load_workflow_state("w")).steps[0].error
    assert (error["type"], error["child"], error["cause"]["message"]) == ("ChildWorkflow", "child", "no")


async def test_cancel_names_the_children_that_run(engine):
    await make(engine, [{"action": "orchestra.workflow", "args": {"plan": [{"action": "x"}]}}])
    await make(engine, [{"action": "x"}], name="child", parent=("w", 0))
    await engine.park("w", 0, 1, child="child")
    moved = await engine.cancel("w")
    assert (moved.children, moved.attention) == (("child",), True)
    told = await engine.next_phase("w")
    assert (told.status, told.children) == (TaskState.CANCELLED, ("child",))
    assert (await engine.cancel("child")).status is TaskState.CANCELLED


async def hasten(engine, manager):
    """Everything in the outbox is overdue."""
    store = await engine._store()
    if hasattr(store, "place"):
        store.place.outbox = dict.fromkeys(store.place.outbox, 1)
    else:
        for member in await manager.client.zrange(store.keys.outbox, 0, -1):
            await manager.client.zadd(store.keys.outbox, {member: 1})


async def test_the_outbox_has_what_was_committed_and_did_not_begin(engine, manager):
    await make(engine, DIAMOND)
    assert await engine.overdue() == []  # whoever committed it is sending it now
    await hasten(engine, manager)
    ((name, moved),) = await engine.overdue()
    assert (name, sent(moved), moved.task["metadata"]) == ("w", [(0, 1)], {"m": 1})
    assert await engine.overdue() == []  # one sweep at a time has it
    await engine.begin("w", 0, 1, 1)
    await hasten(engine, manager)
    assert await engine.overdue() == []
    await engine.finish("w", 0, 1, DONE, {"n": 1})
    await engine.park("w", 1, 1, timer=True, due=0.001)
    await make(engine, [{"action": "x", "compensate": {"action": "u"}}, {"action": "y"}], name="v")
    await run(engine, 0, name="v")
    await run(engine, 1, name="v", state=FAILED, error="no")
    await asyncio.sleep(0.005)
    await hasten(engine, manager)
    found = dict(await engine.overdue())
    assert (sent(found["w"]), found["w"].due) == ([(2, 1)], ((1, 1),))
    assert found["v"].attention


async def test_the_sweep_passes_over_what_is_damaged_and_forgets_what_is_gone(engine, manager, caplog):
    for name in ("w", "gone", "bad"):
        await make(engine, DIAMOND, name=name)
    store = await engine._store()
    if hasattr(store, "place"):
        del store.place.records["gone"]
        store.place.records["bad"]["left"] = b"?"
    else:
        await manager.client.delete(store.keys.state("gone"))
        await manager.client.hset(store.keys.state("bad"), "left", "?")
    await hasten(engine, manager)
    assert [name for name, _ in await engine.overdue()] == ["w"]
    assert "workflow bad cannot go on" in caplog.text
    await hasten(engine, manager)
    assert [name for name in await store.due(10) if name.startswith("gone")] == []


async def test_lists_and_progress(engine):
    for number in range(5):
        await make(engine, DIAMOND, name=f"w{number}")
        await asyncio.sleep(0.002)
    await run(engine, 0, {"n": 1}, name="w3")
    await engine.cancel("w1")
    assert [each.id for each in await engine.list_workflows()] == ["w4", "w3", "w2", "w1", "w0"]
    assert [each.id for each in await engine.list_workflows(limit=2)] == ["w4", "w3"]
    assert [each.id for each in await engine.list_workflows(status=TaskState.CANCELLED)] == ["w1"]
    third = (await engine.list_workflows())[1]
    assert (third.completed, third.total, third.type, third.status) == (1, 4, "kind", TaskState.RUNNING)
    assert [each.id for each in await engine.list_workflows(before=third.created_at)] == ["w2", "w1", "w0"]
    progress = await engine.progress("w3")
    assert (progress.completed, progress.total, progress.current, progress.phase) == (1, 4, 1, "running")
    assert (await engine.progress("w1")).status is TaskState.CANCELLED


async def test_events_can_be_followed_and_resumed_from_a_position(engine):
    async def follow(after="0"):
        return [event async for event in engine.events("w", after, follow=True)]

    early = asyncio.create_task(follow())  # before there is a workflow
    await make(engine, [{"action": "a"}])
    await engine.begin("w", 0, 1, 1)
    assert await engine.emit("w", "progress", {"fraction": 0.5}, step=0)
    seen = [event async for event in engine.events("w")]
    assert [event.kind for event in seen] == ["workflow.started", "step.ready", "step.started", "progress"]
    late = asyncio.create_task(follow(seen[-1].id))
    await engine.finish("w", 0, 1, DONE, "out", fence=1)
    async with asyncio.timeout(20):
        assert [(event.kind, event.step) for event in await late] == [
            ("step.completed", 0),
            ("workflow.completed", None),
        ]
        everything = await early
    assert [event.kind for event in everything[:4]] == [event.kind for event in seen]
    assert (everything[3].step, everything[3].data) == (0, {"fraction": 0.5})
    assert everything[0].at <= everything[-1].at
    assert not await engine.emit("w", "progress")


async def test_waiting_for_the_end(engine):
    waiting = asyncio.create_task(engine.wait_end("w", 20))
    with pytest.raises(TimeoutError, match="has not ended after 0.01 s"):
        await engine.wait_end("w", 0.01)
    await make(engine, [{"action": "a"}])
    await run(engine, 0, 5)
    assert (await waiting).workflow_context == {"final_output": 5}
    assert (await engine.wait_end("w")).status is TaskState.COMPLETED


async def test_the_context_is_shared_and_saved(engine):
    await make(engine, [{"action": "a"}], context={"old": 1})
    await engine.set_context("w", "note", "n")
    assert (await engine.facts("w", 0)).context == {"old": 1, "note": "n"}
    state = await engine.load_workflow_state("w")
    state.workflow_context["more"] = 2
    await engine.save_workflow_state(state)
    assert (await engine.load_workflow_state("w")) == state
    stale = await engine.load_workflow_state("w")
    await engine.set_context("w", "note", "m")
    stale.workflow_context["more"] = 3
    with pytest.raises(WorkflowError, match="changed by somebody else"):
        await engine.save_workflow_state(stale)
    fresh = await engine.load_workflow_state("w")
    fresh.steps[0].state = DONE
    with pytest.raises(WorkflowError, match="driven by workers"):
        await engine.save_workflow_state(fresh)
    with pytest.raises(WorkflowError, match="driven by workers"):
        await engine.update_step_state("w", 0, DONE)
    await run(engine, 0)
    with pytest.raises(WorkflowError, match="is completed and cannot change"):
        await engine.set_context("w", "note", "late")


async def test_failing_by_hand_stops_a_driven_one(engine):
    await make(engine, DIAMOND)
    await engine.begin("w", 0, 1, 1)
    state = await engine.fail_workflow("w", "enough")
    assert (state.status, state.phase) == (TaskState.RUNNING, "failing")
    assert (await engine.finish("w", 0, 1, DONE, fence=1)).status is TaskState.FAILED
    assert (await engine.load_workflow_state("w")).error == {"message": "enough"}


async def test_unknown_ones_are_named(engine):
    calls = [
        lambda n: engine.begin(n, 0, 1, 1),
        lambda n: engine.facts(n, 0),
        lambda n: engine.finish(n, 0, 1, DONE),
        lambda n: engine.retrying(n, 0, 1),
        lambda n: engine.park(n, 0, 1, timer=True),
        lambda n: engine.fire(n, 0, 1),
        lambda n: engine.grow(n, [], parent=0),
        lambda n: engine.signal(n, "s"),
        lambda n: engine.pause(n),
        lambda n: engine.resume(n),
        lambda n: engine.cancel(n),
        lambda n: engine.next_phase(n),
        lambda n: engine.progress(n),
        lambda n: engine.set_context(n, "a", 1),
    ]
    for call in calls:
        with pytest.raises(WorkflowError, match="no workflow for task nobody"):
            await call("nobody")
    await make(engine, DIAMOND)
    for call in (
        lambda: engine.begin("w", 4, 1, 1),
        lambda: engine.finish("w", 9, 1, DONE),
        lambda: engine.facts("w", 4),
    ):
        with pytest.raises(WorkflowError, match="steps 0 to 3"):
            await call()
    with pytest.raises(ConfigurationError, match="at most 106"):
        await make(engine, DIAMOND, name="x" * 118)
    with pytest.raises(WorkflowError, match="one of signal, timer and child"):
        await engine.park("w", 0, 1)
    with pytest.raises(WorkflowError, match="ends as completed"):
        await engine.finish("w", 0, 1, RUNNING)


async def test_a_result_that_cannot_be_recorded_changes_nothing(memory):
    engine = WorkflowEngine(MemoryManager(memory._manager, namespace="d", max_bytes=500))
    await make(engine, DIAMOND)
    await engine.begin("w", 0, 1, 1)
    with pytest.raises(TaskTooLargeError, match="result of step 0"):
        await engine.finish("w", 0, 1, DONE, b"x" * 1000, fence=1)
    assert await states(engine) == [RUNNING, PENDING, PENDING, PENDING]


ALL = [
    "format",
    "status",
    "phase",
    "driven",
    "token",
    "steps",
    "planned",
    "left",
    "running",
    "undo",
    "children",
    "order",
]


@pytest.mark.parametrize("field", [*ALL, "current", "version", "n:0", "q:0", "p:0", "input", "task", "d:1", "r:0"])
async def test_damage_is_a_typed_error_and_changes_nothing(manager, field):
    engine = WorkflowEngine(MemoryManager(manager, namespace="d"))
    await make(engine, DIAMOND)
    await run(engine, 0, {"n": 1})
    keys = _keys.WorkflowKeys("d")
    await manager.client.hset(keys.state("w"), field, b"\xc1?")
    before = [await manager.client.hgetall(keys.state("w")), await manager.client.xlen(keys.events("w"))]
    errors = 0
    for call in (
        lambda: engine.load_workflow_state("w"),
        lambda: engine.next_phase("w"),
        lambda: engine.facts("w", 1),
        lambda: engine.resume("w"),
    ):
        with contextlib.suppress(WorkflowError):
            try:
                await call()
            except CorruptEntryError as error:
                assert "left as it is" in str(error)
                errors += 1
    assert errors >= (field not in ("driven", "token"))
    assert [await manager.client.hgetall(keys.state("w")), await manager.client.xlen(keys.events("w"))] == before


async def test_a_key_of_another_kind_is_damage(manager):
    engine = WorkflowEngine(MemoryManager(manager, namespace="d"))
    await manager.client.set(_keys.WorkflowKeys("d").state("w"), "text")
    for call in (
        lambda: engine.load_workflow_state("w"),
        lambda: engine.begin("w", 0, 1, 1),
        lambda: make(engine, DIAMOND),
    ):
        with pytest.raises(CorruptEntryError, match="left as it is"):
            await call()
    assert await manager.client.get(_keys.WorkflowKeys("d").state("w")) == b"text"


async def test_one_of_many_that_begin_a_step_at_once_gets_it(memory):
    engines = [WorkflowEngine(memory) for _ in range(8)]
    await make(engines[0], DIAMOND)
    begun = await asyncio.gather(*(e.begin("w", 0, 1, fence) for fence, e in enumerate(engines, 1)))
    winners = [fence for fence, b in enumerate(begun, 1) if b.verdict == "go"]
    assert winners[-1] == max(winners)
    ends = await asyncio.gather(*(e.finish("w", 0, 1, DONE, fence, fence=fence) for fence, e in enumerate(engines, 1)))
    assert sum(moved.done and moved.why == "" for moved in ends) == 1
    assert (await engines[0].load_workflow_state("w")).steps[0].result == winners[-1]
