"""Answers a question from a folder of documents, by a durable workflow: ``python examples/research_assistant.py "QUESTION"``.

======== =============================================================================================================
plan     a planner writes the plan; if it fails, the next planner does
collect  finds the documents that speak of the question
read     reads them in parallel: one step for each document (``orchestra.map``)
critic   drafts an answer and rejects it while a statement has no source: the first draft is always rejected, and the
         step is tried again with what was wrong about it
publish  waits for a person, holding no worker: asked here, or `orchestra workflow approve`
write    writes the answer, with a source behind every statement
======== =============================================================================================================

By default all of them follow rules, and the documents are this project's own. With ``ORCHESTRA_LLM_URL`` (an endpoint that
speaks OpenAI's protocol, such as ``http://127.0.0.1:8080/v1``) and ``ORCHESTRA_LLM_MODEL`` a language model chooses the words to
look for, sums up what was read and writes the introduction; ``ORCHESTRA_LLM_KEY`` is its key. Whatever it answers, the
shape of the plan, the sources and the end stay: a model proposes, rules dispose.

Tasks wait in Redis (``ORCHESTRA_REDIS_URL``, else the embedded server). Stop it at any moment, and the same command goes on
where it stopped: the id of the workflow is made of question and folder. ``--new`` asks again.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from orchestra import App, BaseTask, Retry, TaskCancelledError, TaskFailedError, Throttled
from orchestra.workflow import StepState, WorkflowEvent, WorkflowState

app = App("research", retry=Retry(max_retries=2, base=0.2, max_delay=2.0), concurrency=8)

DOCUMENTS = Path(__file__).resolve().parent.parent / "docs"
SUFFIXES = (".md", ".txt", ".rst")
MOST_DOCUMENTS, MOST_PASSAGES, MOST_STATEMENTS = 8, 3, 6
DAY = 86_400.0
COMMON = frozenset(
    (
        *(
            "the",
            "and",
            "for",
            "are",
            "was",
            "were",
            "what",
            "when",
            "where",
            "which",
            "who",
            "why",
            "how",
            "does",
            "do",
        ),
        *(
            "with",
            "from",
            "that",
            "this",
            "into",
            "than",
            "then",
            "there",
            "their",
            "they",
            "has",
            "have",
            "had",
            "not",
        ),
        *("you", "your", "can", "will", "would", "should", "could", "about", "after", "before", "over", "under", "its"),
    )
)
_SENTENCE = re.compile(r"(?<=[.!?:])\s+(?=[A-Z`*])")
_WORD = re.compile(r"[a-z][a-z0-9_]{2,}")


class DraftRejectedError(Exception):
    """The critic's verdict on a draft; it is tried again."""


# -- planning: with the model first, if there is one; the first valid plan counts


async def plan_with_model(task: dict[str, Any], agents: list[str], asked: BaseTask) -> list[dict[str, Any]]:
    """Let the model choose what to look for. If it has no sensible answer, the next planner is asked."""
    del agents
    return make_plan(task["input"], await model.keywords(task["input"]["question"], asked))


async def plan_by_rules(task: dict[str, Any], agents: list[str]) -> list[dict[str, Any]]:
    """Look for the words of the question."""
    del agents
    return make_plan(task["input"], words_of(task["input"]["question"]))


def make_plan(given: dict[str, Any], words: list[str]) -> list[dict[str, Any]]:
    """The steps for ``words``."""
    question, folder = {"$ref": "input.question"}, {"$ref": "input.folder"}
    reader = {
        "action": "read",
        "args": {"folder": folder, "path": {"$ref": "item.path"}, "words": {"$ref": "item.words"}},
    }
    return [
        {
            "id": "collect",
            "action": "collect",
            "args": {"folder": folder, "words": words},
            "reasoning": f"documents that speak of {', '.join(words)}",
        },
        {
            "id": "read",
            "action": "orchestra.map",
            "args": {"over": {"$ref": "collect"}, "step": reader, "max_parallel": 4},
            "depends_on": ["collect"],
        },
        {
            "id": "critic",
            "action": "critic",
            "args": {"question": question, "notes": {"$ref": "read"}},
            "retry": {"max_retries": 2, "base": 0.1},
        },
        {
            "id": "publish",
            "action": "orchestra.signal",
            "args": {"name": "publish", "prompt": f"Publish the answer to {given['question']!r}?", "timeout": DAY},
            "depends_on": ["critic"],
        },
        {
            "id": "write",
            "action": "write",
            "args": {"question": question, "draft": {"$ref": "critic"}},
            "when": {"eq": [{"$ref": "publish"}, True]},
        },
    ]


