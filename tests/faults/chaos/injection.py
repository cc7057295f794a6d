"""How each kind of fault is made. Every fault notes whom it hits and how long, and undoes what it did."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import redis

from tests.faults.chaos.plan import Fault
from tests.faults.chaos.server import GROUP, KEYS

if TYPE_CHECKING:
    from tests.faults.chaos.driver import Driver

FIRING = 10.0
"""Seconds that a rule on a reply may wait for it."""


async def inject(driver: Driver, fault: Fault) -> None:
    """Make one fault happen, to its end."""
    await _MAKERS[fault["kind"]](driver, fault)


async def _kill(driver: Driver, fault: Fault) -> None:
    slot = driver.slots[fault["actor"]]
    async with driver.noted(fault, [slot.actor]):
        slot.signal(signal.SIGKILL)
        while slot.process is not None and slot.process.poll() is None:
            await asyncio.sleep(0.005)


async def _term(driver: Driver, fault: Fault) -> None:
    slot = driver.slots[fault["actor"]]
    async with driver.noted(fault, [slot.actor]):
        process = slot.process
        slot.signal(signal.SIGTERM)
        while process is not None and process.poll() is None:
            await asyncio.sleep(0.02)


async def _stop(driver: Driver, fault: Fault) -> None:
    slot = driver.slots[fault["actor"]]
    async with driver.noted(fault, [slot.actor]):
        if slot.signal(signal.SIGSTOP):
            process = slot.process
            assert process is not None
            try:
                await asyncio.sleep(fault["seconds"])
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGCONT)


async def _redis_kill(driver: Driver, fault: Fault) -> None:
    async with driver.alone, driver.noted(fault, None):
        await asyncio.to_thread(driver.server.kill)
        try:
            await asyncio.sleep(fault["seconds"])
        finally:
            await asyncio.shield(asyncio.to_thread(driver.server.start))


async def _redis_stop(driver: Driver, fault: Fault) -> None:
    async with driver.alone, driver.noted(fault, None):
        driver.server.freeze()
        try:
            await asyncio.sleep(fault["seconds"])
        finally:
            driver.server.thaw()


async def _client_kill(driver: Driver, fault: Fault) -> None:
    async with driver.noted(fault, None):
        if fault["which"] == "all":
            await driver.ask("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        else:
            rows = (await driver.ask("CLIENT LIST")) or []
            for row in rows:
                if row["name"].endswith(fault["which"]):
                    with contextlib.suppress(redis.ResponseError):  # it has gone meanwhile
                        await driver.ask("CLIENT", "KILL", "ID", row["id"])


async def _client_pause(driver: Driver, fault: Fault) -> None:
    async with driver.alone, driver.noted(fault, None):
        await driver.ask("CLIENT", "PAUSE", round(fault["seconds"] * 1000), fault["mode"])
        await asyncio.sleep(fault["seconds"])


async def _script_flush(driver: Driver, fault: Fault) -> None:
    async with driver.noted(fault, None):
        await driver.ask("SCRIPT", "FLUSH")


async def _group_destroy(driver: Driver, fault: Fault) -> None:
    async with driver.noted(fault, None):
        with contextlib.suppress(redis.ResponseError):  # the lane may not exist yet
            await driver.ask("XGROUP", "DESTROY", KEYS.lanes[fault["lane"]], GROUP)


async def _maxmemory(driver: Driver, fault: Fault) -> None:
    async with driver.noted(fault, None):
        await driver.ask("CONFIG", "SET", "maxmemory", "1")
        try:
            await asyncio.sleep(fault["seconds"])
        finally:
            await asyncio.shield(driver.ask("CONFIG", "SET", "maxmemory", "0"))


def _on_reply(arm: Callable[[Any, Fault], Any]) -> Callable[[Driver, Fault], Awaitable[None]]:
    async def make(driver: Driver, fault: Fault) -> None:
        slot = driver.slots[fault["actor"]]
        rule = arm(slot.proxy, fault)
        with contextlib.suppress(TimeoutError):
            await rule.wait(FIRING)
        if rule.fired:
            async with driver.noted(fault, [slot.actor]):
                await asyncio.sleep(fault.get("seconds", 0.0))

    return make


async def _reset(driver: Driver, fault: Fault) -> None:
    slot = driver.slots[fault["actor"]]
    async with driver.noted(fault, [slot.actor]):
        slot.proxy.reset()


async def _half_close(driver: Driver, fault: Fault) -> None:
    slot = driver.slots[fault["actor"]]
    async with driver.noted(fault, [slot.actor]):
        slot.proxy.half_close(fault["direction"])


def _mode(enter: Callable[[Any, Fault], Any]) -> Callable[[Driver, Fault], Awaitable[None]]:
    async def make(driver: Driver, fault: Fault) -> None:
        slot = driver.slots[fault["actor"]]
        async with driver.noted(fault, [slot.actor]):
            entered = enter(slot.proxy, fault)
            if asyncio.iscoroutine(entered):
                await entered
            try:
                await asyncio.sleep(fault["seconds"])
            finally:
                await asyncio.shield(slot.proxy.heal())

    return make


async def _refuse(proxy: Any, fault: Fault) -> None:
    await proxy.refuse()
    proxy.reset()


_MAKERS: dict[str, Callable[[Driver, Fault], Awaitable[None]]] = {
    "worker_kill": _kill,
    "worker_stop": _stop,
    "worker_term": _term,
    "producer_kill": _kill,
    "producer_stop": _stop,
    "redis_kill": _redis_kill,
    "redis_stop": _redis_stop,
    "client_kill": _client_kill,
    "client_pause": _client_pause,
    "script_flush": _script_flush,
    "group_destroy": _group_destroy,
    "maxmemory": _maxmemory,
    "reply_lost": _on_reply(lambda proxy, f: proxy.drop_reply(f["name"], how=f["how"])),
    "reply_late": _on_reply(lambda proxy, f: proxy.delay_reply(f["name"], seconds=f["seconds"])),
    "refused_command": _on_reply(lambda proxy, f: proxy.refuse_command(f["name"], nth=f.get("nth", 1))),
    "truncated": _on_reply(lambda proxy, f: proxy.cut_after(f["count"], f["how"])),
    "reset": _reset,
    "half_close": _half_close,
    "black_hole": _mode(lambda proxy, f: proxy.stall(f["direction"])),
    "refused": _mode(_refuse),
    "latency": _mode(lambda proxy, f: proxy.delay(f["delay"], f["delay"] / 2)),
}
