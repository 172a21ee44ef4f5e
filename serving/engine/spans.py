"""Spans of requests: the caller's context in, OTLP's JSON form out. Pure.

Used by `tracing`. Specs: W3C Trace Context (traceparent, version 00; later versions are read as it), OTLP 1
(JSON: ids in hex, times as decimal strings of nanoseconds).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SERVER, _ERROR = 2, 2
"""OTLP's numbers for a span's kind, and for a status."""


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """Where a request is in its trace."""

    trace_id: str
    span_id: str
    sampled: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """One request, as the engine's front saw it. Times are Unix nanoseconds."""

    context: Context
    parent_span_id: str
    method: str
    path: str
    status: int
    began_ns: int
    ended_ns: int


def read(traceparent: str) -> Context | None:
    """None where it is not one: a trace that is broken is begun anew by nobody here."""
    found = _TRACEPARENT.fullmatch(traceparent)
    if found is None or not int(found[1], 16) or not int(found[2], 16):
        return None
    return Context(found[1], found[2], bool(int(found[3], 16) & 1))


def write(context: Context) -> str:
    """The header for the next hop."""
    return f"00-{context.trace_id}-{context.span_id}-{int(context.sampled):02x}"


def document(spans: Sequence[Span], service: str, instance: str) -> bytes:
    """The body of a POST to a collector."""
    resource = [_text("service.name", service), _text("service.instance.id", instance)]
    scope = {"scope": {"name": "glowplug.engine"}, "spans": [_span(each) for each in spans]}
    return json.dumps(
        {"resourceSpans": [{"resource": {"attributes": resource}, "scopeSpans": [scope]}]}
    ).encode()


def _span(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {
        "traceId": span.context.trace_id,
        "spanId": span.context.span_id,
        "parentSpanId": span.parent_span_id,
        "name": f"{span.method} {span.path}",
        "kind": _SERVER,
        "startTimeUnixNano": str(span.began_ns),
        "endTimeUnixNano": str(span.ended_ns),
        "attributes": [
            _text("http.request.method", span.method),
            _text("url.path", span.path),
            {"key": "http.response.status_code", "value": {"intValue": str(span.status)}},
        ],
    }
    if span.status >= 500:
        found["status"] = {"code": _ERROR}
    return found


def _text(key: str, value: str) -> dict[str, Any]:
    return {"key": key, "value": {"stringValue": value}}
