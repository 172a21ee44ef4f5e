"""One logged request, and the words between recorders and the writer. Pure, with Python's library only.

A connection carries frames both ways: kind (1 byte), length (4, big-endian), payload.

    R  to the writer: a record: lengths of facts and request body (4 bytes each), facts (JSON), both bodies
    D  to the writer: how many records were dropped since the last word of it (8 bytes)
    S  from the writer: what to sample (JSON), at once and after each change
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Iterator, Mapping
from typing import Any

MOST_FRAME_BYTES = 40 << 20
"""Two bodies of the most that settings allow, and their facts."""
_HEAD = struct.Struct("!cI")
_LENGTHS = struct.Struct("!II")
_COUNT = struct.Struct("!Q")
RECORD, DROPPED, SAMPLING = b"R", b"D", b"S"


class FrameError(ValueError):
    """What came is no frame of ours."""


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    """`began_at` is Unix seconds; `status` is None where nothing was answered. `request_bytes` and
    `response_bytes` are the whole bodies', of which the kept ones may be the beginning. `outcome`: `whole`,
    `client_gone`, `failed` (the engine broke off)."""

    request_id: str
    trace_id: str
    began_at: float
    method: str
    path: str
    status: int | None
    outcome: str
    queued_seconds: float
    first_byte_seconds: float | None
    seconds: float
    headers: Mapping[str, str]
    response_type: str
    request_bytes: int
    response_bytes: int
    request_body: bytes
    response_body: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """What a recorder is to keep."""

    rate: float
    body_bytes: int
    headers: tuple[str, ...]


def frame(kind: bytes, payload: bytes) -> bytes:
    """As it stands on the connection."""
    return _HEAD.pack(kind, len(payload)) + payload


def encode(record: Record) -> bytes:
    """The frame of a record."""
    facts = {name: getattr(record, name) for name in _FACTS}
    text = json.dumps(facts, separators=(",", ":")).encode()
    lengths = _LENGTHS.pack(len(text), len(record.request_body))
    return frame(RECORD, b"".join((lengths, text, record.request_body, record.response_body)))


def decode(payload: bytes) -> Record:
    """What `encode` put into a frame. FrameError."""
    try:
        facts_bytes, request_bytes = _LENGTHS.unpack_from(payload)
        body = _LENGTHS.size + facts_bytes
        if body + request_bytes > len(payload):
            raise FrameError("a record is shorter than it says")
        facts: Any = json.loads(payload[_LENGTHS.size : body])
        if not isinstance(facts, dict) or not isinstance(facts.get("headers"), dict):
            raise FrameError("a record's facts are no mapping")
        return Record(
            **facts,
            request_body=payload[body : body + request_bytes],
            response_body=payload[body + request_bytes :],
        )
    except (struct.error, ValueError, TypeError, RecursionError) as exc:
        raise FrameError(f"a record cannot be read: {exc}") from exc


def dropped(count: int) -> bytes:
    """The frame that says so."""
    return frame(DROPPED, _COUNT.pack(count))


def read_dropped(payload: bytes) -> int:
    """FrameError."""
    if len(payload) != _COUNT.size:
        raise FrameError("a count has eight bytes")
    return int(_COUNT.unpack(payload)[0])


def sampling(wanted: Sampling) -> bytes:
    """The frame that says what to sample."""
    return frame(SAMPLING, json.dumps(dataclasses.asdict(wanted)).encode())


def read_sampling(payload: bytes) -> Sampling:
    """FrameError."""
    try:
        document = json.loads(payload)
        return Sampling(
            float(document["rate"]), int(document["body_bytes"]), tuple(map(str, document["headers"]))
        )
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise FrameError(f"settings cannot be read: {exc}") from exc


class Frames:
    """Cuts what comes on a connection into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        """Kind and payload of each frame that is whole. FrameError."""
        self._buffer += data
        while len(self._buffer) >= _HEAD.size:
            kind, length = _HEAD.unpack_from(self._buffer)
            if kind not in (RECORD, DROPPED, SAMPLING) or length > MOST_FRAME_BYTES:
                raise FrameError(f"no frame begins with {kind!r} and {length} bytes")
            end = _HEAD.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(self._buffer[_HEAD.size : end])
            del self._buffer[:end]
            yield kind, payload


_FACTS = tuple(
    each.name for each in dataclasses.fields(Record) if each.name not in ("request_body", "response_body")
)
