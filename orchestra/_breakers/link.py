"""One circuit breaker's share in a state that processes have in common: what it has to tell, and the permits it holds.

Owns the orders to ``lua/breaker.lua`` that are not answered yet, the era the breaker believes to be in, and the permits
of probes. Refuses to own connections and loops (:mod:`orchestra._breakers.exchange`) and transitions, which are the
breaker's. What the breaker calls runs under its lock, in any thread, and only notes things; :meth:`BreakerLink.speak` and
:meth:`BreakerLink.learn` run in one event loop.
"""

from __future__ import annotations

import secrets
from collections import deque
from typing import TYPE_CHECKING, Any

from orchestra import _keys, _scripts
from orchestra._clock import SYSTEM_CLOCK, Clock
from orchestra.circuit_breaker import CircuitBreaker, CircuitState

if TYPE_CHECKING:
    from collections.abc import Callable

BUSY_S = 0.1
"""Seconds between two looks at Redis while a breaker is not closed; so long waits who wishes for a probe."""
UNUSED_S = 2.0
"""Seconds after which a permit that nobody has used goes back to the other processes."""
_HAND = {"force_open": ("open", 1), "force_closed": ("closed", 1), "reset": ("closed", 0)}
_TRIES = 3  # an order by hand may meet an era that has just changed


class BreakerLink:
    """The :class:`~orchestra.circuit_breaker.Link` of ``breaker``."""

    def __init__(self, breaker: CircuitBreaker, kick: Callable[[], None], clock: Clock = SYSTEM_CLOCK) -> None:
        self.breaker = breaker
        self.key = _keys.breaker(breaker.name)
        self.kick = kick
        self.up = False
        self.wanted = False
        """Whether somebody would make a probe if he might."""
        self._clock = clock
        self._era = "0"
        self._orders: deque[tuple[str, str]] = deque(maxlen=1024)
        self._permits: deque[tuple[str, float]] = deque()
        """Tokens that no probe has used yet, and when they came."""
        self._asked: str | None = None
        """Token of the permit that was asked for last, until that is answered."""
        self._out: list[tuple[str, float]] = []
        """Tokens of the probes that run, and when Redis forgets them."""

    # -- asked by the breaker

    @property
    def pending(self) -> bool:
        """Whether something is still to be told: then what Redis says is older than what the breaker knows."""
        return bool(self._orders)

    def hold(self, wish: bool) -> float:
        """0.0 when a permit is in hand; else says when to ask again, in seconds, and notes a ``wish``."""
        if self._permits:
            return 0.0
        self.wanted = self.wanted or wish
        return BUSY_S

    def take(self) -> bool:
        """Use a permit; False when it went back in this very moment."""
        try:
            token, _ = self._permits.popleft()
        except IndexError:
            return not self.up
        self._out.append((token, self._clock.monotonic() + self.breaker.config.recovery_timeout))
        return True

    def ended(self, outcome: bool | None) -> None:
        """A probe has ended. The youngest: an older one that hangs keeps its permit until that expires."""
        now = self._clock.monotonic()
        self._out = [probe for probe in self._out if probe[1] > now]
        if self._out:
            token, _ = self._out.pop()
            self._orders.append(("release" if outcome is None else "success" if outcome else "failure", token))
        elif outcome is False:
            self.order("open")

    def order(self, op: str) -> None:
        """The breaker has opened (``open``), or was moved by hand (``force_open``, ``force_closed``, ``reset``)."""
        if op in _HAND:
            self._orders.clear()
        if (op, "") not in self._orders:
            self._orders.append((op, ""))

    # -- talking to Redis

    async def speak(self, client: Any) -> None:
        """Tell what there is to tell, and ask for a permit if one is wanted. A round trip for each.

        Raises: what the client raises; then what was not told is told the next time.
        """
        tries = 0
        while self._orders:
            first = op, token = self._orders[0]
            if op == "open" and self.breaker.closed:
                answered = True  # it has recovered by itself, while Redis was away
            else:
                answer = await self._ask(client, op, token)
                tries += 1
                answered = op not in _HAND or answer == _HAND[op] or tries >= _TRIES
            if answered and self._orders and self._orders[0] is first:
                self._orders.popleft()
        await self._give_back(client)
        if self.wanted and not self._permits and not self.breaker.closed:
            self._asked = self._asked or secrets.token_hex(
                6
            )  # the same again if the reply was lost: it was given, perhaps
            await self._ask(client, "probe", self._asked)
            self.wanted, self._asked = False, None

    async def _ask(self, client: Any, op: str, token: str) -> tuple[str, int]:
        config = self.breaker.config
        recovery_ms = max(1, round(config.recovery_timeout * 1000))
        args = (op, self._era, recovery_ms, token, config.half_open_max_calls, config.success_threshold)
        before = self.breaker.era
        state, era, wait_ms, forced, granted = await _scripts.call(client, "breaker", (self.key,), args)
        self.learn(state.decode(), era.decode(), wait_ms, bool(forced), before)
        if granted:
            self._permits.append((token, self._clock.monotonic()))
        return state.decode(), forced

    async def _give_back(self, client: Any) -> None:
        while self._permits and self._clock.monotonic() - self._permits[0][1] > UNUSED_S:
            try:
                token, _ = self._permits.popleft()
            except IndexError:
                return
            await self._ask(client, "release", token)

    async def end(self, client: Any) -> None:
        """Tell the rest and give back every permit, because this process no longer takes part."""
        self.wanted = False
        while self._permits:
            token, _ = self._permits.popleft()
            await self._ask(client, "release", token)
        await self.speak(client)

    def learn(self, state: str, era: str, wait_ms: int, forced: bool, before: int) -> None:
        """Take over what Redis says; ``before``: the breaker's era when it was asked."""
        fresh = era != self._era
        self._era = era
        self.up = True
        if fresh:
            self._permits.clear()
        self.breaker.adopt(CircuitState(state), wait_ms / 1000, forced=forced, fresh=fresh, era=before)

    def learn_nothing(self, before: int) -> None:
        """There is no state in Redis: nobody has ever opened the breaker, or long ago."""
        self.learn("closed", self._era, 0, False, before)

    def lost(self) -> None:
        """Redis does not answer: the breaker is on its own, and its permits may have expired when it is back."""
        self.up = False
        self._permits.clear()
