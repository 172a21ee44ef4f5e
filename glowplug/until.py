"""When a start is over.

Apart from `readiness`, which waits for it and brings an HTTP client: commands that wait for nothing have the
options that say it, too.
"""

from __future__ import annotations

import dataclasses
import re

from imagefs import errors


@dataclasses.dataclass(frozen=True, slots=True)
class Until:
    """When a start is over: at most one of the first three is given, none means the command's end. `address`
    is a URL, which must answer with 2xx, or [HOST]:PORT, which must take a connection; it is asked in the
    network namespace of the file `network`, or in ours."""

    log: re.Pattern[bytes] | None = None
    address: str | None = None
    seconds: float | None = None
    network: str | None = None

    def __str__(self) -> str:
        if self.log is not None:
            return f"it printed {self.log.pattern.decode(errors='replace')!r}"
        return f"{self.address} answered" if self.address else "its end"


def check_address(address: str) -> str:
    """The address as it came. Raises InvalidInputError unless it is one."""
    if not address.startswith(("http://", "https://")):
        _, colon, port = address.rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
            raise errors.InvalidInputError(f"{address!r} is neither a URL nor [HOST]:PORT")
    return address
