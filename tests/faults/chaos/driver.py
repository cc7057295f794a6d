"""Runs a plan: starts the server, the proxies and the processes, injects the faults, heals, waits, collects.

Owns every process it starts and ends each by its pid. Writes a history of its own, ``driver.jsonl``: when each fault began
and ended, whom it hit, when each process started and ended. Judges nothing: :mod:`tests.faults.chaos.checker` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import redis

from tests.faults.chaos import mutants
from tests.faults.chaos.history import History
from tests.faults.chaos.injection import inject
from tests.faults.chaos.plan import Fault, Plan
from tests.faults.chaos.server import KEYS, Final, Pulse, Server, read_final, wait_quiet
from tests.faults.proxy import Command, Proxy

ROOT = Path(__file__).parents[3]
READY_LIMIT = 60.0
END_LIMIT = 60.0
"""Seconds that a process gets to start, and to end after SIGTERM: the machine may be busy."""


class Slot:
    """One actor's place: its proxy, and the process that fills it now."""

    def __init__(self, driver: Driver, name: str, program: str, proxy: Proxy) -> None:
        self.driver, self.name, self.program, self.proxy = driver, name, program, proxy
        self.incarnation = 0
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = True
        self.frozen = 0
        self.ended = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    @property
    def actor(self) -> str:
        """The name of its present incarnation."""
        return f"{self.name}.{self.incarnation}"

    def signal(self, number: int) -> bool:
        """Send a signal to the present incarnation; False when there is none."""
        process = self.process
        if process is None or process.poll() is not None:
            return False
        process.send_signal(number)
        return True

    def _spawn(self) -> subprocess.Popen[bytes]:
        self.incarnation += 1
        out = self.driver.out
        command = [sys.executable, "-m", f"tests.faults.chaos.{self.program}", out / "plan.json"]
        with (out / f"{self.actor}.log").open("wb") as log:
            process = subprocess.Popen(
                [*command, self.actor, self.proxy.url, str(out)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.driver.history.write("process", "start", who=self.actor, pid=process.pid)
        return process

    async def keep(self) -> None:
        """Fill the slot until it is no longer wanted (a worker) or has ended by itself (a producer)."""
        while True:
            self.process = self._spawn()
            while self.process.poll() is None:
                await asyncio.sleep(0.02)
            code = self.process.returncode
            self.driver.history.write("process", "exit", who=self.actor, code=code)
            if not self.wanted or (self.program == "producer" and code == 0):
                self.ended.set()
                return
            self.driver.restarts += 1
            await asyncio.sleep(0.05)
            if not self.wanted:
                self.ended.set()
                return

    async def ready(self) -> None:
        """Until the present incarnation says so."""
        async with asyncio.timeout(READY_LIMIT):
            while b'"ready"' not in self._history():
                if self.process is not None and self.process.poll() == 1:
                    log = (self.driver.out / f"{self.actor}.log").read_text("utf-8", "replace")
                    raise RuntimeError(f"{self.actor} does not start: {log[-2000:]}")
                await asyncio.sleep(0.02)

    def _history(self) -> bytes:
        path = self.driver.out / f"{self.actor}.jsonl"
        return path.read_bytes() if path.exists() else b""

    async def end(self) -> None:
        """SIGTERM, and SIGKILL for what does not end."""
        self.wanted = False
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(END_LIMIT):
                await self.ended.wait()
        except TimeoutError:
            self.driver.history.write("process", "hang", who=self.actor)
            self.signal(signal.SIGKILL)
            await self.ended.wait()


class Driver:
    """One run of a plan; everything it writes goes to ``out``."""

    def __init__(self, plan: Plan, out: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self.plan, self.out, self.say = plan, out, say
        self.history = History(out / "driver.jsonl", "driver")
        self.server = Server(plan.fsync)
        self.slots: dict[str, Slot] = {}
        self.applied: Counter[str] = Counter()
        self.restarts = 0
        self.began = 0.0
        self._begun = asyncio.Event()
        self.alone = asyncio.Lock()
        """Held by what takes the whole server away: two of these at once would be one."""
        self._numbers = 0
        self._scripts: dict[str, str] = {}
        self._counting: list[tuple[str, int, asyncio.Event]] = []

    # -- the run

    async def run(self) -> Final:
        """Carry the plan out."""
        self.plan.save(self.out / "plan.json")
        self._scripts = await asyncio.to_thread(mutants.scripts, self.plan.mutant)
        await asyncio.to_thread(self.server.start)
        try:
            with Pulse(self.history, self.plan.lease * 0.15, self.server):
                quiet = await self._run()
            final = await read_final(self.server.url)
            final.quiet = quiet
            return final
        finally:
            await self._abandon()
            await asyncio.to_thread(self.server.stop)
            self.history.close()

    async def _run(self) -> bool:
        workers = [await self._slot(f"w{n}", "worker") for n in range(self.plan.workers)]
        producers = [await self._slot(f"p{n}", "producer") for n in range(self.plan.producers)]
        if not self.plan.workers_late:
            await self._fill(workers)
        faults = [asyncio.ensure_future(self._fault(fault)) for fault in self.plan.faults]
        await asyncio.sleep(0)  # a fault without a time is armed before anything is sent
        await self._fill(producers)
        self.began = time.monotonic()
        self._begun.set()
        talk = asyncio.ensure_future(self._report())
        try:
            if self.plan.workers_late:
                await asyncio.sleep(self.plan.workers_late)
                await self._fill(workers)
            await self._finish(producers, faults)
            quiet = await wait_quiet(self.server, self.plan.quiet_limit)
        finally:
            talk.cancel()
            await asyncio.gather(talk, return_exceptions=True)
        self.history.write("driver", "quiet" if quiet else "unquiet")
        await asyncio.gather(*(slot.end() for slot in workers))
        for slot in self.slots.values():
            await slot.proxy.close()
        return quiet

    async def _finish(self, producers: list[Slot], faults: list[asyncio.Task[None]]) -> None:
        """Until every producer has ended and every fault is over; what did not come until then does not come."""
        left = self.began + self.plan.seconds - time.monotonic()
        await asyncio.wait(faults or [asyncio.ensure_future(asyncio.sleep(0))], timeout=max(0.0, left) + 1.0)
        for task in faults:
            task.cancel()
        for result in await asyncio.gather(*faults, return_exceptions=True):
            if isinstance(result, Exception):
                raise result
        await self._heal()
        async with asyncio.timeout(END_LIMIT + self.plan.seconds):
            for slot in producers:
                await slot.ended.wait()

    async def _slot(self, name: str, program: str) -> Slot:
        proxy = await Proxy(self.server.url, scripts=self._scripts).start()
        slot = self.slots[name] = Slot(self, name, program, proxy)
        if program == "worker":
            proxy.observers.append(self._count)
        return slot

    async def _fill(self, slots: list[Slot]) -> None:
        for slot in slots:
            slot.task = asyncio.ensure_future(slot.keep())
        await asyncio.sleep(0)
        await asyncio.gather(*(slot.ready() for slot in slots))

    async def _abandon(self) -> None:
        """Whatever happened: no process and no proxy is left."""
        for slot in self.slots.values():
            slot.wanted = False
            if slot.task is not None:
                slot.task.cancel()
                await asyncio.gather(slot.task, return_exceptions=True)
            if slot.process is not None and slot.process.poll() is None:
                slot.process.kill()
                await asyncio.to_thread(slot.process.wait)
            await slot.proxy.close()

    # -- faults

    def _count(self, direction: str, command: Command) -> None:
        if direction == "down" and self._counting:
            for row in list(self._counting):
                if row[0] in command.names:
                    self._counting.remove(row)
                    if row[1] > 1:
                        self._counting.append((row[0], row[1] - 1, row[2]))
                    else:
                        row[2].set()

    async def _fault(self, fault: Fault) -> None:
        if fault["at"]:
            await self._begun.wait()
            await asyncio.sleep(max(0.0, self.began + fault["at"] - time.monotonic()))
        if "after" in fault:
            event = asyncio.Event()
            self._counting.append((*fault["after"], event))
            await event.wait()
        await inject(self, fault)

    @contextlib.asynccontextmanager
    async def noted(self, fault: Fault, actors: list[str] | None) -> Any:
        """Write when a fault begins and ends; ``actors``: whom it hits, None for everybody."""
        number = self._numbers = self._numbers + 1
        facts = {"number": number, "kind": fault["kind"], "actors": actors, "fault": fault}
        self.history.write("fault", "invoke", **facts)
        self.applied[fault["kind"]] += 1
        try:
            yield
        finally:
            self.history.write("fault", "ok", **facts)

    async def ask(self, *command: Any) -> Any:
        """One command of the driver, past every proxy; patient, because the server may be down."""
        while True:
            try:
                return await asyncio.to_thread(self.server.ask, *command)
            except (redis.ConnectionError, redis.TimeoutError):
                await asyncio.sleep(0.05)

    async def _heal(self) -> None:
        for slot in self.slots.values():
            await slot.proxy.heal()
            slot.signal(signal.SIGCONT)
        await self.ask("CONFIG", "SET", "maxmemory", "0")
        await self.ask("CLIENT", "UNPAUSE")
        self.history.write("driver", "healed")

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(3.0)
            with contextlib.suppress(Exception):
                flat = await asyncio.to_thread(self.server.ask, "HGETALL", KEYS.counters)
                counts = {k.decode(): int(v) for k, v in flat.items() if b":" not in k}
                ended = sum(counts.get(name, 0) for name in ("completed", "dead", "cancelled"))
                self.say(
                    f"{time.monotonic() - self.began:6.1f} s  produced {counts.get('produced', 0):6}  ended {ended:6}  "
                    f"reclaimed {counts.get('reclaimed', 0):4}  restarts {self.restarts:3}  "
                    f"faults {self.applied.total():4}"
                )
