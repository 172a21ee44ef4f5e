"""What the engine's front says: which requests count, and how it answers without asking the engine.

Pure. Used by `gate` (in vLLM's server processes) and `proxy` (in the supervisor), so that both kinds of
engine behave alike on the wire. 429 is overload, and always has Retry-After; 503 is an engine that does not
serve at all (starting, failed, hung, leaving), and is never said because of load.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

from serving import errors
from serving.engine.state import Limits, State

LIVE, READY, STARTED, METRICS = "/livez", "/readyz", "/startupz", "/metrics"
PROBES = frozenset({LIVE, READY, STARTED})

_UNCOUNTED = frozenset({METRICS, "/health", "/ping", "/version", "/v1/models", "/load"})
"""Paths of engines that cost nothing and are asked for by monitors: a full engine still answers them."""

_MOST_RETRY_SECONDS = 60
_MOST = 100_000


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


def refusal(status: int, message: str, kind: str) -> bytes:
    """A body that clients of the OpenAI API understand."""
    return json.dumps({"error": {"message": message, "type": kind, "param": None, "code": status}}).encode()


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
