"""Sizes as people write them: a number of bytes with K, M, G or T, as in 64K, 4MiB, 20G. Pure.

Called by the command's options and by the agent's settings, so that both take the same.
"""

from __future__ import annotations

import re

_SIZE = re.compile(r"([0-9]+)\s*([KMGT]?)(?:i?B)?\Z", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def parse(text: str) -> int | None:
    """The bytes, None for what is no size. Units are powers of 1024; a number alone is bytes."""
    match = _SIZE.match(text.strip())
    return int(match[1]) * _UNITS[match[2].upper()] if match else None
