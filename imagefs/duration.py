"""Durations as Go programs write them in their configuration: "300ms", "1h30m", "10s". Pure.

Used for what containerd and kubelet configure (hosts.toml, credential providers).
"""

from __future__ import annotations

import re

from imagefs import errors

_UNIT_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
_PART = re.compile(r"(\d{1,18}(?:\.\d{0,18})?|\.\d{1,18})(ns|us|µs|μs|ms|s|m|h)", re.ASCII)
_MAX_CHARS = 64


def parse(text: object, where: str) -> float:
    """Seconds, 0 or more. InvalidInputError naming `where`."""
    if text == "0":
        return 0.0
    if isinstance(text, str) and 0 < len(text) <= _MAX_CHARS:
        seconds, position = 0.0, 0
        while match := _PART.match(text, position):
            seconds += float(match[1]) * _UNIT_SECONDS[match[2]]
            position = match.end()
        if position == len(text):
            return seconds
    raise errors.InvalidInputError(f'{where} is not a duration like "30s" or "1h30m"')
