"""One rate, several places where it is spent: who gets how much of it. Pure.

`shares` divides tenants' tokens among replicas by it, `router.tenants` their requests among Envoys: a tenth
of the rate is shared out evenly, so that whoever gets the next request has something; the rest goes by
demand. What a holder has that cannot be reached is not given out again.
"""

from __future__ import annotations

from collections.abc import Mapping

EVEN = 0.1
"""Of a rate, to all alike."""
_LEAST = 1e-9
"""Of a rate: what is left where others keep all of it, since no share may be nothing."""


def divide(
    total: float, demand: Mapping[str, float], kept: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The share of each holder in `demand`, above 0. `kept` is what others have and do not give back."""
    left = max(total - sum((kept or {}).values()), _LEAST * total)
    asked = sum(demand.values())
    even = left * (EVEN if asked > 0 else 1.0) / max(1, len(demand))
    return {
        holder: even + (left * (1.0 - EVEN) * (each / asked) if asked > 0 else 0.0)
        for holder, each in demand.items()
    }
