"""Model units: what a request costs a replica, in seconds of the whole replica. Pure.

    cost = request + input * (input tokens not cached) + cached * (those cached) + output * (output tokens)

A replica that is asked for one unit a second is full; so the sum of the costs that arrive in a second is how
many full replicas they need, whatever the mix of long and short requests. The coefficients belong to one
model on one kind of machine: `glowplug engine calibrate` measures them (`serving.autoscaler.unitfit`).

Used by `serving.engine.toll` in the engine's own interpreter, so Python's library is all that it needs.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class Coefficients:
    """Seconds of a replica: for a request as such, and for each token of each kind."""

    request: float
    input: float
    output: float
    cached: float = 0.0


def weight(in_flight_units: float, in_flight_requests: float, reference_units: float) -> float:
    """How many requests of the reference cost one request in flight stands for, on average. A count of
    requests times this is load in units, said in requests of that cost; so whatever is reckoned in requests,
    a target for each replica above all, holds for it as it is."""
    return in_flight_units / in_flight_requests / reference_units


TOKENS = Coefficients(request=0.0, input=1.0, output=1.0, cached=1.0)
"""Not seconds but plain tokens: what limits in tokens count."""


def cost(by: Coefficients, input_tokens: float, output_tokens: float, cached_tokens: float = 0.0) -> float:
    """Of one request; `cached_tokens` are a part of `input_tokens`."""
    uncached = max(0.0, input_tokens - cached_tokens)
    return by.request + by.input * uncached + by.cached * cached_tokens + by.output * output_tokens
