"""What demand will be: the seam `Model`. Pure.

A model forecasts the level of demand, step by step. Which one is right for a pool is a question to its own
past (`warmpool.forecast.choice`), asked again at each refit; what the chosen one says of the coming hours is
an input to how many requests are expected (`warmpool.arrivals`), never an order: a level that is right by one
node says little of when that node is asked for.
"""

from __future__ import annotations

from typing import Protocol

from warmpool.demand import Floats


class Model(Protocol):
    """One way to forecast. Stateless: fitting and forecasting are one call, and the same input gives the
    same output."""

    @property
    def name(self) -> str:
        """As it is shown."""

    @property
    def least_steps(self) -> int:
        """Shorter histories are not for this model."""

    def forecast(self, levels: Floats, steps: int) -> Floats:
        """The coming `steps` levels after `levels`, which has no gaps and at least `least_steps` values.
        All finite; negative ones are cut by who calls."""
