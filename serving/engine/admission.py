"""What the engine's front says: which requests count, and how it answers without asking the engine.

Pure. Used by `gate` (in vLLM's server processes) and `proxy` (in the supervisor), so that both kinds of
engine behave alike on the wire. 429 is overload, and always has Retry-After; 503 is an engine that does not
serve at all (starting, failed, hung, leaving), and is never said because of load.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Collection
from typing import Any

from serving import errors
from serving.autoscaler import units
from serving.engine.state import Limits, Measure, Ration, Rations, State

LIVE, READY, STARTED, METRICS = "/livez", "/readyz", "/startupz", "/metrics"
PROBES = frozenset({LIVE, READY, STARTED})

_UNCOUNTED = frozenset({METRICS, "/health", "/ping", "/version", "/v1/models", "/load"})
"""Paths of engines that cost nothing and are asked for by monitors: a full engine still answers them."""

_MOST_RETRY_SECONDS = 60
_MOST = 100_000
_MOST_RATE = 1e15


def counts(path: str) -> bool:
    """Whether a request to `path` takes a place in flight."""
    return path not in _UNCOUNTED


def probe(path: str, state: State) -> tuple[int, bytes]:
    """Status and JSON body for one of PROBES.

    Alive is everything that the supervisor deals with by itself, a respawn too: a kubelet that killed the
    container for it would only lose the caches. Hung is not, in case even the supervisor cannot mend it.
    """
    good = {
        LIVE: state is not State.HUNG,
        READY: state is State.READY,
        STARTED: state in (State.READY, State.DRAINING),
    }[path]
    return (200 if good else 503), json.dumps({"state": state.name.lower()}).encode()


def retry_after_seconds(ahead: int, limit: int, mean_seconds: float) -> int:
    """How long until a place is likely free: those ahead, by `limit` at a time, each as long as is usual."""
    return max(1, min(_MOST_RETRY_SECONDS, math.ceil(ahead * mean_seconds / max(1, limit))))


def refusal(status: int, message: str, kind: str, **more: str) -> bytes:
    """A body that clients of the OpenAI API understand."""
    error = {"message": message, "type": kind, "param": None, "code": status, **more}
    return json.dumps({"error": error}).encode()


def overload(limit: str, message: str) -> bytes:
    """The body of a 429; `limit` names what is used up."""
    return refusal(429, f"{message}.", "rate_limit_exceeded", limit=limit)


def limits(document: Any, now: Limits) -> Limits:
    """What the body of `POST /limit` asks for; keys that it leaves out stay. DocumentError."""
    if not isinstance(document, dict):
        raise errors.DocumentError(f"a limit is written {json.dumps({'in_flight': now.in_flight})}")
    fields: dict[str, Callable[[Any], bool]] = {
        "in_flight": lambda v: isinstance(v, int) and 1 <= v <= _MOST,
        "queue_requests": lambda v: isinstance(v, int) and 0 <= v <= _MOST,
        "queue_seconds": lambda v: isinstance(v, (int, float)) and 0 < v <= 86_400,
    }
    for key, value in document.items():
        if key not in fields:
            raise errors.DocumentError(f"{key}: unknown key; known here: {', '.join(fields)}")
        if isinstance(value, bool) or not fields[key](value):
            raise errors.DocumentError(f"{key}: {value!r} is out of range")
    return dataclasses.replace(now, **document)


def rations(document: Any) -> Rations:
    """What the body of `POST /rations` asks for, all of it: `{"tenants": {NAME: {"per_second", "measure",
    "priority"}}, "output_tokens", "coefficients": {"request", "input", "output", "cached"}}`.
    DocumentError."""
    given = _mapping("rations", document, ("tenants", "output_tokens", "coefficients"))
    tenants = {
        name: _ration(name, each) for name, each in _mapping("tenants", given.get("tenants") or {}).items()
    }
    most = given.get("output_tokens")
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or not 1 <= most < 1 << 40):
        raise errors.DocumentError(f"output_tokens: {most!r} is out of range")
    by = given.get("coefficients")
    if by is not None:
        names = tuple(field.name for field in dataclasses.fields(units.Coefficients))
        numbers = _mapping("coefficients", by, names)
        by = units.Coefficients(**{name: _real(f"coefficients.{name}", numbers.get(name)) for name in names})
    return Rations(tenants, most, by)


def _ration(name: str, document: Any) -> Ration:
    given = _mapping(f"tenants.{name}", document, ("per_second", "measure", "priority"))
    rate, measure, priority = (
        given.get("per_second"),
        given.get("measure", "tokens"),
        given.get("priority", 0),
    )
    if measure not in ("tokens", "units"):
        raise errors.DocumentError(f"tenants.{name}.measure: {measure!r}: write tokens or units")
    if isinstance(priority, bool) or not isinstance(priority, int) or abs(priority) > 1 << 31:
        raise errors.DocumentError(f"tenants.{name}.priority: {priority!r} is out of range")
    if rate is not None and not _real(f"tenants.{name}.per_second", rate) > 0:
        raise errors.DocumentError(f"tenants.{name}.per_second: {rate!r} must be above 0, or null")
    return Ration(None if rate is None else float(rate), Measure[measure.upper()], priority)


def _mapping(where: str, document: Any, known: Collection[str] | None = None) -> dict[str, Any]:
    if not isinstance(document, dict):
        raise errors.DocumentError(f"{where}: a mapping is needed")
    for key in document:
        if known is not None and key not in known:
            raise errors.DocumentError(f"{where}.{key}: unknown key; known here: {', '.join(known)}")
    return document


def _real(where: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= _MOST_RATE:
        raise errors.DocumentError(f"{where}: {value!r} is out of range")
    return float(value)
