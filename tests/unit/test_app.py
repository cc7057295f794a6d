"""The front door without Redis: signatures, options, results, loading. The queue is ``memory:``."""

from __future__ import annotations

import asyncio
import pickle
import sys
import time
from typing import TYPE_CHECKING

import pytest

from orchestra._front.loading import is_target, load_app
from orchestra._front.runs import key_id
from orchestra._front.signature import ProcessCall, Signature, make_call
from orchestra.agents import AgentRegistry
from orchestra.app import App
from orchestra.errors import (
    ConfigurationError,
    InvalidTaskError,
    InvalidTaskTypeError,
    Reject,
    ResultUnavailableError,
    TaskFailedError,
)
from orchestra.flow_control import RateLimitConfig
from orchestra.tasks import BaseTask, Outcome, Retry, TaskPriority, TaskState

if TYPE_CHECKING:
    from somewhere import OnlyForTypeCheckers


def typed(text: str, count: int = 1, *, ratio: float | None = None, tags: list[str] = ()) -> str:
    return text


def with_task(job: BaseTask, n: int) -> int:
    return n


def with_optional_task(n: int, *, job: BaseTask | None = None) -> int:
    return n


def of_the_task(job: BaseTask) -> None: ...


def unresolvable(x: OnlyForTypeCheckers, n: int) -> None: ...


def open_ended(a: int, **rest: object) -> dict:
    return {"a": a, **rest}


def square(n: int) -> int:
    return n * n


@pytest.fixture
async def app():
    made = App("unit", "memory:", retry=Retry(max_retries=1, base=0.001))
    yield made
    await made.close()


# -- signatures


@pytest.mark.parametrize(
    ("args", "kwargs", "given"),
    [
        (("a",), {}, {"text": "a"}),
        (("a", 2), {"ratio": 1}, {"text": "a", "count": 2, "ratio": 1}),
        ((), {"text": "a", "ratio": None, "tags": ("x",)}, {"text": "a", "ratio": None, "tags": ("x",)}),
    ],
)
def test_arguments_become_a_dict_of_keywords(args, kwargs, given):
    assert Signature(typed, "typed").bind(args, kwargs) == given


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "words"),
    [
        ((), {}, InvalidTaskError, "needs the argument 'text'"),
        (("a",), {"text": "b"}, InvalidTaskError, "two values for 'text'"),
        (("a", 1, 2), {}, InvalidTaskError, "takes 2 positional arguments, got 3"),
        ((), {"texd": "a"}, InvalidTaskError, "no parameter 'texd'; did you mean 'text'?"),
        (("a",), {"zzz": 1}, InvalidTaskError, "it takes count, ratio, tags, text"),
        ((5,), {}, InvalidTaskTypeError, "text must be str, got int 5"),
        (("a", 1.5), {}, InvalidTaskTypeError, "count must be int"),
        (("a",), {"ratio": "x"}, InvalidTaskTypeError, "ratio must be float or int or None"),
        (("a",), {"tags": {"x"}}, InvalidTaskTypeError, "tags must be list or tuple"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args, kwargs, kind, words):
    with pytest.raises(kind, match="agent 'typed'") as caught:
        Signature(typed, "typed").bind(args, kwargs)
    assert words in str(caught.value)
    assert caught.value.path.startswith("input")


def test_numpy_scalars_pass_for_plain_numbers():
    import numpy as np

    assert Signature(typed, "typed").bind(("a", np.int64(3)), {})["count"] == 3


def test_an_annotation_that_cannot_be_resolved_leaves_the_others_checked():
    signature = Signature(unresolvable, "u")
    assert signature.bind((object(), 1), {}).keys() == {"x", "n"}
    with pytest.raises(InvalidTaskTypeError, match="n must be int"):
        signature.bind((1, "x"), {})


@pytest.mark.parametrize("function", [with_task, with_optional_task])
async def test_the_task_is_injected_and_not_part_of_the_input(function):
    signature = Signature(function, "f")
    assert signature.injected == "job"
    assert signature.bind((), {"n": 1}) == {"n": 1}
    with pytest.raises(InvalidTaskError, match="is the task itself"):
        signature.bind((), {"n": 1, "job": 2})
    task = BaseTask("1", "f", {"n": 5})
    assert signature.arguments(task) == {"n": 5, "job": task}


def test_a_task_parameter_known_to_type_checkers_only_is_found():
    namespace = {"__name__": "elsewhere"}
    exec("from __future__ import annotations\ndef f(job: BaseTask | None, n: int): ...", namespace)
    assert Signature(namespace["f"], "f").injected == "job"


def test_a_function_of_the_task_alone_takes_any_input():
    signature = Signature(of_the_task, "f")
    task = BaseTask("1", "f", [1, 2])
    assert signature.arguments(task) == {"job": task}
    signature.check_input([1, 2])


@pytest.mark.parametrize("given", [{}, {"text": "a", "new": 1}, [1], "text"])
def test_input_for_another_signature_is_rejected_for_good(given):
    with pytest.raises(Reject, match="agent 'typed'"):
        Signature(typed, "typed").arguments(BaseTask("1", "typed", given))


def test_keyword_rest_travels():
    signature = Signature(open_ended, "f")
    assert make_call(open_ended, signature)(BaseTask("1", "f", signature.bind((1,), {"b": 2}))) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda a, /: a, "parameter a has no name"),
        (lambda *a: a, "parameter *a has no name"),
        (int, "is a class"),
        (3, "not a function"),
    ],
)
def test_what_tasks_cannot_call_is_refused_when_it_is_decorated(app, function, words):
    with pytest.raises(ConfigurationError) as caught:
        app.agent(name="x")(function)
    assert words in str(caught.value)


