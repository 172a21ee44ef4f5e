"""What a request pays: the one implementation for both kinds of engine, between their fronts and the budget.

`gate` (in vLLM's server processes) and `proxy` (in the supervisor) hand a request's body to `Toll.enter`,
which reads it, clamps what it asks for and charges what it is expected to cost; the `Passage` that it gives
is fed the answer, and settles at the end by the engine's own usage. While it lasts its units are in flight.

The tenant is what the router says (`service.TENANT_HEADER`), which takes a client's own away: an engine with
limits must be reached through the router only. Runs on the event loop of the process that serves; needs
nothing but Python's library.
"""

from __future__ import annotations

import math
import time

from serving.autoscaler import units
from serving.engine import budget as budgets
from serving.engine import tokens
from serving.engine.ledger import Ledger
from serving.engine.state import Measure

_STEP_TOKENS = 64
"""A stream that goes on past what was expected is charged in steps of so many."""
_MOST_RETRY_SECONDS = 3_600


class RefusedError(Exception):
    """The tenant has used up what it may have for now."""

    def __init__(self, tenant: str, refusal: budgets.Refusal) -> None:
        self.limit = f"{refusal.measure.name.lower()}_per_second"
        self.retry_after_seconds = max(1, min(_MOST_RETRY_SECONDS, math.ceil(refusal.retry_after_seconds)))
        super().__init__(
            f"{tenant} is at its limit ({self.limit}, {refusal.per_second:g} at this replica); "
            f"retry after {self.retry_after_seconds} s"
        )


class Toll:
    """One per server process. `slot` is its place in the ledger."""

    def __init__(self, budget: budgets.Budget, ledger: Ledger, slot: int) -> None:
        self._budget, self._ledger, self._slot = budget, ledger, slot

    @property
    def in_use(self) -> bool:
        """Whether anything is limited or counted."""
        return self._budget.in_use

    def enter(self, tenant: str | None, path: str, body: bytes, *, clamps: bool) -> Passage:
        """Charge a request. `clamps`: whether its fields mean what vLLM means by them. RefusedError."""
        budget = self._budget
        place = budget.place(tenant)
        measured = budget.in_use
        if measured or (clamps and tokens.names_priority(body)):
            terms = budget.terms(place) if clamps else tokens.Terms()
            reading = tokens.read(path, body, terms, measure=measured)
        else:
            reading = tokens.Reading(body, 0, 0, None)
        by = budget.coefficients
        counted = by if budget.measure(place) is Measure.UNITS and by else units.TOKENS
        passage = Passage(reading, measured, place, counted, by, self)
        if measured:
            refusal = budget.admit(place, passage.charged, time.monotonic_ns())
            if refusal is not None:
                raise RefusedError(tenant or "everybody", refusal)
            self._ledger.add_units(self._slot, passage.units)
        return passage

    def expected(self, place: int, reading: tokens.Reading) -> tokens.Usage:
        """What a request will have used, as far as one can know."""
        return self._budget.expected(place, reading)

    def tokens_in(self, bytes_: int) -> int:
        """As many as there may be in a text."""
        return round(bytes_ / self._budget.bytes_per_token)

    def more(self, place: int, cost: float) -> None:
        """Charge that much on top."""
        self._budget.settle(place, cost, time.monotonic_ns())

    def leave(
        self, place: int, reading: tokens.Reading, said: tokens.Usage | None, expected: float, done: float
    ) -> None:
        """A request has ended: `said` is the engine's usage, the rest in units."""
        if said is not None:
            self._budget.learn(place, reading, said)
        self._ledger.remove_units(self._slot, expected, done)


class Passage:
    """One request. `body` is what the engine is to get. Where it is `measured`: `answer` when its answer
    begins, `feed` its pieces, `end` after the last one. `turned_away` where the engine never got it; `close`
    in any case."""

    def __init__(
        self,
        reading: tokens.Reading,
        measured: bool,
        place: int,
        counted: units.Coefficients,
        by: units.Coefficients | None,
        toll: Toll,
    ) -> None:
        self.body = reading.body
        self.measured = measured
        self._reading, self._place = reading, place
        self._counted, self._by, self._toll = counted, by, toll
        self._expected = toll.expected(place, reading) if measured else tokens.Usage(0, 0)
        self.charged = self._cost(self._expected)
        self.units = _cost(by, self._expected) if by else 0.0
        self._output_charged = self._expected.output
        self._meter: tokens.Meter | None = None
        self._free = self._closed = False

    @property
    def alters(self) -> bool:
        """Whether the answer that is passed on may be shorter than the engine's."""
        return self._reading.usage_added

    def turned_away(self) -> None:
        """The engine did not get it."""
        self._free = True

    def answer(self, status: int, content_type: str) -> None:
        """The answer begins. One that is no success costs nothing."""
        self._free = status >= 400
        if self.measured and not self._free:
            self._meter = tokens.Meter(content_type, usage_added=self._reading.usage_added)

    def feed(self, piece: bytes) -> bytes:
        """What is to be passed on of a piece of the answer."""
        if self._meter is None:
            return piece
        passed = self._meter.feed(piece)
        if self._meter.events >= self._output_charged + _STEP_TOKENS:
            more = self._meter.events - self._output_charged
            self._output_charged += more
            self._charge(self._counted.output * more)
        return passed

    def end(self) -> bytes:
        """What is left to be passed on."""
        return b"" if self._meter is None else self._meter.end()

    def close(self) -> None:
        """Settle, once. A client that went away pays for what it got, or, before it got anything, what was
        expected: the engine has worked."""
        if not self.measured or self._closed:
            return
        self._closed = True
        said, done = None, self.units
        if self._free:
            done = 0.0
            self._charge(-self.charged)
        elif self._meter is not None:
            said = self._meter.usage
            made = self._meter.events or self._toll.tokens_in(self._meter.bytes)
            used = said or tokens.Usage(self._expected.input, made, self._expected.cached)
            done = _cost(self._by, used) if self._by else 0.0
            self._charge(self._cost(used) - self.charged)
        self._toll.leave(self._place, self._reading, said, self.units, done)

    def _charge(self, more: float) -> None:
        self.charged += more
        self._toll.more(self._place, more)

    def _cost(self, used: tokens.Usage) -> float:
        return _cost(self._counted, used)


def _cost(by: units.Coefficients, used: tokens.Usage) -> float:
    return units.cost(by, used.input, used.output, used.cached)
