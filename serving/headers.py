"""Which header fields a proxy passes on (RFC 9110, 7.6.1). Pure.

Used by the two places where requests go through a process of ours: the activator, and the engine's proxy.
"""

from __future__ import annotations

from collections.abc import Collection

import multidict

_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    )
)


def end_to_end(
    headers: multidict.CIMultiDictProxy[str] | multidict.CIMultiDict[str], without: Collection[str] = ()
) -> multidict.CIMultiDict[str]:
    """The fields that are meant for the other end: not those between neighbours, not those that Connection
    names, and not `without` (in lower case)."""
    named = {each.strip().lower() for value in headers.getall("Connection", ()) for each in value.split(",")}
    dropped = _HOP_BY_HOP | named | set(without)
    return multidict.CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in dropped
    )
