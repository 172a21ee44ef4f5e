"""Who may ask for a page that has no authentication, and what a browser is told of it.

A browser lets a page of somebody else's read ours once a name of theirs leads to this host. So only those
are answered who ask for this host by an address, which cannot be renamed, or by a name of its own.
"""

from __future__ import annotations

import ipaddress
import socket
import urllib.parse
from collections.abc import Collection, Iterable

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
}
REFUSAL = "this is not the host that was asked for: use its address or its name"


def own_names(more: Iterable[str] = ()) -> frozenset[str]:
    """The names of this host, in lower case."""
    return frozenset(name.lower() for name in ("localhost", socket.gethostname(), *more))


def is_this_host(header: str, names: Collection[str]) -> bool:
    """Whether a Host header is an address, or one of these names."""
    try:
        host = urllib.parse.urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return False
    if host in names:
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
