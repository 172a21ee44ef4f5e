"""Records as columns: the schema of the files, and what is read out of bodies for them.

Used by `files`, in the writer process. The schema is documented in docs/engine.md; a change of it that
readers would notice changes `VERSION`, which stands in each file's metadata.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from serving.engine.requestlog.record import Record

VERSION = 1
_MOST_PARSED_BYTES = 1 << 20
"""A larger body's tokens are not looked for."""

SCHEMA = pa.schema(
    [
        pa.field("time", pa.timestamp("us", tz="UTC"), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("trace_id", pa.string()),
        pa.field("instance", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("status", pa.int16()),
        pa.field("outcome", pa.string(), nullable=False),
        pa.field("queued_seconds", pa.float64(), nullable=False),
        pa.field("first_byte_seconds", pa.float64()),
        pa.field("seconds", pa.float64(), nullable=False),
        pa.field("headers", pa.map_(pa.string(), pa.string()), nullable=False),
        pa.field("response_type", pa.string(), nullable=False),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("request_bytes", pa.int64(), nullable=False),
        pa.field("response_bytes", pa.int64(), nullable=False),
        pa.field("request_body", pa.binary(), nullable=False),
        pa.field("response_body", pa.binary(), nullable=False),
    ],
    metadata={"glowplug.request_log": str(VERSION)},
)


def batch(records: Sequence[Record], instance: str) -> pa.RecordBatch:
    """Rows of the schema."""
    rows = [_row(each, instance) for each in records]
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(columns, schema=SCHEMA)


def _row(record: Record, instance: str) -> dict[str, Any]:
    prompt, output = tokens(record)
    return {
        "time": round(record.began_at * 1e6),
        "request_id": _text(record.request_id),
        "trace_id": record.trace_id or None,
        "instance": instance,
        "method": _text(record.method),
        "path": _text(record.path),
        "status": record.status,
        "outcome": record.outcome,
        "queued_seconds": record.queued_seconds,
        "first_byte_seconds": record.first_byte_seconds,
        "seconds": record.seconds,
        "headers": [(name, _text(value)) for name, value in record.headers.items()],
        "response_type": _text(record.response_type),
        "prompt_tokens": prompt,
        "output_tokens": output,
        "request_bytes": record.request_bytes,
        "response_bytes": record.response_bytes,
        "request_body": record.request_body,
        "response_body": record.response_body,
    }


def tokens(record: Record) -> tuple[int | None, int | None]:
    """Prompt and output tokens, where the engine says them (`usage`, in a JSON answer or in the last events
    of a stream) in what was kept of the answer."""
    body = record.response_body
    if len(body) > _MOST_PARSED_BYTES:
        return None, None
    if record.response_type.startswith("text/event-stream"):
        texts = [line[5:] for line in body.split(b"\n") if line.startswith(b"data:") and b'"usage"' in line]
    else:
        texts = [body] if len(body) == record.response_bytes else []
    for text in reversed(texts):
        try:
            document = json.loads(text)
        except (ValueError, RecursionError):
            continue
        usage = document.get("usage") if isinstance(document, dict) else None
        if isinstance(usage, dict):
            return _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return None, None


def _count(value: Any) -> int | None:
    good = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
    return value if good else None


def _text(value: str) -> str:
    """What a client wrote may be no UTF-8."""
    return value.encode("utf-8", "replace").decode()