def test_generators_and_two_tasks_are_refused(app):
    def generator():
        yield 1

    def twice(a: BaseTask, b: BaseTask): ...

    for function, words in ((generator, "generator"), (twice, "twice")):
        with pytest.raises(ConfigurationError, match=words):
            app.agent(function)


def test_a_process_call_travels_by_name():
    call = pickle.loads(pickle.dumps(ProcessCall(square, "square")))
    assert call(BaseTask("1", "square", {"n": 7})) == 49


def test_a_nested_function_cannot_run_in_a_process(app):
    with pytest.raises(ConfigurationError, match="top level of a module"):

        @app.agent(executor="process")
        def nested(n: int) -> int: ...


# -- agents


async def test_the_decorated_function_stays_a_plain_function(app):
    @app.agent(timeout=5)
    async def shout(text: str) -> str:
        """Say it loudly."""
        return text.upper()

    @app.agent
    def whisper(text: str) -> str:
        return text.lower()

    assert await shout("a") == "A"
    assert whisper("A") == "a"
    assert shout.__doc__ == "Say it loudly."
    assert shout.__name__ == "shout"
    assert list(app.agents) == ["shout", "whisper"]


async def test_send_and_result(app):
    @app.agent
    async def add(a: int, b: int = 2) -> int:
        return a + b

    async with app.worker():
        run = await add.send(1)
        assert await run.status() in (TaskState.PENDING, TaskState.COMPLETED)
        assert await run.result(timeout=5) == 3
        assert await run == 3
        assert await run.status() is TaskState.COMPLETED
        runs = await add.send_many([{"a": 1, "b": 1}, (5,), (5, 6)])
        assert [await r for r in runs] == [2, 7, 11]
        assert await (await app.send("add", {"a": 4})) == 6
        many = await app.send_many([{"type": "add", "input": {"a": i}, "id": f"t{i}"} for i in range(3)])
        assert [(r.id, await r) for r in many] == [("t0", 2), ("t1", 3), ("t2", 4)]
        assert await app.run("t1").result(1) == 3


async def test_a_dead_task_raises_with_its_facts(app):
    @app.agent
    async def boom() -> None:
        raise KeyError("gone")

    async with app.worker():
        run = await boom.send()
        with pytest.raises(TaskFailedError, match="KeyError") as caught:
            await run.result(timeout=5)
        assert (caught.value.error_type, caught.value.reason, caught.value.attempts) == ("KeyError", "failed", 2)
        assert caught.value.task_id == run.id
        assert await run.status() is TaskState.FAILED
        nobody = await app.send("nobody", {"anything": 1})
        with pytest.raises(TaskFailedError) as caught:
            await nobody.result(timeout=5)
        assert caught.value.reason == "unknown_agent"


async def test_a_result_that_is_not_there(app):
    @app.agent
    async def add(a: int) -> int:
        return a

    run = await add.send(1)
    assert await run.status() is TaskState.PENDING
    with pytest.raises(TimeoutError):
        await run.result(timeout=0.01)
    unwanted = await add.using(want_result=False).send(1)
    with pytest.raises(ResultUnavailableError):
        await unwanted.result()
    with pytest.raises(ResultUnavailableError):
        await unwanted.status()


