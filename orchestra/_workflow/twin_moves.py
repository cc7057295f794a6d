"""The twin of ``lua/workflow_move.lua``: the same changes of the same fields, in this process.

Owns what a change does to a :class:`Place`; refuses to own places and clocks. It is the oracle of the script: the same
operations give the same records, events and outbox. Nothing here awaits, so each move is atomic on its event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NoReturn

from orchestra._workflow.record import COUNTS, ENDED, PHASES, Live, Static
from orchestra.errors import CorruptEntryError
from orchestra.serialization import dumps

if TYPE_CHECKING:
    from collections.abc import Iterator

Row = dict[str, bytes]
Answer = list[Any]
LETTER: Final = {"pending": "P", "running": "R", "completed": "C", "failed": "F", "skipped": "S"}
_SAID: Final = {"C": "step.completed", "F": "step.failed", "S": "step.skipped"}
EDGES: Final = {"P": "RCFS", "R": "PRCFS", "B": "PRS", "H": "", "W": "", "C": "", "F": "", "S": ""}
_BY_INDEX: Final = frozenset(["begin", "look", "finish", "retrying", "park", "fire", "grow", "update", "fail_step"])
STATUSES: Final = frozenset([b"pending", b"running", b"completed", b"failed", b"cancelled"])
_NIL: Final = b"\xc0"


@dataclass(slots=True)
class Place:
    """Where the workflows of a namespace lie. Times in milliseconds."""

    records: dict[str, Row] = field(default_factory=dict)
    contexts: dict[str, Row] = field(default_factory=dict)
    events: dict[str, list[tuple[str, Row]]] = field(default_factory=dict)
    outbox: dict[str, int] = field(default_factory=dict)
    ended: list[tuple[str, str]] = field(default_factory=list)
    index: dict[str, int] = field(default_factory=dict)
    expiry: dict[str, int] = field(default_factory=dict)

    def log(self, task_id: str, now: int, kind: str, step: int | None = None, data: bytes = b"") -> None:
        """Add an event."""
        rows = self.events.setdefault(task_id, [])
        row = {"kind": kind.encode()} | ({} if step is None else {"step": b"%d" % step})
        rows.append((next_position(rows[-1][0] if rows else "0-0", now), row | ({"data": data} if data else {})))


def next_position(last: str, now: int) -> str:
    """A position behind ``last``."""
    at, number = map(int, last.split("-"))
    return f"{now}-0" if now > at else f"{at}-{number + 1}"


class Step:
    """A step as the moves see it: what ``n:`` and ``q:`` say."""

    def __init__(self, index: int, static: Static, live: Live) -> None:
        self.i, self.fixed, self.live = index, static, live

    @property
    def state(self) -> str:
        return self.live.state


class Move:
    """One change of one workflow. ``args`` are those of the script behind the fifth."""

    def __init__(
        self, place: Place, now: int, task_id: str, ttl: int, grace: int, largest: int, args: Sequence[Any]
    ) -> None:
        self.place, self.now, self.id = place, now, task_id
        self.ttl, self.grace, self.largest = ttl, grace, largest
        self.args = [each if isinstance(each, bytes) else str(each).encode() for each in args]
        self.record = place.records[task_id]
        self.context = place.contexts.setdefault(task_id, {})
        self.sets: Row = {}
        self.gone: set[str] = set()
        self.shared: Row = {}
        self.steps: dict[int, Step] = {}
        self.dirty: dict[int, Step] = {}
        self.said: list[tuple[str, int | None, bytes]] = []
        self.sends: dict[str, int] = {}
        self.drops: set[str] = set()
        self.ready: list[Step] = []
        self.closing = self.forced = False
        self.parent = self.record.get("parent", b"")
        self.look = f"{task_id}|-1|1"
        self._head()

    def _head(self) -> None:
        for name in ("status", "phase", "driven", "token", *COUNTS):
            if name not in self.record:
                self.bad(name)
        for name, known in (("status", STATUSES), ("phase", PHASES)):
            if self.record[name] not in known:
                self.bad(name)
        self.status, self.phase = self.record["status"].decode(), self.record["phase"].decode()
        self.driven = self.record["driven"] == b"1"
        self.n: dict[str, int] = {}
        for name in COUNTS:
            try:
                self.n[name] = int(self.record[name])
            except ValueError:
                self.bad(name)
        self.over = self.status not in ("pending", "running")

    def bad(self, name: str) -> NoReturn:
        """Refuse a damaged field; nothing was written."""
        raise CorruptEntryError(f"a workflow's record is damaged at {name}; it is left as it is")

    def run(self, op: str) -> Answer:
        """Carry out ``op`` and answer as the script does."""
        if op in _BY_INDEX:
            index = self.args[0].decode()
            if not index.lstrip("-").isdigit() or not 0 <= int(index) < self.n["steps"]:
                return self.no("index")
        ops: Callable[[], Answer] = getattr(self, f"op_{op}")
        return ops()

    # -- fields

    def arg(self, n: int) -> bytes:
        return self.args[n - 1]

    def num(self, n: int) -> int:
        return int(self.args[n - 1])

    def put(self, name: str, value: bytes) -> None:
        self.sets[name] = value
        self.gone.discard(name)

    def drop(self, name: str) -> None:
        self.sets.pop(name, None)
        self.gone.add(name)

    def keep(self, name: str, value: bytes) -> None:
        if value:
            self.put(name, value)
        else:
            self.drop(name)

    def get(self, name: str) -> bytes:
        if name in self.sets:
            return self.sets[name]
        return b"" if name in self.gone else self.record.get(name, b"")

    def load(self, i: int) -> Step:
        if i not in self.steps:
            raw = self.record.get(f"n:{i}")
            try:
                static = Static(raw or b"")
            except (ValueError, UnicodeDecodeError):
                self.bad(f"n:{i}")
            try:
                live = Live(self.record.get(f"q:{i}"), static.waits)
            except (ValueError, UnicodeDecodeError):
                self.bad(f"q:{i}")
            self.steps[i] = Step(i, static, live)
        return self.steps[i]

    def touch(self, s: Step) -> None:
        self.dirty[s.i] = s

    def log(self, kind: str, step: int | None = None, data: bytes = b"") -> None:
        self.said.append((kind, step, data))

    def member(self, s: Step) -> str:
        return f"{self.id}|{s.i}|{s.live.series}"

    # -- one step

    def send(self, s: Step) -> None:
        if not self.driven:
            return
        if self.phase == "paused":
            s.live.state = "H"
        elif self.phase == "running" or (self.phase == "compensating" and s.fixed.grown == "c"):
            self.sends[self.member(s)] = self.now + self.grace
            self.ready.append(s)
            self.log("step.ready", s.i)
        self.touch(s)

    def waits_for(self, i: int) -> tuple[str, str, int, str]:
        """Kind, mode, due and name of what step ``i`` waits for."""
        raw = self.get(f"w:{i}").decode()
        if not raw:
            return "", "", 0, ""
        kind, mode, due, name = raw.split(" ", 3)
        return kind, mode, int(due), name

    def unpark(self, s: Step) -> None:
        kind, _, _, name = self.waits_for(s.i)
        if kind == "signal":
            waiting = [each for each in self.get(f"a:{name}").split() if int(each) != s.i]
            self.keep(f"a:{name}", b" ".join(waiting))
        elif kind == "child":
            self.n["children"] = max(0, self.n["children"] - 1)
        self.drop(f"w:{s.i}")
        self.drop(f"m:{s.i}")
        self.drops.add(self.member(s))

    def leave(self, s: Step) -> None:
        if s.state == "R":
            self.n["running"] -= 1
        if s.state == "W":
            self.unpark(s)

    def close(self, s: Step, state: str, data: bytes = b"") -> None:
        if s.state != "R":
            self.drops.add(self.member(s))
        self.leave(s)
        s.live.state, s.live.finished = state, self.now
        self.n["left"] -= 1
        if state == "C":
            self.n["order"] += 1
            s.live.order = self.n["order"]
            self.n["undo"] += s.fixed.undo
        self.touch(s)
        self.log(_SAID[state], s.i, data)

    def again(self, s: Step) -> None:
        self.leave(s)
        self.drops.add(self.member(s))
        s.live.state, s.live.series, s.live.fence, s.live.copy = "P", s.live.series + 1, 0, 0
        self.touch(s)
        self.send(s)

    def give_back(self, s: Step) -> None:
        self.drops.add(self.member(s))
        if s.state != "P":
            self.leave(s)
            s.live.state = "P"
            self.touch(s)

    def release(self, first: Step) -> None:
        stack = [first]
        while stack:
            s = stack.pop()
            for index in s.fixed.next:
                t = self.load(index)
                t.live.unmet -= 1
                t.live.alive += s.state != "S"
                self.touch(t)
                if t.live.unmet == 0 and t.state == "P":
                    if t.fixed.linked and t.live.alive == 0:
                        self.close(t, "S")
                        stack.append(t)
                    else:
                        self.send(t)

    def ended(self, s: Step) -> None:
        if s.fixed.grown == "i":
            self.item_ended(s)
        else:
            self.release(s)

    def item_ended(self, s: Step) -> None:
        parent = self.load(s.fixed.parent)
        name = f"x:{parent.i}"
        try:
            first, last, following, left, fault = map(int, self.get(name).split())
        except ValueError:
            self.bad(name)
        left -= 1
        if s.state == "F" and s.fixed.policy == "f" and fault < 0:
            fault = s.i
        if fault >= 0:
            for index in range(following, last + 1):
                self.close(self.load(index), "S")
                left -= 1
            following = max(following, last + 1)
        elif following <= last:
            self.send(self.load(following))
            following += 1
        self.put(name, f"{first} {last} {following} {left} {fault}".encode())
        if left > 0 or parent.state != "W":
            return
        if fault >= 0:
            self.failed(parent, self.get(f"e:{fault}") or dumps({"message": "an item failed"}))
            return
        self.gather(parent, first, last)

    def gather(self, parent: Step, first: int, last: int) -> None:
        parts = [self.get(f"r:{i}") or _NIL if self.load(i).state == "C" else _NIL for i in range(first, last + 1)]
        size = 3 + sum(map(len, parts))
        if size > self.largest:
            text = f"the results of its items take {size} bytes; the limit is {self.largest}"
            self.failed(parent, dumps({"type": "TaskTooLargeError", "message": text}))
            return
        count = len(parts)
        head = bytes([0x90 + count]) if count < 16 else bytes([0xDC, count // 256, count % 256])
        self.put(f"r:{parent.i}", head + b"".join(parts))
        self.close(parent, "C")
        self.ended(parent)

    def failed(self, s: Step, problem: bytes) -> None:
        self.keep(f"e:{s.i}", problem)
        if s.fixed.grown == "-" and s.fixed.policy == "s":
            self.close(s, "S", problem)
            self.ended(s)
            return
        self.close(s, "F", problem)
        if s.fixed.grown != "-" or s.fixed.policy == "c":
            self.ended(s)
        elif self.phase in ("running", "paused"):
            self.stop("failing", problem, s.i)

    # -- the workflow

    def stop(self, phase: str, problem: bytes, culprit: int | None = None) -> None:
        self.phase = phase
        self.put("error", problem)
        if culprit is not None:
            self.put("culprit", b"%d" % culprit)
        self.log(f"workflow.{phase}", None, problem)

    def output(self) -> bytes:
        sinks = [int(index) for index in self.get("sinks").split()]
        if len(sinks) < 2:
            for i in range(self.n["planned"] - 1, -1, -1):
                if self.load(i).state == "C":
                    return self.get(f"r:{i}") or _NIL
            return _NIL
        count = len(sinks)
        out = [bytes([0x80 + count]) if count < 16 else bytes([0xDE, count // 256, count % 256])]
        for i in sinks:
            s = self.load(i)
            out += (dumps(s.fixed.id), self.get(f"r:{i}") or _NIL if s.state == "C" else _NIL)
        return b"".join(out)

    def finish_workflow(self, status: str, result: bytes = b"") -> None:
        self.status, self.phase, self.closing = status, "", True
        self.put("ended", b"%d" % self.now)
        if result:
            self.shared["c:final_output"] = result
        if self.parent:
            self.sends[self.look] = self.now + self.grace
        else:
            self.drops.add(self.look)
        self.log(f"workflow.{status}", None, self.get("error") if status != "completed" else b"")

    def settle(self) -> None:
        if not self.driven or self.over or self.closing:
            return
        if self.phase in ("running", "paused"):
            if self.n["left"] == 0:
                self.finish_workflow("completed", self.output())
            return
        end = "cancelled" if self.get("cancelled") else "failed"
        if self.phase == "compensating":
            if self.n["left"] == 0:
                self.finish_workflow(end)
        elif self.n["running"] == 0:
            if self.n["undo"] > 0 or self.n["children"] > 0:
                self.sends[self.look] = self.now + self.grace
            else:
                self.finish_workflow(end)

    def expire(self) -> None:
        if self.ttl > 0:
            self.place.expiry[self.id] = self.now + self.ttl

    def commit(self) -> None:
        n = self.n
        while n["current"] < n["planned"] and self.load(n["current"]).state in ENDED:
            n["current"] += 1
        for i, s in self.dirty.items():
            self.put(f"q:{i}", s.live.packed())
        head = {"status": self.status.encode(), "phase": self.phase.encode()}
        head |= {name: b"%d" % value for name, value in n.items()}
        for name, value in head.items():
            if int(self.record[name]) != n[name] if name in n else self.record[name] != value:
                self.put(name, value)
        if not self.sets and not self.gone and not self.said and not self.forced:
            return
        n["version"] += 1
        self.record.update(self.sets)
        self.record["version"] = b"%d" % n["version"]
        self.context.update(self.shared)
        for kind, step, data in self.said:
            self.place.log(self.id, self.now, kind, step, data)
        self.place.outbox.update(self.sends)
        for name in self.gone:
            self.record.pop(name, None)
        if self.closing:
            last = self.place.ended[-1][0] if self.place.ended else "0-0"
            self.place.ended.append((next_position(last, self.now), self.id))
            del self.place.ended[:-10_000]
            if not self.parent:
                self.expire()

    def answer(self, done: int, why: str, more: Any = ()) -> Answer:
        self.settle()
        self.commit()
        for name in self.drops - self.sends.keys():
            self.place.outbox.pop(name, None)
        rows: list[Any] = []
        for s in self.ready:
            rows += (s.i, s.live.series, self.record.get(f"p:{s.i}", b""))
        task = self.record.get("task", b"") if rows else b""
        n = self.n
        stuck = not self.over and n["running"] == 0 and (n["undo"] > 0 or n["children"] > 0)
        attention = bool(self.closing and self.parent) or (stuck and self.phase in ("failing", "cancelling"))
        told = [done, why.encode(), self.status.encode(), self.phase.encode(), n["left"], n["running"], n["version"]]
        return [*told, n["steps"], task, rows, list(more), self.parent, int(attention)]

    def no(self, why: str, more: Any = ()) -> Answer:
        return self.answer(0, why, more)

    # -- helpers of the ops

    def unsent(self, s: Step) -> None:
        if s.state != "P" or s.live.unmet > 0 or self.member(s) not in self.place.outbox:
            return
        if self.phase != "paused":
            self.ready.append(s)
        else:
            s.live.state = "H"
            self.drops.add(self.member(s))
            self.touch(s)

    def unsent_after(self, s: Step) -> None:
        for index in s.fixed.next:
            self.unsent(self.load(index))

    def unsent_items(self, i: int) -> None:
        words = self.get(f"x:{i}").split()
        for index in range(int(words[0]), int(words[2])) if words else ():
            self.unsent(self.load(index))

    def stops(self, s: Step) -> bool:
        if self.phase == "compensating":
            return s.fixed.grown != "c"
        return self.over or self.phase in ("failing", "cancelling")

    def early(self, s: Step) -> bool:
        if s.state != "P":
            return False
        if s.live.unmet > 0:
            return True
        words = self.get(f"x:{s.fixed.parent}").split() if s.fixed.grown == "i" else []
        return bool(words) and s.i >= int(words[2])

    def claimed(self, s: Step, n: int) -> tuple[bool, int]:
        """Whether the claim in argument ``n`` is not that of step ``s``, and which sending it is of."""
        life, _, copy = (self.arg(n) if n <= len(self.args) else b"").partition(b":")
        if not copy:
            return False, 0
        other = s.live.copy > 0 and int(copy) not in (0, s.live.copy)
        return other or not self.record["token"].startswith(life), int(copy)

    def stale(self, s: Step, series: bytes, fence: bytes, claim: int = 99) -> bool:
        if (series and int(series) != s.live.series) or self.claimed(s, claim)[0]:
            return True
        return bool(fence) and (int(fence) < s.live.fence or (s.state == "R" and int(fence) != s.live.fence))

    def known(self, s: Step) -> Answer:
        record = self.record
        i = s.fixed.parent if s.fixed.parent >= 0 else s.i
        reads = [int(index) for index in record.get(f"d:{i}", b"").replace(b"|", b" ").split()]
        if s.fixed.grown == "c":
            reads.append(s.fixed.parent)
        rows = [[k, *(record.get(f"{kind}:{k}", b"") for kind in "nqre")] for k in reads]
        shared = [word for name, value in self.context.items() for word in (name.encode(), value)]
        words: Answer = [record.get(f"p:{s.i}", b""), record[f"n:{s.i}"], s.live.packed(), record.get("input", b"")]
        plain = record.get("plain", b"0")
        return [*words, record.get("task", b""), shared, rows, record.get(f"d:{s.i}", b""), plain, s.i]

    def row(self, s: Step) -> Answer:
        p, n, d = (self.record.get(f"{kind}:{s.i}", b"") for kind in "pnd")
        return [s.i, p, n, s.live.packed(), self.get(f"r:{s.i}"), self.get(f"e:{s.i}"), d]

    def all_steps(self) -> Iterator[Step]:
        return (self.load(i) for i in range(self.n["steps"]))