# -- agents


@app.agent(timeout=30)
def collect(folder: str, words: list[str]) -> list[dict[str, Any]]:
    """The documents of ``folder`` that speak most of ``words``, best first; a word that few of them have tells more."""
    root = Path(folder)
    if not root.is_dir():
        raise NotADirectoryError(f"{folder} is not a folder")
    files = [path for path in sorted(root.rglob("*")) if path.suffix in SUFFIXES and path.is_file()]
    texts = {path.relative_to(root).as_posix(): path.read_text("utf-8", "replace").lower() for path in files}
    having = {word: sum(word in text for text in texts.values()) for word in words}
    worth = {word: round(1.0 + math.log(len(texts) / count), 2) for word, count in having.items() if count}
    found = [{"path": path, "words": worth, "score": score(text, worth)} for path, text in texts.items()]
    best = sorted(found, key=lambda one: (-one["score"], one["path"]))
    return [one for one in best if one["score"]][:MOST_DOCUMENTS]


@app.agent(timeout=300)
async def read(folder: str, path: str, words: dict[str, float], task: BaseTask) -> dict[str, Any]:
    """The passages of one document that speak of ``words``, each with its line, and what they say in short."""
    found = passages((Path(folder) / path).read_text("utf-8", "replace"), words)
    text = "\n\n".join(one["text"] for one in found)
    said = await model.write(f"Sum up what this says about {', '.join(words)}:\n\n{text}", task) if found else None
    return {"path": path, "passages": found, "summary": said}


@app.agent(timeout=300)
async def critic(question: str, notes: list[dict[str, Any]], task: BaseTask) -> dict[str, Any]:
    """A draft that holds; one that does not is rejected, and the next attempt knows why.

    A first draft is written in a hurry, without sources. Later ones have them.
    """
    statements = statements_of(notes)
    if task.attempt == 1:
        statements = [{**one, "source": None} for one in statements]
    faults = faults_of(statements)
    if faults and notes and any(note["passages"] for note in notes):
        raise DraftRejectedError("; ".join(faults))
    known = "\n".join(f"- {note['summary'] or note['passages'][0]['text']}" for note in notes if note["passages"])
    said = await model.write(f"Question: {question}\n\nWhat is known:\n{known}\n\nAnswer it.", task) if known else None
    return {"statements": statements, "introduction": said}


@app.agent(timeout=300)
async def write(question: str, draft: dict[str, Any]) -> str:
    """The answer, as Markdown."""
    lines = [f"# {question}", "", draft["introduction"] or "What the documents say:", ""]
    lines += [f"- {one['text']} [{one['source']}]" for one in draft["statements"]]
    if not draft["statements"]:
        lines.append("Nothing in the documents speaks of it.")
    return "\n".join(lines) + "\n"


# -- rules


def words_of(text: str) -> list[str]:
    """The words worth looking for, each once, without its ending."""
    found = (word for word in _WORD.findall(text.lower()) if word not in COMMON)
    return list(dict.fromkeys(re.sub(r"(?<=\w{4})(?:ies|ing|ed|es|s)$", "", word) for word in found)) or ["orchestra"]


def score(text: str, worth: dict[str, float]) -> float:
    """How much ``text`` speaks of words of so much ``worth``: above all that it has them, a little how often."""
    counts = {word: text.count(word) for word in worth}
    return round(sum(worth[word] * (1.0 + 0.1 * min(count, 10)) for word, count in counts.items() if count), 2)


def passages(text: str, worth: dict[str, float]) -> list[dict[str, Any]]:
    """The paragraphs that speak most of the words: prose only, no code, no tables, no headings."""
    found, line, fenced = [], 1, False
    for block in re.split(r"(\n\s*\n|\n(?=- ))", text):
        prose = block.strip()
        fenced ^= block.count("```") % 2 == 1
        if prose and not fenced and prose[0] not in "#|`<" and "```" not in prose:
            points = score(prose.lower(), worth)
            if points:
                found.append({"line": line, "text": excerpt(prose, worth), "score": points})
        line += block.count("\n")
    return sorted(found, key=lambda one: (-one["score"], one["line"]))[:MOST_PASSAGES]


