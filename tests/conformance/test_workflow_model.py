"""The script and its twin side by side: random operations, the whole record compared after each, each repeated at will."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from orchestra._workflow.plan import compile_plan, item_step
from orchestra.errors import WorkflowError
from orchestra.memory import MemoryManager
from orchestra.serialization import loads
from orchestra.tasks import BaseTask
from orchestra.workflow import StepState, WorkflowEngine, validate_plan

ID = "w"
END = [StepState.COMPLETED, StepState.COMPLETED, StepState.COMPLETED, StepState.FAILED, StepState.SKIPPED]


@pytest.fixture(autouse=True)
def everything_adds_up():
    """That of the queues; workflows have :func:`check_counts`."""


class Pair:
    """One engine on Redis and one on the twin, driven alike."""

    def __init__(self, manager, name):
        self.manager = manager
        self.engines = [WorkflowEngine(MemoryManager(place, namespace=name)) for place in (manager, "memory:")]
        self.calls = []
        for engine in self.engines:
            engine._ask = self._spied(engine, engine._ask)

    def _spied(self, engine, ask):
        async def spy(op, task_id, *args):
            self.calls.append((engine, op, task_id, args))
            return await ask(op, task_id, *args)

        return spy

    async def do(self, name, *args, **options):
        """Both do it; what they answer is the same, apart from times."""
        told = []
        for engine in self.engines:
            try:
                told.append(shown(await getattr(engine, name)(*args, **options)))
            except WorkflowError as error:
                told.append(str(error))
        assert told[0] == told[1], name
        return told[0]

    async def repeat(self):
        """The last call again, as after a lost reply: nothing changes."""
        calls, self.calls = self.calls, []
        before = await self.records()
        for engine, op, task_id, args in calls:
            store = await engine._store()
            await store.move(op, task_id, engine._retention_ms, engine.memory_manager.max_bytes, args)
        assert await self.records() == before, [(op, args) for _, op, _, args in calls]

    async def records(self):
        found = []
        for engine in self.engines:
            store = await engine._store()
            record, context = await store.read(ID)
            rows = [(row["kind"], row.get("step"), row.get("data")) for _, row in await store.events(ID, "0", 10_000)]
            if hasattr(store, "place"):
                outbox, ended = set(store.place.outbox), [name for _, name in store.place.ended]
            else:
                client, keys = self.manager.client, store.keys
                outbox = {name.decode() for name in await client.zrange(keys.outbox, 0, -1)}
                ended = [row[b"id"].decode() for _, row in await client.xrange(keys.ended)]
            found.append((timeless(record), context, rows, outbox, ended))
        return found

    async def same(self):
        redis, twin = await self.records()
        for mine, other in zip(redis, twin, strict=True):
            assert mine == other


def shown(value):
    """Without times, which are those of two clocks."""
    text = re.sub(r"(created_at|started_at|finished_at)=[0-9.]+", r"\1=T", repr(value))
    return re.sub(r"'life': '[0-9a-f]+'", "'life': T", re.sub(r"'due': [0-9.]+", "'due': T", text))


def timeless(record):
    kept = {}
    for name, value in record.items():
        text = value
        if name in ("created", "ended", "token", "saved", "last") or name.startswith("b:"):
            text = b"T"
        elif name == "task":
            text = loads(value) | {"life": "T"}
        elif name.startswith("q:"):
            words = value.split(b" ")
            words[6:8] = [b"T" if word != b"0" else word for word in words[6:8]]
            text = b" ".join(words)
        elif name.startswith("w:"):
            words = value.split(b" ")
            words[2] = b"T" if words[2] != b"0" else words[2]
            text = b" ".join(words)
        kept[name] = text
    return kept


def check_counts(record):
    """The counters say what the steps say."""
    letters = [record.get(f"q:{i}", b"P")[:1].decode() for i in range(int(record["steps"]))]
    assert int(record["running"]) == letters.count("R")
    waiting = [record.get(f"w:{i}", b"") for i, letter in enumerate(letters) if letter == "W"]
    assert all(waiting)
    if "undoing" not in record:
        assert int(record["left"]) == sum(letter not in "CFS" for letter in letters)
        if record["status"] == b"running":
            assert int(record["children"]) == sum(text.startswith(b"child") for text in waiting)
    current = int(record["current"])
    assert all(letter in "CFS" for letter in letters[:current])


def a_plan(rng):
    size, linked = rng.randint(1, 7), rng.random() < 0.75
    plan = []
    for index in range(size):
        step = {"action": f"a{index}", "id": f"s{index}"}
        kind = rng.random()
        if kind < 0.15:
            step |= {"action": "orchestra.map", "args": {"over": [1, 2, 3], "step": {"action": "each"}}}
            if rng.random() < 0.5:
                step["args"]["step"]["on_failure"] = "continue"
        elif kind < 0.25:
            step |= {"action": "orchestra.signal", "args": {"name": f"n{rng.randint(0, 1)}"}}
        if linked and index and rng.random() < 0.8:
            step["depends_on"] = sorted(rng.sample(range(index), rng.randint(1, min(index, 2))))
        step["on_failure"] = rng.choice(["fail", "skip", "continue", "continue"])
        if rng.random() < 0.4:
            step["compensate"] = {"action": "undo"}
        plan.append(step)
    return validate_plan(plan)


class Session:
    """A random life of one workflow: mostly what a driver would do, sometimes anything."""

    def __init__(self, pair, rng, plan):
        self.pair, self.rng, self.plan, self.fence = pair, rng, plan, 0

    async def step(self):
        state = await self.pair.engines[1].load_workflow_state(ID)
        kind = self.rng.random()
        if kind < 0.1:
            await self.control()
        elif kind < 0.2:
            await self.anything(state)
        else:
            await self.driver(state)

    async def control(self):
        rng, do = self.rng, self.pair.do
        which = rng.choice(["pause", "resume", "resume", "cancel", "next_phase", "signal", "signal", "fail", "context"])
        if which == "signal":
            await self.raw("signal", f"n{rng.randint(0, 1)}", rng.randint(0, 9))
        elif which == "fail":
            await do("fail_workflow", ID, "by hand")
        elif which == "context":
            await do("set_context", ID, "k", rng.randint(0, 2))
        elif which != "cancel" or rng.random() < 0.3:
            await do(which, ID)

    async def raw(self, name, *args):
        """With one token for both engines."""
        await self.pair.do(name, ID, *args)

    async def anything(self, state):
        rng = self.rng
        index, series = rng.randint(0, len(state.steps)), rng.randint(1, 2)
        which = rng.choice(["begin", "finish", "retrying", "park", "fire", "grow"])
        await self.act(which, index, series, rng.randint(0, max(1, self.fence)))

    async def driver(self, state):
        rng = self.rng
        open_ = [s for s in state.steps if s.state not in (StepState.COMPLETED, StepState.SKIPPED)] or state.steps
        step = rng.choice(open_)
        ready = all(state.steps[i].state.value in ("completed", "skipped", "failed") for i in step.depends_on)
        if step.state is StepState.PENDING and ready and step.kind == "map" and not step.role:
            await self.act("grow", step.step_index, step.series, None)
        elif step.state is StepState.PENDING and ready and step.kind == "signal":
            await self.pair.do(
                "park", ID, step.step_index, step.series, signal=state.plan[step.step_index]["args"]["name"]
            )
        elif step.state is StepState.PENDING and ready:
            self.fence += 1
            await self.act("begin", step.step_index, step.series, self.fence)
        elif step.state is StepState.RUNNING:
            which = rng.choices(["finish", "park", "retrying", "begin"], [8, 2, 1, 1])[0]
            self.fence += which == "begin"
            await self.act(which, step.step_index, step.series, self.fence if which == "begin" else None)
        elif step.state is StepState.WAITING:
            await self.act(
                rng.choice(["fire", "finish"]) if step.waiting["for"] != "items" else "begin",
                step.step_index,
                step.series,
                1,
            )
        elif state.phase in ("failing", "cancelling"):
            await self.pair.do("next_phase", ID)

    async def act(self, which, index, series, fence):
        rng, do = self.rng, self.pair.do
        if which == "begin":
            await do("begin", ID, index, series, fence)
        elif which == "finish":
            state = rng.choice(END)
            error = {"message": "no"} if state is StepState.FAILED else None
            result = None if error or rng.random() < 0.2 else {"from": index}
            await do("finish", ID, index, series, state, result, error, fence=fence)
        elif which == "retrying":
            await do("retrying", ID, index, series, "later", 1.0, fence=fence, counted=rng.random() < 0.5)
        elif which == "park":
            how = rng.choice(
                [
                    {"signal": "n0"},
                    {"signal": "n1", "due": 0.001},
                    {"timer": True, "due": 0.001},
                    {"child": "c"},
                    {"timer": True, "due": 99.0},
                ]
            )
            await do("park", ID, index, series, fence=fence, prompt=rng.choice([None, "sure?"]), **how)
            await asyncio.sleep(0.003)  # what is due in a millisecond is due by both clocks
        elif which == "fire":
            await do("fire", ID, index, series)
        else:
            items = []
            if index < len(self.plan) and self.plan[index]["action"] == "orchestra.map":
                step = compile_plan(self.plan)[index]
                items = [{**item_step(step, k), "item": k, "index": k} for k in range(rng.randint(0, 4))]
            await do("grow", ID, items, parent=index, series=series, max_parallel=rng.choice([None, 1, 2]))


@pytest.mark.parametrize("seed", range(40))
async def test_the_script_and_its_twin_do_the_same(manager, seed, monkeypatch):
    rng = random.Random(seed)
    pair, plan = Pair(manager, f"n{seed}"), a_plan(rng)
    driven = rng.random() < 0.95
    parent = ("nobody", 0) if rng.random() < 0.2 else None
    told = await pair.do("initialize_workflow", BaseTask(ID, "t", input=1), plan, driven=driven, parent=parent)
    session = Session(pair, rng, plan)
    for _ in range(60):
        pair.calls.clear()
        await session.step()
        await pair.same()
        check_counts((await (await pair.engines[1]._store()).read(ID))[0])
        if rng.random() < 0.4:
            await pair.repeat()
    assert told
