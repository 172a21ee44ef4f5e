"""SIGINT and SIGTERM at the wrong moment: kept until what must not be torn apart is done.

Main thread only. A blocked signal mask would not do where there are other threads: the kernel hands the
signal to one of those, and Python runs the handler in the main thread all the same.
"""

from __future__ import annotations

import contextlib
import signal
import types
from collections.abc import Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Signals that come meanwhile act when the block is left. Ignored ones stay ignored."""
    came: list[int] = []

    def note(number: int, frame: types.FrameType | None) -> None:
        came.append(number)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
