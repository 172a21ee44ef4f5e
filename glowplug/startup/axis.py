"""A time axis of a plot, and steps that people read. Pure."""

from __future__ import annotations

import dataclasses
import math


def round_step(span: float, most: int = 10) -> float:
    """The smallest 1, 2 or 5 times a power of ten that cuts `span` (above 0) into at most `most` parts."""
    power: float = 10.0 ** math.floor(math.log10(span / most))
    return next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)


@dataclasses.dataclass(frozen=True, slots=True)
class Axis:
    """A time axis: 0 at `left`, `seconds` at `right`."""

    left: float
    right: float
    seconds: float

    def x(self, seconds: float) -> float:
        """Where a moment lies."""
        return self.left + (self.right - self.left) * seconds / self.seconds

    def grid(self, top: float, bottom: float, text: float) -> str:
        """Vertical lines at round times, labelled at height `text`."""
        step = round_step(self.seconds)
        parts = []
        for number in range(int(self.seconds / step) + 1):
            x = self.x(number * step)
            parts.append(
                f'<line x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{bottom:.1f}" class="grid"/>'
                f'<text x="{x:.1f}" y="{text:.1f}" class="mid">{number * step:g} s</text>'
            )
        return "".join(parts)