async def test_using_says_how_a_call_travels(app):
    @app.agent(priority=TaskPriority.HIGH)
    async def work(n: int) -> None: ...

    deadline = time.time() + 60
    await work.send(1)
    await work.using(
        priority=TaskPriority.CRITICAL, timeout=5, max_retries=0, deadline=deadline, metadata={"who": "me"}, id="mine"
    ).send(2)
    (first_id, first), (_, second) = await app.queue.consume("c", 2, 0)
    assert first_id.startswith("0:")
    assert first == {
        "id": "mine",
        "type": "work",
        "input": {"n": 2},
        "priority": 0,
        "timeout": 5,
        "max_retries": 0,
        "deadline": deadline,
        "metadata": {"who": "me"},
    }
    assert second["priority"] == TaskPriority.HIGH
    delayed = await work.using(delay=60).send(3)
    assert delayed.message_id == f"z:{delayed.id}"
    assert (await app.queue.stats()).delayed == 1


async def test_a_key_names_the_work(app):
    @app.agent
    async def work(n: int) -> None: ...

    first = await work.using(key="doc-1").send(1)
    again = await work.using(key="doc-1").send(1)
    assert first.id == again.id == "work:doc-1"
    assert first.message_id == again.message_id
    assert (await app.queue.stats()).waiting == (0, 0, 1, 0)
    for key in ("with space", "ü", "x" * 200, "\n"):
        ident = key_id("work", key)
        assert len(ident) <= 128
        assert ident.isascii()
        assert " " not in ident
        assert ident.isprintable()
    assert key_id("a", "b c") != key_id("a b", "c")


async def test_options_are_checked(app):
    @app.agent
    async def work(n: int) -> None: ...

    with pytest.raises(ConfigurationError, match="no option 'prioriti'"):
        work.using(prioriti=1)
    with pytest.raises(ConfigurationError, match="not both"):
        work.using(key="a", id="b")
    with pytest.raises(ConfigurationError, match="name one task"):
        await work.using(key="a").send_many([(1,), (2,)])
    with pytest.raises(InvalidTaskError, match="call 1: agent 'work' needs the argument 'n'"):
        await work.send_many([(1,), {}])
    with pytest.raises(InvalidTaskTypeError, match="call 0: send_many takes dicts"):
        await work.send_many([5])
    with pytest.raises(InvalidTaskError):
        await work.using(priority=7).send(1)
    with pytest.raises(InvalidTaskError, match="task 0"):
        await app.send_many([{"input": 1}])
    with pytest.raises(ConfigurationError, match="no option 'tiemout'"):
        app.agent(tiemout=3)(work.function)
    with pytest.raises(ConfigurationError, match="priority must be"):
        app.agent(name="other", priority=9)(work.function)
    assert await app.queue.get_queue_depth() == 0


async def test_replicas_share_the_work_by_weight(app):
    @app.agent(name="grade", worker_id="careful", weight=3, timeout=5)
    async def careful(n: int) -> str:
        return "careful"

    @app.agent(name="grade", worker_id="quick")
    async def quick(n: int) -> str:
        return "quick"

    app.replica("grade", lambda n: "third", worker_id="third", weight=4)
    assert app.agents.get("grade").options.timeout == 5
    async with app.worker(concurrency=1):
        answers = [await run for run in await careful.send_many([(n,) for n in range(8)])]
    assert sorted(answers) == ["careful"] * 3 + ["quick"] + ["third"] * 4


def test_one_name_for_two_functions_is_refused(app):
    @app.agent(name="same")
    async def one(n: int) -> None: ...

    with pytest.raises(ConfigurationError, match="'same' exists already"):

        @app.agent(name="same")
        async def two(n: int) -> None: ...

    app.agent(name="same")(one.function)  # a cell that is run again


async def test_a_limit_delays_and_is_no_failure(app):
    @app.agent(limit=RateLimitConfig(rate=50, burst=2), cost=1)
    async def limited(n: int) -> int:
        return n

    dispatcher = app.worker()
    async with dispatcher:
        runs = await limited.send_many([(n,) for n in range(6)])
        assert [await run.result(5) for run in runs] == list(range(6))
    assert dispatcher.outcomes[Outcome.THROTTLED] >= 1
    assert dispatcher.outcomes[Outcome.FAILED] == 0


