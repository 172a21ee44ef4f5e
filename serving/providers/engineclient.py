"""What a provider says to `glowplug engine`, and how it starts one: the arguments, /readyz, the limit.

Called by the fleet, its launchers and the kubernetes provider, from several threads; each call has a
connection of its own. A replica that does not answer is a value here (`Look`), not an error. An engine is
controlled through its unix socket on the same machine, elsewhere through its control port with a token.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from serving import errors, unixhttp
from serving.engine.state import Rations, Spent
from serving.replica import Vitals

_TIMEOUT_SECONDS = 2.0
_MAX_ANSWER_BYTES = 1 << 20
_SHOWN_REASON = 500
_MOST = 1e18


@dataclasses.dataclass(frozen=True, slots=True)
class Look:
    """What /readyz said. `answered`: whether anything came; `answered_at`: when last something did."""

    ready: bool
    answered: bool
    answered_at: float
    reason: str | None = None
    phases: Mapping[str, float] = dataclasses.field(default_factory=dict)
    vitals: Vitals | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Remote:
    """An engine's control port, and the token that it asks for."""

    address: tuple[str, int]
    token: str = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"


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
        said = _said(control)
        return Look(True, True, clock(), phases=phases(said), vitals=vitals(said, clock()))
    text = " ".join(body.decode("utf-8", "replace").split())
    return Look(False, True, clock(), f"/readyz: {response.status} {text}"[:_SHOWN_REASON])


def set_limit(control: Path | Remote, limit: int) -> None:
    """Change how many requests the replica admits at a time. UnavailableError if it cannot be told."""
    code, _ = _ask(control, "POST", "/limit", {"in_flight": limit})
    if code >= 300:
        raise errors.UnavailableError(f"{control}: POST /limit was answered with {code}")


def set_request_log(control: Path | Remote, wanted: Mapping[str, Any] | None) -> None:
    """Change which requests the replica logs, and where to. UnavailableError if it cannot be told."""
    code, answer = _ask(control, "POST", "/request-log", {"request_log": wanted})
    if code >= 300:
        raise errors.UnavailableError(f"{control}: POST /request-log: {code} {answer.get('error', '')}")


def ration(control: Path | Remote, rations: Rations) -> Mapping[str, Spent]:
    """Tell the replica what tenants may have of it; what they have had. UnavailableError."""
    document = {
        "tenants": {
            name: {
                "per_second": each.per_second,
                "measure": each.measure.name.lower(),
                "priority": each.priority,
            }
            for name, each in rations.tenants.items()
        },
        "output_tokens": rations.output_tokens,
        "coefficients": rations.coefficients and dataclasses.asdict(rations.coefficients),
    }
    code, answer = _ask(control, "POST", "/rations", document)
    if code >= 300:
        raise errors.UnavailableError(
            f"{control}: POST /rations was answered with {code}: {answer.get('error')}"
        )
    tenants = answer.get("tenants")
    return {
        name: found
        for name, each in (tenants.items() if isinstance(tenants, dict) else ())
        if (found := _spent(each)) is not None
    }


def _spent(said: Any) -> Spent | None:
    """None where it is no such thing. What was charged may be below 0 for a moment: it is settled later."""
    if not isinstance(said, dict):
        return None
    counts = [_number(said.get(name)) for name in ("admitted", "refused", "refused_cost")]
    charged = said.get("charged")
    if None in counts or not isinstance(charged, (int, float)) or not abs(charged) < _MOST:
        return None
    admitted, refused, refused_cost = (count or 0.0 for count in counts)
    return Spent(int(admitted), float(charged), int(refused), refused_cost)


def status(control: Path | Remote) -> dict[str, Any]:
    """What the replica says of itself. UnavailableError."""
    code, document = _ask(control, "GET", "/status", None)
    if code != 200:
        raise errors.UnavailableError(f"{control}: GET /status was answered with {code}")
    return document


def vitals(said: Mapping[str, Any], now: float) -> Vitals | None:
    """The numbers in a status; None where those of requests are not all there."""
    counters, used = said.get("counters"), said.get("usage")
    counters = counters if isinstance(counters, dict) else {}
    used = used if isinstance(used, dict) else {}
    names = ("finished", "rejected", "busy_nanoseconds")
    numbers = [_number(said.get("in_flight")), _number(said.get("waiting"))]
    numbers += [_number(counters.get(name)) for name in names]
    if None in numbers:
        return None
    in_flight, waiting, finished, rejected, busy = (number or 0.0 for number in numbers)
    memory, most = _number(used.get("memory_bytes")), _number(used.get("memory_limit_bytes"))
    parts = [memory / most] if memory is not None and most is not None and most >= 1 else []
    cache = _number(said.get("kv_cache"))  # what a model runs out of first is its memory
    parts += [cache] if cache else []
    return Vitals(
        now,
        int(in_flight),
        int(waiting),
        int(finished),
        int(rejected),
        busy / 1e9,
        cpus=_number(used.get("cpus")),
        cpu_seconds=_number(used.get("cpu_seconds")),
        memory=max(parts, default=None),
        gpu=_busy(used.get("gpus")),
        units_in_flight=_number(said.get("units_in_flight")) or 0.0,
    )


def _busy(said: Any) -> float | None:
    """A GPU's memory is not counted: engines and their allocators take it whole, and keep what they took."""
    busy = _number(said.get("busy")) if isinstance(said, dict) else None
    return busy if busy is not None and busy <= 1 else None


def _number(value: Any) -> float | None:
    """A number that can be one of these: finite, not negative."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value < _MOST else None


def _said(control: Path) -> Mapping[str, Any]:
    """The status; empty where the engine gives none."""
    try:
        return status(control)
    except errors.UnavailableError:
        return {}


def phases(said: Mapping[str, Any]) -> Mapping[str, float]:
    """The parts of the start in a status, in seconds."""
    found = said.get("phases")
    if not isinstance(found, dict):
        return {}
    return {str(name): float(took) for name, took in found.items() if isinstance(took, (int, float))}


def _ask(control: Path | Remote, method: str, path: str, body: Any) -> tuple[int, dict[str, Any]]:
    data = None if body is None else json.dumps(body).encode()
    try:
        if isinstance(control, Remote):
            code, answer = _ask_remote(control, method, path, data)
        else:
            code, answer = unixhttp.ask(control, method, path, data, timeout_seconds=_TIMEOUT_SECONDS)
        document = json.loads(answer or b"{}")
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise errors.UnavailableError(f"{control}: {method} {path}: {exc or type(exc).__name__}") from exc
    return code, document if isinstance(document, dict) else {}


def _ask_remote(control: Remote, method: str, path: str, data: bytes | None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection(*control.address, timeout=_TIMEOUT_SECONDS)
    try:
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {control.token}"}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.read(_MAX_ANSWER_BYTES)
    finally:
        connection.close()
