"""Waiting for what other threads bring about, without a word on how long it takes."""

from __future__ import annotations

import threading
from collections.abc import Callable


def until(holds: Callable[[], bool]) -> None:
    for _ in range(3_000):
        if holds():
            return
        threading.Event().wait(0.01)
    raise AssertionError("it did not come about")
