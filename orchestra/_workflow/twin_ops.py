"""The ops of ``lua/workflow_move.lua`` one by one, as :mod:`orchestra._workflow.twin_moves` carries them out.

Owns what each op checks, in the order of the script. Nothing here awaits.
"""

from __future__ import annotations

from orchestra._workflow.record import ENDED, Live, Static
from orchestra._workflow.twin_moves import EDGES, LETTER, Answer, Move, Step


class Moves(Move):
    """Every op of the script; see there for what ``args`` holds and what it means."""

    # -- one step

    def op_begin(self) -> Answer:
        s, fence = self.load(self.num(1)), self.num(3)
        live = s.live
        foreign, copy = self.claimed(s, 4)
        if self.num(2) != live.series or (foreign and s.state not in ENDED):
            return self.no("stale")
        if self.early(s):
            return self.no("early")
        if s.state in ENDED or s.state == "W":
            if s.state == "W":
                self.unsent_items(s.i)
            else:
                self.unsent_after(s)
            return self.no("done")
        if s.state == "R" and fence < live.fence:
            return self.no("stale")
        if s.state == "R" and fence == live.fence:
            return self.answer(1, "go", self.known(s))
        if self.stops(s):
            self.give_back(s)
            return self.no("stop")
        self.drops.add(self.member(s))
        if self.phase == "paused" and s.state != "R":
            if s.state != "H":
                self.touch(s)
            live.state = "H"
            return self.no("held")
        self.n["running"] += s.state != "R"
        live.state, live.attempt, live.fence, live.started, live.finished = "R", live.attempt + 1, fence, self.now, 0
        live.copy = copy
        self.touch(s)
        self.log("step.started", s.i)
        return self.answer(1, "go", self.known(s))

    def op_look(self) -> Answer:
        return self.answer(1, "", self.known(self.load(self.num(1))))

    def op_finish(self) -> Answer:
        s, state = self.load(self.num(1)), LETTER[self.arg(4).decode()]
        if self.stale(s, self.arg(2), self.arg(3), 7):
            return self.no("stale")
        if self.early(s):
            return self.no("early")
        if s.state in ENDED:
            if s.state != state and not (state == "F" and s.state == "S" and s.fixed.policy == "s"):
                return self.no("ended")
            self.unsent_after(s)
            return self.answer(1, "repeated")
        if self.over:
            return self.no("over")
        if self.phase == "compensating" and s.fixed.grown != "c":
            return self.no("stop")
        if state == "F":
            self.failed(s, self.arg(6))
        else:
            if self.arg(5):
                self.put(f"r:{s.i}", self.arg(5))
            if self.arg(6):
                self.put(f"e:{s.i}", self.arg(6))
            self.close(s, state)
            self.ended(s)
        return self.answer(1, "")

    def op_retrying(self) -> Answer:
        s = self.load(self.num(1))
        if self.stale(s, self.arg(2), self.arg(3), 6):
            return self.no("stale")
        if s.state != "R":
            return self.answer(int(s.state == "P"), "repeated" if s.state == "P" else "ended")
        self.leave(s)
        s.live.state = "P"
        self.touch(s)
        if self.arg(4) == b"1":
            self.log("step.retrying", s.i, self.arg(5))
        else:
            s.live.attempt = max(0, s.live.attempt - 1)
        return self.answer(1, "")

    def op_park(self) -> Answer:
        s, kind, name, due = self.load(self.num(1)), self.arg(4).decode(), self.arg(5).decode(), self.num(6)
        if self.stale(s, self.arg(2), self.arg(3), 9):
            return self.no("stale")
        if self.early(s):
            return self.no("early")
        if s.state in ENDED or s.state == "W":
            if s.state != "W":
                self.unsent_after(s)
            return self.answer(1, "repeated")
        if self.stops(s):
            self.give_back(s)
            return self.no("stop")
        mode = "again" if s.state == "R" and kind == "signal" else "result"
        value = self.context.get(f"g:{name}") if kind == "signal" else None
        if value is not None:
            if mode == "again":
                self.again(s)
            else:
                self.signalled(s, value)
            return self.answer(1, "signalled")
        self.leave(s)
        s.live.started = s.live.started or self.now
        s.live.state = "W"
        self.touch(s)
        self.put(f"w:{s.i}", f"{kind} {mode} {self.now + due if due > 0 else 0} {name}".encode())
        self.keep(f"m:{s.i}", self.arg(7))
        if kind == "signal":
            self.put(f"a:{name}", b" ".join([*self.get(f"a:{name}").split(), b"%d" % s.i]))
        self.n["children"] += kind == "child"
        if due > 0:
            self.sends[self.member(s)] = self.now + due + 2000
        else:
            self.drops.add(self.member(s))
        self.log("step.waiting", s.i, self.arg(8))
        return self.answer(1, "")

    def signalled(self, s: Step, value: bytes) -> None:
        self.put(f"r:{s.i}", value)
        self.close(s, "C")
        self.ended(s)

    def op_fire(self) -> Answer:
        s = self.load(self.num(1))
        if self.num(2) != s.live.series:
            return self.no("stale")
        if s.state != "W":
            self.unsent_after(s)
            return self.answer(1, "repeated")
        kind, _, due, _ = self.waits_for(s.i)
        if not kind or due == 0 or due > self.now:
            return self.no("early")
        if self.stops(s):
            return self.no("stop")
        if kind == "timer":
            self.close(s, "C")
            self.ended(s)
        else:
            self.failed(s, self.arg(3))
        return self.answer(1, "")

    def op_signal(self) -> Answer:
        name, value = self.arg(1).decode(), self.arg(2)
        if f"g:{name}" in self.context:
            mine = self.get(f"b:{name}") == self.arg(3)
            return self.answer(int(mine), "repeated" if mine else "answered")
        if self.over:
            return self.no("over")
        if self.phase in ("failing", "cancelling"):
            return self.no("stop")
        waiting = [int(index) for index in self.get(f"a:{name}").split()]
        self.put(f"b:{name}", self.arg(3))
        self.log("signal", None, self.arg(4))
        for index in waiting:
            s = self.load(index)
            if s.state == "W" and not self.stops(s):
                if self.waits_for(index)[1] == "again":
                    self.again(s)
                else:
                    self.signalled(s, value)
        self.shared[f"g:{name}"] = value
        return self.answer(1, "")

    # -- steps that grow

    def op_grow(self) -> Answer:
        s, most, count = self.load(self.num(1)), self.num(4), self.num(5)
        if self.stale(s, self.arg(2), self.arg(3)):
            return self.no("stale")
        if self.early(s):
            return self.no("early")
        if s.state == "W":
            self.unsent_items(s.i)
        if s.state in ENDED:
            self.unsent_after(s)
        if s.state in ENDED or s.state == "W":
            return self.answer(1, "repeated")
        if self.stops(s):
            return self.no("stop")
        if count == 0:
            self.signalled(s, b"\x90")
            return self.answer(1, "")
        first, begin = self.n["steps"], min(most, count) if most > 0 else count
        self.leave(s)
        s.live.state, s.live.started = "W", self.now
        self.touch(s)
        self.drops.add(self.member(s))
        self.put(f"w:{s.i}", f"items result 0 {count}".encode())
        self.put(f"x:{s.i}", f"{first} {first + count - 1} {first + begin} {count} -1".encode())
        self.log("step.waiting", s.i, self.arg(6 + 3 * count))
        self.n["steps"] += count
        self.n["left"] += count
        for k in range(count):
            planned, policy, name = self.args[5 + 3 * k : 8 + 3 * k]
            item = self.add(first + k, planned, b"%s--i %d 0 %s" % (policy, s.i, name))
            if k < begin:
                self.send(item)
        return self.answer(1, "")

    def add(self, index: int, planned: bytes, static: bytes) -> Step:
        self.put(f"p:{index}", planned)
        self.put(f"n:{index}", static)
        fixed = Static(static)
        self.steps[index] = Step(index, fixed, Live(None, fixed.waits))
        return self.steps[index]

    def op_undo(self) -> Answer:
        count, n = self.num(2), self.n
        if self.phase == "compensating":
            if not self.get("undoing"):
                self.bad("undoing")
            for index in range(int(self.get("undoing")), n["steps"]):
                self.unsent(self.load(index))
            return self.answer(1, "repeated")
        if self.over:
            return self.answer(1, "over")
        if self.phase not in ("failing", "cancelling") or n["running"] > 0:
            return self.no("early")
        if self.num(1) != n["version"]:
            return self.no("conflict")
        n["undo"], n["children"] = 0, 0
        self.drops.add(self.look)
        if count == 0:
            return self.answer(1, "")
        n["left"], self.phase = count, "compensating"
        self.log("workflow.compensating")
        first = n["steps"]
        self.put("undoing", b"%d" % first)
        n["steps"] += count
        for k in range(count):
            planned, name, undone = self.args[2 + 3 * k : 5 + 3 * k]
            after = b" %d" % (first + k + 1) if k < count - 1 else b""
            self.add(first + k, planned, b"c--c %s %d %s%s" % (undone, k > 0, name, after))
        self.send(self.load(first))
        return self.answer(1, "")

    # -- the whole workflow

    def op_context(self) -> Answer:
        if self.over:
            return self.no("over")
        name = f"c:{self.arg(1).decode()}"
        if self.context.get(name) == self.arg(2):
            return self.answer(1, "repeated")
        self.forced = True
        self.shared[name] = self.arg(2)
        return self.answer(1, "")

    def op_told(self) -> Answer:
        if self.over and self.id not in self.place.expiry:
            self.expire()
        self.drops.add(self.look)
        return self.answer(1, "")

    def op_sweep(self) -> Answer:
        due: list[int] = []
        for k in range(0, len(self.args), 2):
            i, series = int(self.args[k]), int(self.args[k + 1])
            name = f"{self.id}|{i}|{series}"
            if i < 0:
                if not self.parent and (self.over or self.phase not in ("failing", "cancelling")):
                    self.drops.add(name)
            elif i >= self.n["steps"] or self.over or self.load(i).live.series != series:
                self.drops.add(name)
            elif self.load(i).state == "W":
                at = self.waits_for(i)[2]
                if at == 0:
                    self.drops.add(name)
                elif at <= self.now:
                    due += (i, series)
            elif self.load(i).state == "P":
                self.unsent(self.load(i))
            else:
                self.drops.add(name)
        return self.answer(1, "", due)

    def op_pause(self) -> Answer:
        if self.over or self.phase not in ("running", "paused"):
            return self.no("over" if self.over else self.phase)
        if self.phase == "running":
            self.phase = "paused"
            self.log("workflow.paused")
        return self.answer(1, "")

    def op_resume(self) -> Answer:
        reopen = self.status == "failed" and self.driven and not self.get("undoing")
        if self.over and not reopen:
            return self.no("compensated" if self.status == "failed" else "over")
        if not self.over and self.phase != "paused":
            return self.answer(int(self.phase == "running"), self.phase)
        self.status, self.phase = "running", "running"
        self.log("workflow.resumed")
        if reopen:
            self.over = False
            for name in ("ended", "error", "culprit"):
                self.drop(name)
            self.place.expiry.pop(self.id, None)
            self.drops.add(self.look)
        for s in list(self.all_steps()):
            if s.state == "H":
                self.again(s)
            elif reopen:
                self.reopen(s)
        return self.answer(1, "")

    def reopen(self, s: Step) -> None:
        if s.fixed.grown == "-" and s.state == "F" and s.fixed.policy == "f":
            self.n["left"] += 1
            self.n["current"] = min(self.n["current"], s.i)
            s.live.finished = 0
            self.drop(f"e:{s.i}")
            self.again(s)
        elif s.state == "P" and s.live.unmet == 0:
            words = self.get(f"x:{s.fixed.parent}").split() if s.fixed.grown == "i" else []
            if s.fixed.grown != "i" or (words and s.i < int(words[2])):
                self.again(s)
        elif s.state == "W":
            kind, _, due, _ = self.waits_for(s.i)
            if kind == "child":
                self.again(s)
            elif due > 0:
                self.sends[self.member(s)] = self.now + self.grace

    def op_cancel(self) -> Answer:
        if self.over:
            return self.answer(int(self.status == "cancelled"), "over")
        if self.phase in ("failing", "compensating"):
            return self.no(self.phase)
        runs: list[int] = []
        children: list[bytes] = []
        if self.n["running"] > 0 or self.n["children"] > 0:
            for s in self.all_steps():
                if s.state == "R":
                    runs += (s.i, s.live.series)
                elif s.state == "W" and self.waits_for(s.i)[0] == "child":
                    children.append(self.waits_for(s.i)[3].encode())
        if self.phase != "cancelling":
            self.put("cancelled", b"1")
            self.stop("cancelling", self.arg(1))
            if not self.driven:
                self.finish_workflow("cancelled")
        return self.answer(1, "", [runs, children])

    # -- by hand

    def update(self, s: Step, state: str, attempt: bytes, result: bytes, problem: bytes) -> str:
        live = s.live
        if attempt and int(attempt) != live.attempt:
            return "attempt"
        if state == ("F" if s.state == "B" else s.state) and state != "R":
            if (self.get(f"r:{s.i}"), self.get(f"e:{s.i}")) == (result, problem):
                return "same"
            return "over" if self.over else "other"
        if self.over:
            return "over"
        if live.unmet > 0 and s.state not in ENDED:
            return "wait"
        if state not in EDGES[s.state]:
            return "edge"
        self.status, self.phase = "running", "running"
        self.keep(f"r:{s.i}", result)
        self.keep(f"e:{s.i}", problem)
        if state in ("C", "S"):
            self.close(s, state)
            self.ended(s)
            return ""
        self.leave(s)
        if state == "R":
            self.n["running"] += 1
            live.attempt, live.started = live.attempt + 1, self.now
            self.log("step.started", s.i)
        elif state == "P":
            live.started = 0
        else:
            self.log("step.failed", s.i, problem)
        live.state, live.finished = ("B", self.now) if state == "F" else (state, 0)
        self.touch(s)
        return ""

    def op_update(self) -> Answer:
        if self.driven:
            return self.no("driven")
        s = self.load(self.num(1))
        if self.get("last") == self.arg(6):
            return self.answer(1, "same", self.row(s))
        why = self.update(s, LETTER[self.arg(2).decode()], *self.args[2:5])
        if not why:
            self.put("last", self.arg(6))
        return self.answer(int(why in ("", "same")), why, self.row(s))

    def op_fail_step(self) -> Answer:
        if self.driven:
            return self.no("driven")
        s, attempt, problem = self.load(self.num(1)), self.arg(2), self.arg(3)
        if self.get("last") == self.arg(4):
            return self.answer(1, "same", self.row(s))
        passed = s.state == "S" and s.fixed.policy == "s" and bool(self.get(f"e:{s.i}"))
        if (s.state == "F" or passed) and not attempt:
            return self.answer(1, "same", self.row(s))
        if s.state != "B":
            why = self.update(s, "F", attempt, b"", problem)
            if why:
                return self.no(why, self.row(s))
            if s.fixed.policy != "f":
                self.said.pop()
        elif attempt and int(attempt) != s.live.attempt:
            return self.no("attempt", self.row(s))
        elif self.over:
            return self.answer(1, "same", self.row(s))
        self.put("last", self.arg(4))
        if s.fixed.policy == "f":
            self.put("error", problem)
            self.put("culprit", b"%d" % s.i)
            self.finish_workflow("failed")
        else:
            self.close(s, "S" if s.fixed.policy == "s" else "F", self.get(f"e:{s.i}"))
            self.ended(s)
        return self.answer(1, "", self.row(s))

    def op_finalize(self) -> Answer:
        status, told = self.arg(1).decode(), self.arg(2)
        if self.over:
            return self.answer(int(self.status == status), "same" if self.status == status else "over")
        if self.driven and status == "failed":
            if self.phase in ("running", "paused"):
                self.stop("failing", told)
            return self.answer(1, "")
        for i in range(self.n["current"], self.n["steps"]):
            s = self.load(i)
            if status == "completed" and s.state in "RBW":
                return self.no("busy", self.row(s))
            if s.state == "R":
                self.put(f"e:{i}", told)
                self.n["running"] -= 1
                s.live.state, s.live.finished = "B", self.now
                self.touch(s)
                self.log("step.failed", i, told)
        if status == "completed":
            self.n["current"] = self.n["planned"]
        else:
            self.put("error", told)
        self.finish_workflow(status, told if status == "completed" else b"")
        return self.answer(1, "")