def test_a_given_registry_is_used():
    registry = AgentRegistry()
    App("other", "memory:", agents=registry).agent(square)
    assert list(registry) == ["square"]


# -- the App itself


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"name": "a b"}, "App name"),
        ({"queue": "a:b"}, "queue"),
        ({"redis": "http://x"}, "address"),
        ({"concurrency": 0}, "concurrency"),
        ({"lease": 0.01}, "claim_interval_ms"),
        ({"retry": 3}, "Retry"),
        ({"result_ttl": 0}, "result_ttl"),
    ],
)
def test_a_wrong_setting_is_an_error_at_once(settings, words):
    with pytest.raises(ConfigurationError, match=words):
        App(**{"name": "x", "redis": "memory:", **settings})


def test_the_queue_belongs_to_a_loop():
    app = App("x", "memory:")
    with pytest.raises(ConfigurationError, match="inside a coroutine"):
        _ = app.queue

    async def here():
        assert app.queue is app.queue
        return app.queue

    assert asyncio.run(here()) is not asyncio.run(here())


async def test_bind_comes_before_use(app, monkeypatch):
    fresh = App("x")
    monkeypatch.setenv("ORCHESTRA_REDIS_URL", "redis://elsewhere:1/2")
    assert fresh.bind(queue="q", result_ttl=7 * 86_400.0).queue_name == "q"
    assert fresh.address.safe == "redis://elsewhere:1/2"
    assert fresh.result_ttl == 7 * 86_400.0
    assert fresh.bind(redis="memory:").queue.name == "q"
    with pytest.raises(ConfigurationError, match="in use"):
        fresh.bind(queue="other")
    with pytest.raises(ConfigurationError, match="no setting"):
        App("x").bind(result_tll=1)
    await fresh.close()


def test_source_and_report_are_kept(app):
    @app.source
    async def tasks(job):
        yield {"type": "x"}

    @app.report
    def report(job, results): ...

    assert app.source_fn is tasks
    assert app.report_fn is report
    with pytest.raises(ConfigurationError, match="generator"):
        app.source(report)


# -- finding it


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_an_app_is_found_by_file_and_by_module(folder):
    (folder / "one_app.py").write_text("from orchestra import App\nthe_app = App('one')\nalias = the_app\n")
    found = load_app("one_app.py")
    assert found.name == "one"
    assert sys.path[0] == str(folder)
    assert sys.modules["one_app"].the_app is found
    for target in (str(folder / "one_app.py"), "one_app.py:the_app", "one_app", "one_app:the_app"):
        assert load_app(target) is found


@pytest.mark.parametrize(
    ("target", "text", "words"),
    [
        ("", None, "is empty"),
        ("gone.py", None, "is no file"),
        ("no.such:app", None, "there is no module 'no'"),
        ("two_apps.py", "from orchestra import App\na = App('a')\nb = App('b')", "has 2 Apps: name one of them"),
        ("no_app.py", "x = 1", "has no App"),
        ("no_app2.py:x", "x = 1", "names a int, not an App"),
        ("no_name.py:y", "from orchestra import App\na = App('a')", "has no 'y'; its Apps are: a"),
        ("bad_syntax.py", "def (", "SyntaxError"),
        ("raises.py", "def f():\n  raise ValueError('why')\nf()", "ValueError: why"),
        ("leaves.py", "import sys\nsys.exit(3)", "sys.exit(3)"),
        ("needs.py", "import not_installed_anywhere", "No module named 'not_installed_anywhere'"),
        ("bad-name.py", "x = 1", "rename the file"),
        ("json.py", "x = 1", "exists already; rename the file"),
    ],
)
def test_what_cannot_be_loaded_is_one_clear_line(folder, target, text, words):
    if text is not None:
        (folder / target.partition(":")[0]).write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_app(target)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    if text and "raise" in text:
        assert f"{folder / 'raises.py'}:2" in str(caught.value)
        assert isinstance(caught.value.__cause__, ValueError)


def test_a_target_is_told_from_a_queue():
    assert [text for text in ("jobs:app", "jobs.py", "a/b.py:x", "triage", "audit.3f", "C:x") if is_target(text)] == [
        "jobs:app",
        "jobs.py",
        "a/b.py:x",
        "C:x",
    ]
