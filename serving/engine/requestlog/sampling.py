"""Which requests are logged: decided by a hash of the request's id, so that everybody who sees the same
request decides alike. Pure, with Python's library only: the engine's own interpreter imports it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_MOST_ID = 200
REQUEST_ID, TRACEPARENT = "x-request-id", "traceparent"


def identity(headers: Mapping[str, str]) -> tuple[str, str]:
    """Request id and trace id, each "" where the request has none; `headers` by lower-case name. A trace
    stands in for the id of a request that has none."""
    found = _TRACEPARENT.fullmatch(headers.get(TRACEPARENT, ""))
    trace = found[1] if found else ""
    return headers.get(REQUEST_ID, "")[:_MOST_ID] or trace, trace


def chosen(request_id: str, rate: float) -> bool:
    """Whether this request is in a sample of that part (0..1). A smaller sample lies in a larger one."""
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < rate * 2**64
