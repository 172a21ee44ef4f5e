"""What a measured link is: its rate and its added delay, and how both are written. Pure."""

from __future__ import annotations

import dataclasses
import re

from imagefs import errors

_RATE = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)\s?([kmg]?)bit", re.ASCII | re.IGNORECASE)
_UNIT_BITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


@dataclasses.dataclass(frozen=True, slots=True)
class Speed:
    """What a link is: bits a second towards the client, and the round-trip time that is added."""

    bits_per_second: int
    rtt_seconds: float = 0.0

    def __str__(self) -> str:
        unit, name = (10**9, "Gbit/s") if self.bits_per_second >= 10**9 else (10**6, "Mbit/s")
        rate = f"{self.bits_per_second / unit:g} {name}"
        return f"{rate} + {self.rtt_seconds * 1000:g} ms" if self.rtt_seconds else rate

    def seconds(self, moved_bytes: float) -> float:
        """How long the link takes for that many bytes."""
        return moved_bytes * 8 / self.bits_per_second


def parse_rate(text: str) -> int:
    """Bits a second of a rate as tc writes them: 100mbit, 2.5gbit. Raises InvalidInputError."""
    match = _RATE.fullmatch(text.strip())
    bits = round(float(match[1]) * _UNIT_BITS[match[2].lower()]) if match else 0
    if bits < 8:  # tc counts in bytes
        raise errors.InvalidInputError(f"{text!r} is not a rate like 100mbit or 1gbit")
    return bits
