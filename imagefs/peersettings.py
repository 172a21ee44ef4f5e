"""What the device server is told about peers: who they are, and how to reach them.

Pure. Made by the agent, which knows the cluster; sent to the device server as JSON (control operation
"peers"), which keeps it in memory only. Secrets are named by file, never carried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagefs import errors

MAX_MEMBERS = 10_000


@dataclasses.dataclass(frozen=True, slots=True)
class PeerSettings:
    """`members` are "host:port" of every agent, `address` is this node's own among them. `token_file` holds
    the cluster's secret in its first line; the `tls_` files are for mTLS. `stamp` changes whenever what one
    of those files holds does. A demand that a peer has not answered after `hedge_seconds` goes to the origin
    as well; a peer that failed is left alone for `down_seconds`."""

    address: str
    members: tuple[str, ...]
    token_file: Path | None = None
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    tls_ca: Path | None = None
    stamp: str = ""
    connect_timeout_seconds: float = 0.5
    down_seconds: float = 10.0
    hedge_seconds: float = 1.0

    def to_json(self) -> dict[str, Any]:
        """A JSON object; `from_json` gives this value back."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        values["members"] = list(self.members)
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> PeerSettings:
        """The value that `to_json` wrote. InvalidInputError names the field that is wrong."""
        values: dict[str, Any] = {}
        for name, value in document.items():
            kinds = _KINDS.get(name, ())
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise errors.InvalidInputError(f"peers: {name}: {value!r} is not understood")
            values[name] = Path(value) if name in _PATHS and isinstance(value, str) else value
        members = values.get("members")
        if not isinstance(values.get("address"), str) or members is None:
            raise errors.InvalidInputError("peers: address or members missing")
        if len(members) > MAX_MEMBERS:
            raise errors.InvalidInputError(f"peers: {len(members)} members, over {MAX_MEMBERS}")
        for member in members:
            if not isinstance(member, str):
                raise errors.InvalidInputError(f"peers: member {member!r} is not HOST:PORT")
            split_address(member)
        values["members"] = tuple(members)
        return cls(**values)


_PATHS = ("token_file", "tls_certificate", "tls_key", "tls_ca")
_KINDS: dict[str, tuple[type, ...]] = {
    "address": (str,),
    "members": (list,),
    **{name: (str, type(None)) for name in _PATHS},
    "stamp": (str,),
    "connect_timeout_seconds": (int, float),
    "down_seconds": (int, float),
    "hedge_seconds": (int, float),
}


def split_address(address: str) -> tuple[str, int]:
    """Host (without the brackets of an IPv6 address) and port of "HOST:PORT". Raises InvalidInputError."""
    host, separator, port = address.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not separator or not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
        raise errors.InvalidInputError(f"{address!r} is not HOST:PORT")
    return host, int(port)
