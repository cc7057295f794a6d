"""References and conditions: what they lead to, and what is said when they lead nowhere."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestra._workflow.conditions import WORDS, holds
from orchestra._workflow.refs import Facts, Ref, StepFact, follow, parse_ref, resolve
from orchestra.errors import WorkflowError

KNOWN = Facts(
    input={"q": "cats", "n": 3},
    context={"lang": "en"},
    steps={
        "fetch": StepFact("completed", {"rows": [{"name": "x", "k.y": 1}], 7: "seven", "none": None}),
        "broken": StepFact("failed", {"partial": 1}, {"type": "ValueError", "message": "no"}),
        "skipped": StepFact("skipped"),
        "bytes": StepFact("completed", b"\x00"),
    },
    item={"url": "u"},
    index=4,
)


@pytest.mark.parametrize(
    ("spelled", "value"),
    [
        ("input", {"q": "cats", "n": 3}),
        ("input.q", "cats"),
        ("context.lang", "en"),
        ("item.url", "u"),
        ("index", 4),
        ("fetch.rows.0.name", "x"),
        ("fetch.rows.-1.name", "x"),
        ("fetch.7", "seven"),
        ("fetch.none", None),
        (["fetch", "rows", 0, "k.y"], 1),
        ("fetch.$state", "completed"),
        ("fetch.$error", None),
        ("fetch.$error.message", None),
        ("broken.$state", "failed"),
        ("broken.$error.message", "no"),
        ("broken", None),
        ("broken.partial", None),
        ("skipped", None),
        ("skipped.any.thing.0", None),
        ("skipped.$error", None),
    ],
)
def test_where_a_reference_leads(spelled, value):
    assert follow(parse_ref(spelled), KNOWN) == value
    assert resolve({"deep": [{"$ref": spelled}]}, KNOWN) == {"deep": [value]}


@pytest.mark.parametrize(
    ("spelled", "said"),
    [
        ("input.zz", "$ref 'input.zz': input has no key 'zz'; it has q, n"),
        ("fetch.rows.5", "$ref 'fetch.rows.5': fetch.rows is a list of 1, it has no '5'"),
        ("fetch.rows.-2", "fetch.rows is a list of 1, it has no '-2'"),
        ("fetch.rows.name", "fetch.rows is a list of 1, it has no 'name'"),
        ("fetch.rows.0.name.first", "fetch.rows.0.name is 'x', which has no 'first'"),
        ("fetch.none.x", "fetch.none is None, which has no 'x'"),
        ("bytes.0", "which has no '0'"),
        ("broken.$error.zz", "broken.$error has no key 'zz'; it has type, message"),
        ("nobody.x", "nothing is known of 'nobody' here"),
        ("context.x", "context has no key 'x'; it has lang"),
    ],
)
def test_a_reference_that_leads_nowhere_says_what_is_there(spelled, said):
    with pytest.raises(WorkflowError) as caught:
        resolve({"a": {"$ref": spelled}}, KNOWN)
    (fault,) = caught.value.faults
    assert fault.startswith("args.a: $ref")
    assert said in fault


def test_every_reference_that_leads_nowhere_is_named():
    with pytest.raises(WorkflowError) as caught:
        resolve({"a": {"$ref": "input.x"}, "b": [1, {"$ref": "fetch.y"}], "c": {"$ref": "input.q"}}, KNOWN)
    assert [fault.split(":")[0] for fault in caught.value.faults] == ["args.a", "args.b.1"]


def test_what_a_reference_brings_is_data():
    trap = {"$ref": "input.secret", "and": {"$literal": 1}}
    known = Facts(input={"secret": "s"}, steps={"evil": StepFact("completed", trap)})
    assert resolve({"x": {"$ref": "evil"}}, known) == {"x": trap}
    assert resolve({"x": {"$literal": {"$ref": "evil"}}}, known) == {"x": {"$ref": "evil"}}


def test_a_reference_reads_as_it_was_written():
    assert str(parse_ref("a.b.0")) == "a.b.0"
    assert parse_ref(["a", "$own"]) == Ref("a", ("$own",)), "as a list, any key can be spelled"


values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_without_references_a_value_stays_what_it_is(value):
    assert resolve(value, Facts()) == value
    assert resolve({"$ref": "s"}, Facts(steps={"s": StepFact("completed", value)})) == value


# -- conditions


REF = {"$ref": "input.n"}


@pytest.mark.parametrize(
    ("when", "expected"),
    [
        (True, True),
        (False, False),
        ({"$ref": "input.n"}, True),
        ({"$ref": "skipped"}, False),
        ({"eq": [REF, 3]}, True),
        ({"eq": [REF, 3.0]}, True),
        ({"eq": [True, 1]}, False),
        ({"ne": [False, 0]}, True),
        ({"eq": [{"a": [1]}, {"a": [1]}]}, True),
        ({"ne": [REF, 4]}, True),
        ({"lt": [REF, 4]}, True),
        ({"le": [REF, 3]}, True),
        ({"gt": [REF, 3]}, False),
        ({"ge": [REF, 3]}, True),
        ({"in": ["a", ["a", "b"]]}, True),
        ({"in": [1, [True]]}, False),
        ({"in": ["at", {"$ref": "input.q"}]}, True),
        ({"in": ["q", {"$ref": "input"}]}, True),
        ({"and": [True, {"eq": [1, 1]}]}, True),
        ({"and": [True, {"not": True}]}, False),
        ({"or": [False, {"$ref": "input.q"}]}, True),
        ({"or": [False, {"not": {"$ref": "input.q"}}]}, False),
        ({"not": False}, True),
        ({"exists": {"$ref": "fetch.rows.0"}}, True),
        ({"exists": {"$ref": "fetch.none"}}, False),
        ({"exists": {"$ref": "fetch.gone"}}, False),
        ({"exists": {"$ref": "skipped.x"}}, False),
        ({"eq": [{"$ref": "broken.$state"}, "failed"]}, True),
        ({"and": [False, {"eq": [{"$ref": "input.gone"}, 1]}]}, False),
        ({"or": [True, {"lt": [None, 1]}]}, True),
        ({"eq": [{"$literal": {"$ref": "x"}}, {"$literal": {"$ref": "x"}}]}, True),
    ],
)
def test_conditions(when, expected):
    assert holds(when, KNOWN) is expected


@pytest.mark.parametrize(
    ("when", "said"),
    [
        ({"lt": [{"$ref": "skipped"}, 1]}, "when.lt: None and 1 cannot be compared so"),
        ({"in": [1, 5]}, "when.in: 1 and 5 cannot be compared so"),
        ({"in": [1, "text"]}, "when.in: 1 and 'text' cannot be compared so"),
        ({"and": [True, {"eq": [{"$ref": "input.gone"}, 1]}]}, "when.and.1.eq.0: $ref 'input.gone'"),
        ({"$ref": "input.gone"}, "when: $ref 'input.gone': input has no key 'gone'"),
    ],
)
def test_what_cannot_be_decided_is_an_error_that_says_where(when, said):
    with pytest.raises(WorkflowError) as caught:
        holds(when, KNOWN)
    assert said in caught.value.faults[0]


def test_arrays_have_no_single_truth():
    known = Facts(input=np.zeros(3))
    with pytest.raises(WorkflowError, match="cannot be compared so"):
        holds({"eq": [{"$ref": "input"}, 0]}, known)


def test_the_words_are_a_closed_list():
    assert WORDS == ("eq", "ne", "lt", "le", "gt", "ge", "in", "and", "or", "not", "exists")


@given(st.integers(), st.integers())
def test_comparisons_are_those_of_the_values(left, right):
    facts = Facts(input=[left, right])
    pair = [{"$ref": "input.0"}, {"$ref": "input.1"}]
    assert holds({"lt": pair}, facts) is (left < right)
    assert holds({"not": {"lt": pair}}, facts) is holds({"ge": pair}, facts)
    assert holds({"or": [{"gt": pair}, {"eq": pair}]}, facts) is holds({"ge": pair}, facts)
