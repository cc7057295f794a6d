"""What a plan may say: every fault named, the graph it means, and the args a step is given."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._workflow.plan import (
    MAX_STEPS,
    PlannedStep,
    compensation_step,
    compile_plan,
    compile_step,
    item_step,
    ready_args,
    topological,
    validate_plan,
)
from orchestra._workflow.refs import UNSET, Facts, StepFact
from orchestra.errors import WorkflowError
from orchestra.tasks import Retry


def faults_of(plan, **more) -> tuple[str, ...]:
    with pytest.raises(WorkflowError) as caught:
        validate_plan(plan, **more)
    assert caught.value.faults
    assert caught.value.faults[0] in str(caught.value)
    return caught.value.faults


def step(**more) -> dict:
    return {"action": "a", **more}


def mapped(**template) -> dict:
    return {"action": "orchestra.map", "args": {"over": [1], "step": {"action": "a", **template}}}


# -- what comes out


def test_a_plan_gets_its_defaults_and_keeps_what_it_does_not_know():
    plan = [{"action": "fetch"}, {"action": "send", "id": "out", "args": {"to": 1}, "reasoning": "so", "model": "s"}]
    valid = validate_plan(plan)
    assert valid == [
        {"action": "fetch", "args": None, "reasoning": ""},
        {"id": "out", "action": "send", "args": {"to": 1}, "reasoning": "so", "model": "s"},
    ]
    assert plan[0] == {"action": "fetch"}, "the plan given is left as it is"
    assert validate_plan(valid) == valid
    assert [each.id for each in compile_plan(valid)] == ["0", "out"]
    assert compile_plan(valid)[1].extra == {"model": "s"}


def test_every_word_of_a_step_is_compiled():
    (one, two) = compile_plan(
        validate_plan(
            [
                step(id="one"),
                {
                    "id": "two",
                    "action": "send",
                    "args": {"rows": {"$ref": "one.rows"}},
                    "reasoning": "why",
                    "depends_on": [0],
                    "retry": {"max_retries": 2, "base": 0.5},
                    "timeout": 5,
                    "when": {"exists": {"$ref": "one.rows"}},
                    "on_failure": "continue",
                    "compensate": {"action": "undo", "args": {"sent": {"$ref": "two"}}},
                },
            ]
        )
    )
    assert one == PlannedStep(0, "one", "a")
    assert (two.index, two.id, two.action, two.kind, two.reasoning) == (1, "two", "send", "agent", "why")
    assert (two.depends_on, two.linked, two.reads) == ((0,), True, frozenset({0}))
    assert (two.retry, two.timeout, two.on_failure) == (Retry(max_retries=2, base=0.5), 5.0, "continue")
    assert two.when == {"exists": {"$ref": "one.rows"}}
    assert two.compensate == {"action": "undo", "args": {"sent": {"$ref": "two"}}}
    assert compile_plan(validate_plan([step(retry=4)]))[0].retry == Retry(max_retries=4)


def test_without_depends_on_steps_follow_one_another():
    steps = compile_plan(validate_plan([step(), step(args={"x": {"$ref": "0"}}), step(args={"x": {"$ref": "0.y"}})]))
    assert [each.depends_on for each in steps] == [(), (0,), (1,)]
    assert not any(each.linked for each in steps)
    assert [each.reads for each in steps] == [frozenset(), {0}, {0}]


def test_one_depends_on_makes_a_graph_where_references_are_dependencies_too():
    plan = [
        step(id="a"),
        step(id="b"),
        step(id="c", depends_on=["a", 1]),
        step(id="d", args={"deep": [{"x": {"$ref": "b.rows.0"}}]}, when={"eq": [{"$ref": "c"}, 1]}),
        step(id="e", args={"$literal": {"$ref": "nobody"}}),
        step(id="f", depends_on=[], args={"x": {"$ref": "input.q"}, "y": {"$ref": "context.k"}}),
    ]
    steps = compile_plan(validate_plan(plan))
    assert [each.depends_on for each in steps] == [(), (), (0, 1), (1, 2), (), ()]
    assert [each.linked for each in steps] == [False, False, True, True, False, False]
    assert steps[3].reads == {1, 2}


def test_an_empty_depends_on_makes_a_graph_too():
    assert [each.depends_on for each in compile_plan(validate_plan([step(), step(depends_on=[])]))] == [(), ()]


def test_in_a_graph_a_step_may_wait_for_a_later_one():
    steps = compile_plan(validate_plan([step(depends_on=[1]), step(id="b")]))
    assert topological(steps) == [1, 0]


def test_references_within_a_map_are_the_maps_dependencies_but_item_and_index_are_not():
    plan = [
        step(id="list", depends_on=[]),
        step(id="style"),
        {
            "action": "orchestra.map",
            "args": {
                "over": {"$ref": "list"},
                "step": step(args={"it": {"$ref": "item"}, "n": {"$ref": "index"}, "s": {"$ref": "style"}}),
            },
        },
    ]
    (_, _, mapping) = compile_plan(validate_plan(plan))
    assert (mapping.kind, mapping.depends_on, mapping.reads) == ("map", (0, 1), {0, 1})


def test_the_plan_of_a_child_speaks_of_its_own_steps():
    child = {"action": "orchestra.workflow", "args": {"plan": [step(id="x"), step(args={"r": {"$ref": "x"}})]}}
    (only,) = compile_plan(validate_plan([child]))
    assert (only.kind, only.reads) == ("workflow", frozenset())
    assert ready_args(only, Facts()) == child["args"]


def test_grown_steps_know_the_steps_of_the_plan():
    plan = validate_plan(
        [
            step(id="x", compensate={"action": "undo", "args": {"r": {"$ref": "x"}}, "retry": 1}),
            {"action": "orchestra.map", "id": "m", "args": {"over": [5], "step": step(args={"r": {"$ref": "x"}})}},
        ]
    )
    steps, ids = compile_plan(plan), {"x": 0, "m": 1}
    item = compile_step(item_step(steps[1], 4), 2, ids, depends_on=())
    assert (item.index, item.id, item.action, item.reads) == (2, "m[4]", "a", {0})
    undo = compile_step(compensation_step(steps[0]), 3, ids)
    assert (undo.id, undo.action, undo.reads, undo.retry) == ("x~undo", "undo", {0}, Retry(max_retries=1))


# -- what is refused


WORD = "must be 1 to 128 printable ASCII characters without spaces"


@pytest.mark.parametrize(
    ("bad", "fault"),
    [
        ("text", "step 0: expected a dict, got str"),
        ({"action": "x", 1: 2}, "step 0: its keys must be strings"),
        ({}, f"step 0: action {WORD}, got None"),
        (step(action="a b"), f"step 0: action {WORD}, got 'a b'"),
        (step(action="orchestra.timer"), "step 0: action 'orchestra.timer' is unknown; built-in actions are"),
        (step(args=[1]), "step 0: args must be a dict with string keys, got [1]"),
        (step(args={1: 2}), "step 0: args must be a dict with string keys, got {1: 2}"),
        (step(reasoning=5), "step 0: reasoning must be text, got int"),
        (step(id="a.b"), "step 0 ('a.b'): id must be 1 to 128 printable ASCII characters without spaces and dots"),
        (step(id=5), "step 0 (5): id must be"),
        (step(id=""), "step 0 (''): id must be"),
        (step(id="input"), "step 0 ('input'): id 'input' means something else in a $ref"),
        (step(id="item"), "step 0 ('item'): id 'item' means something else"),
        (step(id="workflow"), "step 0 ('workflow'): id 'workflow' means something else"),
        (step(depends_on="0"), "step 0: depends_on must be a list of ids or indexes of steps, got '0'"),
        (step(depends_on=["zzz"]), "step 0: depends_on names 'zzz', which is no step of this plan"),
        (step(depends_on=[7]), "step 0: depends_on names 7, which is no step of this plan"),
        (step(depends_on=[-1]), "step 0: depends_on names -1, which is no step of this plan"),
        (step(depends_on=[True]), "step 0: depends_on names True, which is no step of this plan"),
        (step(depends_on=[None]), "step 0: depends_on names None, which is no step of this plan"),
        (step(depends_on=[0]), "step 0: depends on itself"),
        (
            step(args={"x": {"$ref": "zz.y"}}),
            "step 0: args.x: $ref 'zz.y' leads to 'zz', which is no step of this plan",
        ),
        (step(args={"x": {"$ref": "0"}}), "step 0: args.x: $ref '0' leads to the step itself"),
        (step(args={"x": {"$ref": "item"}}), "which is no step of this plan outside of the step of a map"),
        (step(args={"x": [{"$ref": 5}]}), "step 0: args.x.0: a $ref must be a text such as 'fetch.rows.0'"),
        (step(args={"x": {"$ref": "a..b"}}), "step 0: args.x: a $ref has no empty parts"),
        (step(args={"x": {"$ref": []}}), "step 0: args.x: a $ref must be a text"),
        (step(args={"x": {"$ref": ["a", 1.5]}}), "step 0: args.x: the parts of a $ref must be texts or whole numbers"),
        (step(args={"x": {"$ref": "a.$what"}}), "step 0: args.x: a step has $error and $state, no '$what'"),
        (step(args={"x": {"$ref": "input", "or": 1}}), "step 0: args.x: $ref stands alone in its dict, here with 'or'"),
        (step(args={"x": {"$literal": 1, "y": 2}}), "step 0: args.x: $literal stands alone in its dict, here with 'y'"),
        (step(retry=-1), "step 0: retry must be a whole number of retries from 0 to 1000, got -1"),
        (step(retry=True), "step 0: retry must be a whole number of retries or a dict of Retry's fields, got True"),
        (step(retry="3"), "step 0: retry must be a whole number of retries or a dict"),
        (step(retry=Retry()), "step 0: retry must be a whole number of retries or a dict"),
        (step(retry={"tries": 3}), "step 0: retry has no field 'tries'; fields are max_retries, base"),
        (step(retry={"base": 0}), "step 0: Retry.base must be a number of seconds, above 0"),
        (step(retry={"jitter": 1}), "step 0: Retry.jitter must be True or False, got 1"),
        (step(timeout=0), "step 0: timeout must be a number of seconds, above 0"),
        (step(timeout="5"), "step 0: timeout must be a number of seconds"),
        (step(timeout=float("nan")), "step 0: timeout must be a number of seconds"),
        (step(on_failure="retry"), "step 0: on_failure must be one of fail, skip, continue, got 'retry'"),
        (step(on_failure=None), "step 0: on_failure must be one of fail, skip, continue, got None"),
        (step(on_failure=[1]), "step 0: on_failure must be one of fail, skip, continue, got [1]"),
        (step(when="yes"), "step 0: when: a condition is a truth value, a $ref or a dict of one word, got 'yes'"),
        (
            step(when={"eq": [1, 2], "ne": [1, 2]}),
            "step 0: when: a condition is a truth value, a $ref or a dict of one",
        ),
        (step(when={"gte": [1, 2]}), "step 0: when.gte: is no word of a condition; those are eq, ne, lt"),
        (step(when={"eq": [1]}), "step 0: when.eq: takes a list of two values, got [1]"),
        (step(when={"and": []}), "step 0: when.and: takes a list of one condition or more, got []"),
        (step(when={"not": {"or": [{"exists": 5}]}}), "step 0: when.not.or.0.exists: takes a $ref, got 5"),
        (step(when={"$ref": "zz"}), "step 0: when: $ref 'zz' leads to 'zz', which is no step of this plan"),
        (step(compensate="undo"), "step 0: compensate must be a dict such as {'action': …, 'args': …}, got 'undo'"),
        (step(compensate={}), f"step 0: compensate: action {WORD}, got None"),
        (step(compensate={"action": "orchestra.sleep"}), "step 0: compensate: action 'orchestra.sleep' is built in"),
        (step(compensate={"action": "u", "args": 5}), "step 0: compensate.args must be a dict with string keys, got 5"),
        (step(compensate={"action": "u", "retry": -1}), "step 0: compensate: retry must be a whole number"),
        (step(compensate={"action": "u", "args": {"x": {"$ref": "zz"}}}), "step 0: compensate.args.x: $ref 'zz' leads"),
        ({"action": "orchestra.signal"}, f"step 0: args.name {WORD}, got None"),
        ({"action": "orchestra.signal", "args": {"name": "a", "timeout": 0}}, "step 0: args.timeout must be a number"),
        (
            {"action": "orchestra.signal", "args": {"name": "a", "prompt": 1}},
            "step 0: args.prompt must be text, got int",
        ),
        (
            {"action": "orchestra.signal", "args": {"name": "a", "to": 1}},
            "orchestra.signal takes no 'to' in args; it takes",
        ),
        ({"action": "orchestra.sleep"}, "step 0: args.seconds must be a number of seconds, 0 or more"),
        ({"action": "orchestra.sleep", "args": {"seconds": -1}}, "step 0: args.seconds must be a number of seconds"),
        (
            {"action": "orchestra.map", "args": {"step": step()}},
            "step 0: args.over must be a list or a $ref to one, got None",
        ),
        ({"action": "orchestra.map", "args": {"over": []}}, "step 0: args.step: expected a dict, got NoneType"),
        (mapped(action="x y"), f"step 0: args.step: action {WORD}, got 'x y'"),
        (mapped(action="orchestra.map"), "step 0: args.step: a map within a map needs a workflow of its own"),
        (mapped(id="x"), "step 0: args.step: id belongs to the step that maps"),
        (mapped(depends_on=[0]), "step 0: args.step: depends_on belongs to the step that maps"),
        (mapped(compensate={"action": "u"}), "step 0: args.step: compensate belongs to the step that maps"),
        (mapped(on_failure="skip"), "step 0: args.step: on_failure of an item is 'fail' or 'continue'"),
        (mapped(args={"x": {"$ref": "zz"}}), "step 0: args.step.args.x: $ref 'zz' leads to 'zz'"),
        (mapped(when={"$ref": 5}), "step 0: args.step.when: a $ref must be a text"),
        (
            {"action": "orchestra.map", "args": {"over": [], "step": step(), "max_parallel": 0}},
            "step 0: args.max_parallel must be a whole number of items from 1 to 10000, got 0",
        ),
        ({"action": "orchestra.workflow"}, "step 0: args must have either plan (a list of steps) or type"),
        (
            {"action": "orchestra.workflow", "args": {"plan": [step()], "type": "t"}},
            "step 0: args must have either plan",
        ),
        (
            {"action": "orchestra.workflow", "args": {"plan": "x"}},
            "step 0: args.plan must be a list of steps or a $ref",
        ),
        (
            {"action": "orchestra.workflow", "args": {"plan": []}},
            "step 0: args.plan: expected a list of 1 to 10000 steps",
        ),
        (
            {"action": "orchestra.workflow", "args": {"plan": [step(), step(depends_on=[5])]}},
            "step 0: args.plan: step 1: depends_on names 5, which is no step of this plan",
        ),
        ({"action": "orchestra.workflow", "args": {"type": "a b"}}, f"step 0: args.type {WORD}, got 'a b'"),
    ],
)
def test_each_fault_of_a_step_is_named(bad, fault):
    faults = faults_of([bad])
    assert len(faults) == 1, faults
    assert fault in faults[0]


@pytest.mark.parametrize("plan", [None, [], (), {}, "plan", 5, [step()] * (MAX_STEPS + 1)])
def test_what_is_no_list_of_1_to_10000_steps_is_no_plan(plan):
    assert "expected a list of 1 to 10000 steps, got" in faults_of(plan)[0]


def test_ids_are_unique_and_a_step_without_one_has_its_index():
    assert faults_of([step(id="x"), step(), step(id="x"), step(id="1")]) == (
        "step 2: id 'x' is taken by step 0",
        "step 3: id '1' is taken by step 1",
    )


def test_actions_are_checked_only_where_they_are_known():
    plan = [step(action="fetch"), mapped(action="zzz"), step(action="orchestra.sleep", args={"seconds": 0})]
    assert len(validate_plan(plan)) == 3
    assert faults_of(plan, actions=["fetch", "send"]) == (
        "step 1: args.step: action 'zzz' is unknown; known are: fetch, send",
    )
    assert faults_of([step(compensate={"action": "u"})], actions={"a"}) == (
        "step 0: compensate: action 'u' is unknown; known are: a",
    )
    child = {"action": "orchestra.workflow", "args": {"plan": [step(action="n")]}}
    assert faults_of([child], actions=[]) == ("step 0: args.plan: step 0: action 'n' is unknown; known are: none",)
    assert "and 30 more" in faults_of([step(action="zzz")], actions=[f"agent{n}" for n in range(50)])[0]


def test_a_sequential_plan_refers_backwards_only():
    assert faults_of([step(args={"x": {"$ref": "b"}}), step(id="b")]) == (
        "step 0: refers to step 'b', which comes after it",
    )
    assert validate_plan([step(depends_on=["b"], args={"x": {"$ref": "b"}}), step(id="b")])


def test_several_faults_are_all_named_at_once():
    faults = faults_of(
        [
            step(id="x", depends_on=["y"]),
            step(id="y", args={"v": {"$ref": "x.v"}}, retry=-1, timeout=0),
            {"action": "no way", "depends_on": ["gone"], "when": {"and": [{"eq": [1]}, {"nope": 1}]}},
            step(id="x", on_failure="maybe"),
            7,
        ]
    )
    for part in (
        "step 1 ('y'): retry",
        "step 1 ('y'): timeout",
        "step 2: action",
        "step 2: when.and.0.eq",
        "step 2: when.and.1.nope",
        "step 3 ('x'): on_failure",
        "step 4: expected a dict",
        "step 3: id 'x' is taken by step 0",
        "step 2: depends_on names 'gone'",
        "steps wait for each other in a circle: x → y → x",
    ):
        assert any(fault.startswith(part) for fault in faults), (part, faults)
    assert len(faults) == 10


def test_many_faults_are_counted_in_the_text_and_listed_in_the_error():
    with pytest.raises(WorkflowError, match="and 15 more$") as caught:
        validate_plan([{}] * 25)
    assert len(caught.value.faults) == 25


def test_each_circle_is_shown_as_the_path_that_closes_it_and_what_waits_for_it_is_not_accused():
    plan = [
        step(id="a", depends_on=["b"]),
        step(id="b", args={"x": {"$ref": "c"}}),
        step(id="c", when={"$ref": "a"}),
        step(id="after", depends_on=["c"]),
        step(id="p", depends_on=["q"]),
        step(id="q", depends_on=["p", "free"]),
        step(id="free"),
    ]
    assert faults_of(plan) == (
        "steps wait for each other in a circle: a → b → c → a",
        "steps wait for each other in a circle: p → q → p",
    )


def test_nesting_has_a_limit_and_no_recursion_error():
    deep: dict = {}
    for _ in range(200):
        deep = {"x": deep}
    assert "is nested deeper than 64 levels" in faults_of([step(args=deep)])[0]
    when: object = True
    for _ in range(200):
        when = {"not": when}
    assert "is nested deeper than 64 levels" in faults_of([step(when=when)])[0]
    child: list = [step()]
    for _ in range(12):
        child = [{"action": "orchestra.workflow", "args": {"plan": child}}]
    assert "child workflows are nested deeper than 8 levels" in faults_of(child)[0]


# -- what a step is given


FACTS = Facts(
    input={"q": "cats"},
    context={"lang": "en"},
    steps={
        "fetch": StepFact("completed", {"rows": [{"name": "x", "k.y": 1}], 7: "seven"}),
        "broken": StepFact("failed", {"partial": 1}, {"type": "ValueError", "message": "no"}),
        "skipped": StepFact("skipped"),
    },
)


def test_args_are_resolved_and_those_of_others_are_left():
    only = PlannedStep(0, "s", "a", args={"n": {"$ref": "fetch.rows.0.name"}, "text": "plain"})
    assert ready_args(only, FACTS) == {"n": "x", "text": "plain"}
    assert ready_args(PlannedStep(0, "s", "a"), FACTS) is None
    template = {"action": "b", "args": {"it": {"$ref": "item"}}}
    mapping = PlannedStep(0, "m", "orchestra.map", {"over": {"$ref": "fetch.rows"}, "step": template}, kind="map")
    assert ready_args(mapping, FACTS) == {"over": [{"name": "x", "k.y": 1}], "step": template}
    child = PlannedStep(
        0, "w", "orchestra.workflow", {"plan": {"$ref": "fetch.rows"}, "input": {"$ref": "input"}}, kind="workflow"
    )
    assert ready_args(child, FACTS) == {"plan": [{"name": "x", "k.y": 1}], "input": {"q": "cats"}}


def test_one_reference_may_stand_for_all_args():
    whole = PlannedStep(0, "s", "a", args={"$ref": "item"})
    assert ready_args(whole, Facts(item={"url": "u"})) == {"url": "u"}
    assert ready_args(PlannedStep(0, "s", "a", args={"$ref": "skipped"}), FACTS) is None
    assert ready_args(PlannedStep(0, "s", "a", args={"$literal": {"$ref": "x"}}), FACTS) == {"$ref": "x"}
    with pytest.raises(WorkflowError, match="must lead to a dict with string keys, got 'u'"):
        ready_args(whole, Facts(item="u"))


@pytest.mark.parametrize(
    ("kind", "args", "fault"),
    [
        ("sleep", {"seconds": {"$ref": "input.q"}}, "args.seconds must be a number of seconds, 0 or more"),
        ("signal", {"name": {"$ref": "skipped"}}, "args.name must be 1 to 128 printable"),
        (
            "map",
            {"over": {"$ref": "input"}, "step": {"action": "a"}},
            "args.over must be a list or a $ref to one, got {'q'",
        ),
        ("workflow", {"plan": {"$ref": "input.q"}}, "args.plan must be a list of steps"),
    ],
)
def test_what_a_reference_brought_to_a_built_in_step_is_checked(kind, args, fault):
    built_in = PlannedStep(0, "s", f"orchestra.{kind}", args, kind=kind)
    with pytest.raises(WorkflowError, match="step s .orchestra") as caught:
        ready_args(built_in, FACTS)
    assert fault in caught.value.faults[0]


def test_the_item_of_a_map_is_known_to_its_step_only():
    one = PlannedStep(0, "s", "a", args={"it": {"$ref": "item.x"}, "n": {"$ref": "index"}})
    assert ready_args(one, Facts(item={"x": None}, index=0)) == {"it": None, "n": 0}
    assert ready_args(PlannedStep(0, "s", "a", args={"it": {"$ref": "item"}}), Facts(item=None)) == {"it": None}
    assert Facts().item is UNSET
    with pytest.raises(WorkflowError, match="nothing is known of 'item' here"):
        ready_args(one, Facts())


# -- any plan


@st.composite
def graphs(draw) -> list[dict]:
    """A plan whose steps wait for earlier ones in an order that is then shuffled."""
    total = draw(st.integers(1, 12))
    order = draw(st.permutations(range(total)))
    place = {each: position for position, each in enumerate(order)}
    plan = []
    for index in range(total):
        earlier = [each for each in range(total) if place[each] < place[index]]
        needs = draw(st.lists(st.sampled_from(earlier), max_size=3)) if earlier else []
        refs = draw(st.lists(st.sampled_from(earlier), max_size=2)) if earlier else []
        plan.append(
            {
                "id": f"s{index}",
                "action": "a",
                "depends_on": [draw(st.sampled_from([each, f"s{each}"])) for each in needs],
                "args": {str(n): {"$ref": f"s{each}.x"} for n, each in enumerate(refs)},
            }
        )
    return plan


@given(graphs())
def test_any_graph_is_accepted_and_its_order_respects_every_dependency(plan):
    valid = validate_plan(plan)
    assert validate_plan(valid) == valid
    steps = compile_plan(valid)
    assert [each.index for each in steps] == list(range(len(plan)))
    order = topological(steps)
    assert sorted(order) == list(range(len(plan)))
    place = {each: position for position, each in enumerate(order)}
    assert all(place[needed] < place[each.index] for each in steps for needed in each.depends_on)
    assert all(each.reads <= set(each.depends_on) for each in steps)


@given(graphs(), st.data())
def test_closing_a_circle_is_always_found(plan, data):
    steps = compile_plan(validate_plan(plan))
    edges = [(needed, each.index) for each in steps for needed in each.depends_on]
    if not edges:
        return
    first, second = data.draw(st.sampled_from(edges))
    plan[first]["depends_on"].append(second)
    faults = faults_of(plan)
    assert all("in a circle" in fault for fault in faults)
    path = faults[0].rpartition(": ")[2].split(" → ")
    assert path[0] == path[-1]
    needs = {each["id"]: each for each in plan}
    for one, other in zip(path, path[1:], strict=False):
        said = [f"s{n}" if isinstance(n, int) else n for n in needs[one]["depends_on"]]
        said += [ref["$ref"].split(".")[0] for ref in needs[one]["args"].values()]
        assert other in said, "each names the next"


json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["$ref", "0.x", "input"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["$ref", "$literal", "eq", "and", "x", "action"]), inner, max_size=3)
    ),
    max_leaves=12,
)
KEYS = "action args reasoning id depends_on retry timeout when on_failure compensate".split()


@given(st.lists(st.dictionaries(st.sampled_from(KEYS), json | st.just("orchestra.map"), max_size=6) | json, max_size=4))
def test_whatever_comes_is_a_plan_or_is_refused(plan):
    try:
        valid = validate_plan(plan)
    except WorkflowError as error:
        assert error.faults
    else:
        assert validate_plan(valid) == valid
        assert len(compile_plan(valid)) == len(plan)


@pytest.mark.slow
def test_the_cost_of_a_plan_grows_with_its_size_and_no_faster():
    def seconds(total: int) -> float:
        plan = [step(id=f"s{n}", depends_on=[n - 1] if n else []) for n in range(total)]
        best = float("inf")
        for _ in range(3):
            began = time.process_time()
            compile_plan(validate_plan(plan))
            best = min(best, time.process_time() - began)
        return best

    assert seconds(10_000) < 40 * seconds(1_000), "ten times the steps: far from a hundred times the work"