def statements_of(notes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The best passages of all documents, with their sources."""
    found = [
        {"text": passage["text"], "source": f"{note['path']}:{passage['line']}", "score": passage["score"]}
        for note in notes
        for passage in note["passages"]
    ]
    return sorted(found, key=lambda one: (-one["score"], one["source"]))[:MOST_STATEMENTS]


def excerpt(prose: str, worth: dict[str, float]) -> str:
    """The sentence of a paragraph that speaks most of the words, and the one behind it."""
    sentences = _SENTENCE.split(" ".join(prose.removeprefix("- ").split()))
    best = max(range(len(sentences)), key=lambda at: score(sentences[at].lower(), worth))
    return shortened(" ".join(sentences[best : best + 2]))


def shortened(text: str) -> str:
    """300 characters of ``text`` at most."""
    return text if len(text) <= 300 else text[:299].rsplit(" ", 1)[0] + "…"


def faults_of(statements: list[dict[str, Any]]) -> list[str]:
    """What the critic finds wrong with a draft."""
    bare = sum(not one["source"] for one in statements)
    faults = [f"{bare} of {len(statements)} statements name no source"] if bare else []
    if not statements:
        faults.append("it says nothing")
    return faults


# -- a language model, where there is one


class NoModel:
    """What is done without a language model: nothing; the rules carry on alone."""

    async def keywords(self, question: str, task: BaseTask) -> list[str]:
        """Words to look for. Raises LookupError where nothing sensible comes."""
        raise LookupError("no language model is configured: set ORCHESTRA_LLM_URL and ORCHESTRA_LLM_MODEL")

    async def write(self, prompt: str, task: BaseTask) -> str | None:
        """A few sentences; None where nothing sensible comes."""


class LanguageModel(NoModel):
    """A model behind an endpoint that speaks OpenAI's protocol.

    Its calls are journaled: a step that is repeated after a crash does not pay for them again. Its answers are bounded
    in length, and in shape where a shape is needed.
    """

    def __init__(self, url: str, name: str, key: str) -> None:
        # The extra `ai` is needed only where a model is configured.
        from pydantic import BaseModel, Field  # noqa: PLC0415
        from pydantic_ai import Agent, NativeOutput  # noqa: PLC0415
        from pydantic_ai.models.openai import OpenAIChatModel  # noqa: PLC0415
        from pydantic_ai.providers.openai import OpenAIProvider  # noqa: PLC0415

        from orchestra import ai  # noqa: PLC0415

        class Outline(BaseModel):
            """What to look for in the documents."""

            words: list[str] = Field(min_length=1, max_length=6, description="single words to search for")

        language_model = OpenAIChatModel(name, provider=OpenAIProvider(base_url=url, api_key=key))
        planning = Agent(
            language_model,
            name="outline",
            output_type=NativeOutput(Outline),
            instructions="Name single words that documents which answer the question would contain.",
        )
        writing = Agent(language_model, name="prose", instructions="Answer in one or two plain sentences.")
        self._outline = ai.agent(planning, model_settings={"max_tokens": 120}, budget=ai.Budget(requests=4))
        self._prose = ai.agent(writing, model_settings={"max_tokens": 160}, budget=ai.Budget(requests=4))

    async def keywords(self, question: str, task: BaseTask) -> list[str]:
        """The words of the question, and those the model adds."""
        answer = await self._outline(replace(task, input={"prompt": question}))
        return list(dict.fromkeys([*words_of(question), *words_of(" ".join(answer["words"]))]))[:10]

    async def write(self, prompt: str, task: BaseTask) -> str | None:
        """What the model writes, on one line. What it cannot answer is left out; a provider that is busy is asked later."""
        try:
            text = await self._prose(replace(task, input={"prompt": prompt}))
        except Throttled:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model does, the rules carry on
            say(f"    the model is of no help: {error}")
            return None
        return shortened(" ".join(str(text).split())) or None


def configured_model() -> NoModel:
    """The model that the environment names."""
    url, name = os.environ.get("ORCHESTRA_LLM_URL"), os.environ.get("ORCHESTRA_LLM_MODEL")
    return LanguageModel(url, name, os.environ.get("ORCHESTRA_LLM_KEY", "none")) if url and name else NoModel()


model = configured_model()
if isinstance(model, LanguageModel):
    app.planner(timeout=300)(plan_with_model)
app.planner(plan_by_rules)


# -- the command


async def main(options: argparse.Namespace) -> int:
    """Start or continue the workflow, say what happens, ask when somebody has to decide, print the answer."""
    given = {"question": options.question, "folder": options.folder}
    async with app, app.worker():
        run = await app.start_workflow("question", given, id=workflow_id(options))
        say(f"workflow {run.id}: orchestra workflow show {run.id}")
        async for event in run.events():
            if event.kind in ("step.ready", "step.started"):
                continue
            state = await run.state()
            tell(event, state)
            if event.kind == "step.waiting" and waits_for_publish(state):
                await decide(run, state, options)
        try:
            answer = await run.result(timeout=60)
        except (TaskFailedError, TaskCancelledError) as error:
            say(f"error: {error}")
            return 3
    if not isinstance(answer, str):
        say("not published")
        return 3
    if options.output:
        await asyncio.to_thread(Path(options.output).write_text, answer, "utf-8")
        say(f"written to {options.output}")
    else:
        print(answer, end="")
    return 0


def workflow_id(options: argparse.Namespace) -> str:
    """The same for the same question to the same folder."""
    asked = f"{options.question}\0{options.folder}\0{time.time_ns() if options.new else ''}"
    return f"research-{hashlib.sha256(asked.encode()).hexdigest()[:12]}"


def waits_for_publish(state: WorkflowState) -> bool:
    """Whether the workflow stands still until somebody decides; an old event may tell of a wait that is over."""
    return any(step.id == "publish" and step.state is StepState.WAITING for step in state.steps)


async def decide(run: Any, state: WorkflowState, options: argparse.Namespace) -> None:
    """Show the draft and ask for approval; without a terminal, say who else can give it."""
    draft = next(step.result for step in state.steps if step.id == "critic")
    for one in draft["statements"]:
        say(f"    - {one['text'][:100]} [{one['source']}]")
    if options.yes:
        await run.approve("publish")
    elif sys.stdin.isatty():
        answer = await ask("    Publish it? [y/N] ")
        await run.approve("publish", answer.strip().lower() in ("y", "yes"))
    else:
        say(f"    waiting: orchestra workflow approve {run.id} publish    (or --deny)")


async def ask(prompt: str) -> str:
    """A line from the terminal, without blocking the agents that run in this loop, and without a thread."""
    print(prompt, end="", file=sys.stderr, flush=True)
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str] = loop.create_future()
    loop.add_reader(sys.stdin, lambda: line.done() or line.set_result(sys.stdin.readline()))
    try:
        return await line
    finally:
        loop.remove_reader(sys.stdin)


def tell(event: WorkflowEvent, state: WorkflowState) -> None:
    """One line about what happened."""
    if event.step is None:
        say(f"  {event.kind}")
        return
    step = state.steps[event.step]
    told = {
        "step.retrying": lambda: f"again: {(step.error or event.data.get('error') or {}).get('message', '')}",
        "step.completed": lambda: summary_of(step.result),
        "step.failed": lambda: (step.error or {}).get("message", ""),
        "step.waiting": lambda: (step.waiting or {}).get("prompt") or "",
    }.get(event.kind, lambda: None)()
    if told is not None:
        say(f"  {event.kind.removeprefix('step.'):<10} {step.id:<8}  {told}")


def summary_of(result: Any) -> str:
    """A result in a few words."""
    if isinstance(result, list):
        return counted(len(result), "document")
    if isinstance(result, dict) and "passages" in result:
        return f"{result['path']}: {counted(len(result['passages']), 'passage')}"
    if isinstance(result, dict) and "statements" in result:
        return f"{counted(len(result['statements']), 'statement')}, each with a source"
    return f"{len(result):,} characters" if isinstance(result, str) else str(result).lower()


def counted(number: int, what: str) -> str:
    """A number and what there is of it."""
    return f"{number} {what}{'s' * (number != 1)}"


def say(text: str) -> None:
    """For people, on standard error: standard output is the answer alone."""
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answers a question from a folder of documents.")
    parser.add_argument("question", nargs="?", default="How are tasks kept when a worker crashes?")
    parser.add_argument(
        "--folder", default=str(DOCUMENTS), help="where the documents are (default: this project's own)"
    )
    parser.add_argument("--yes", action="store_true", help="publish without asking")
    parser.add_argument("--new", action="store_true", help="ask again, even if this was answered within a day")
    parser.add_argument("--output", help="write the answer to this file")
    options = parser.parse_args()
    options.folder = str(Path(options.folder).resolve())  # agents may run elsewhere
    return options


if __name__ == "__main__":
    sys.exit(asyncio.run(main(arguments())))
