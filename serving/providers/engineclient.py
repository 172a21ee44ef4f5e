"""What a provider says to `glowplug engine`, and how it starts one: the arguments, /readyz, the limit.

Called by the fleet and its launchers, from several threads; each call has a connection of its own. A replica
that does not answer is a value here (`Look`), not an error.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serving import errors, unixhttp

_TIMEOUT_SECONDS = 2.0
_MAX_ANSWER_BYTES = 1 << 20
_SHOWN_REASON = 500


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What /readyz said. `answered`: whether anything came; `answered_at`: when last something did."""

    ready: bool
    answered: bool
    answered_at: float
    reason: str | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)


def look(address: tuple[str, int], control: Path, answered_at: float, clock: Callable[[], float]) -> Look:
    """Ask one replica. `answered_at` is what the last look said, for one that does not answer now."""
    connection = http.client.HTTPConnection(*address, timeout=_TIMEOUT_SECONDS)
    try:
        connection.request("GET", "/readyz")
        response = connection.getresponse()
        body = response.read(_MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException) as exc:
        return Look(False, False, answered_at, f"/readyz: {exc or type(exc).__name__}")
    finally:
        connection.close()
    if response.status == 200:
        return Look(True, True, clock(), phases=_phases(control))
    text = " ".join(body.decode("utf-8", "replace").split())
    return Look(False, True, clock(), f"/readyz: {response.status} {text}"[:_SHOWN_REASON])


def set_limit(control: Path, limit: int) -> None:
    """Change how many requests the replica admits at a time. UnavailableError if it cannot be told."""
    code, _ = _ask(control, "POST", "/limit", {"in_flight": limit})
    if code >= 300:
        raise errors.UnavailableError(f"{control}: POST /limit was answered with {code}")


def status(control: Path) -> dict[str, Any]:
    """What the replica says of itself. UnavailableError."""
    code, document = _ask(control, "GET", "/status", None)
    if code != 200:
        raise errors.UnavailableError(f"{control}: GET /status was answered with {code}")
    return document


def _phases(control: Path) -> Mapping[str, float]:
    """The parts of the start, in seconds; empty where the engine does not say."""
    try:
        phases = status(control).get("phases")
    except errors.UnavailableError:
        return {}
    if not isinstance(phases, dict):
        return {}
    return {str(name): float(took) for name, took in phases.items() if isinstance(took, (int, float))}


def _ask(control: Path, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    try:
        code, answer = unixhttp.ask(control, method, path, data, timeout_seconds=_TIMEOUT_SECONDS)
        document = json.loads(answer or b"{}")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise errors.UnavailableError(f"{control}: {method} {path}: {exc or type(exc).__name__}") from exc
    return code, document if isinstance(document, dict) else {}
