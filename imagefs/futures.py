"""Waiting for work in other threads so that Ctrl-C is noticed.

Python looks for signals and then waits for a lock: one that comes in between is noticed only when the wait
ends, which is never where an origin hangs. So the wait ends now and then. Called in main threads.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.5


def results(futures: Iterable[concurrent.futures.Future[T]]) -> Iterator[T]:
    """What each brings, in order; raises what it raised."""
    for future in futures:
        while not future.done():
            concurrent.futures.wait([future], timeout=_LOOK_SECONDS)
        yield future.result()
