"""When a failed call to an origin is tried again, and when it is given up.

The one retry policy of the registry and S3 alike. `delay_for` is pure; `Attempts` is the budget of one call
and sleeps between its attempts. Only UnavailableError is ever retried: whoever wraps a foreign exception
or an HTTP status decides, by the class it raises, whether another attempt could help.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable
from typing import TypeVar

from imagefs import errors

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True)
class Policy:
    """`attempts` counts the first one. The delay doubles from `first_delay_seconds` to `max_delay_seconds`;
    a longer Retry-After is honoured up to `max_retry_after_seconds`, so that an origin cannot park us."""

    attempts: int = 6
    first_delay_seconds: float = 0.2
    max_delay_seconds: float = 10.0
    max_retry_after_seconds: float = 60.0


DEFAULT = Policy()


def delay_for(policy: Policy, failures: int, retry_after_seconds: float | None, random_unit: float) -> float:
    """Seconds to wait after the `failures`-th failure in a row (1 for the first).

    `random_unit` in [0, 1) spreads the callers that failed together: the backoff lies between half of
    its nominal value and all of it. Retry-After is a lower bound, spread upwards by a tenth.
    """
    nominal = min(policy.max_delay_seconds, policy.first_delay_seconds * 2.0 ** min(failures - 1, 30))
    backoff = nominal * (0.5 + random_unit / 2)
    if retry_after_seconds is None:
        return backoff
    asked = min(max(retry_after_seconds, 0.0), policy.max_retry_after_seconds)
    return max(backoff, asked * (1 + random_unit / 10))


class Attempts:
    """The budget of one call: a number of failures in a row or, with a `deadline` (time.monotonic()), as
    many as fit before it. Used by one thread."""

    def __init__(self, policy: Policy, deadline: float | None = None) -> None:
        self._policy = policy
        self._deadline = deadline
        self._failures = 0

    def progressed(self) -> None:
        """The last attempt moved bytes that count: the next failure is a first one again."""
        self._failures = 0

    def failed(self, error: errors.UnavailableError) -> None:
        """Sleep until the next attempt, or raise `error` because there will be none."""
        self._failures += 1
        delay = delay_for(self._policy, self._failures, error.retry_after_seconds, random.random())  # noqa: S311
        if self._deadline is None:
            if self._failures >= self._policy.attempts:
                raise error
        elif time.monotonic() + delay >= self._deadline:
            raise error
        time.sleep(delay)


def call(policy: Policy, function: Callable[[], T], deadline: float | None = None) -> T:
    """`function()`, again after each UnavailableError while the budget lasts."""
    attempts = Attempts(policy, deadline)
    while True:
        try:
            return function()
        except errors.UnavailableError as exc:
            attempts.failed(exc)
