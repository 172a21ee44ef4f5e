"""How long a node class, or the whole provider, is left alone after an error. Pure.

Called by the controller. Waits double with each failure in a row, with jitter (the caller draws it), and
never end before the other side said that they may. One success ends it. A state is kept over a restart, so
that a controller that crashes and comes back does not hammer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from warmpool import errors
from warmpool.settings import Backoff

PROVIDER = ""
"""The key of the provider as a whole."""


@dataclasses.dataclass(frozen=True, slots=True)
class Wait:
    """`failures` in a row; left alone until `until`, because of `reason`."""

    failures: int
    until: float
    reason: str


Waits = Mapping[str, Wait]
"""By node class, and `PROVIDER`."""


def failed(
    waits: Waits,
    key: str,
    settings: Backoff,
    now: float,
    reason: str,
    draw: float,
    least_seconds: float = 0.0,
) -> Waits:
    """After one failure more. `draw` is even in [0, 1)."""
    old = waits.get(key)
    failures = 1 if old is None else min(old.failures + 1, 30)
    nominal = min(settings.most_seconds, settings.first_seconds * 2.0 ** (failures - 1))
    pause = max(least_seconds, nominal * (0.75 + 0.5 * draw))
    return {**waits, key: Wait(failures, now + pause, reason)}


def succeeded(waits: Waits, key: str) -> Waits:
    """After it worked."""
    return {name: each for name, each in waits.items() if name != key} if key in waits else waits


def blocking(waits: Waits, node_class: str, now: float) -> Wait | None:
    """What holds a class up now: its own wait or the provider's, whichever is longer."""
    found = [
        each for key in (node_class, PROVIDER) if (each := waits.get(key)) is not None and each.until > now
    ]
    return max(found, key=lambda each: each.until, default=None)


def to_json(waits: Waits) -> dict[str, Any]:
    return {key: dataclasses.asdict(each) for key, each in waits.items()}


def from_json(document: Mapping[str, Any]) -> Waits:
    """Inverse of `to_json`. InvalidInputError."""
    try:
        return {
            str(key): Wait(int(each["failures"]), float(each["until"]), str(each["reason"]))
            for key, each in document.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as exc:
        raise errors.InvalidInputError(f"the pool's saved state is not one of this version: {exc!r}") from exc
