"""How those who wait for a block hear of it: callbacks, each called once, with a descriptor of its own.

Used by the fetcher, from any thread. A caller's mistake is logged, and does not end the thread that serves
everybody; a lack of descriptors is an error to who would have got one.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Callable
from typing import TypeVar, cast

from imagefs import blockmap, errors, plan
from imagefs.arrival import Part

_log = logging.getLogger(__name__)

T = TypeVar("T")

Done = Callable[[int | Exception], None]
"""Called once: with a descriptor of the block, the callee's to close, or with the error."""
PartDone = Callable[[int | Part | Exception], None]
"""As Done, of one who asked for some frames, and may be answered with a Part."""


def call(done: Callable[[T], None] | None, result: T) -> None:
    """A descriptor in `result` is the callee's from now on; where nobody waits (None), it is closed."""
    if done is None:
        if isinstance(result, int):
            os.close(result)
        return
    try:
        done(result)
    except Exception:
        _log.exception("a callback for a fetched block failed")


def hand_out(done: Done | None, fd: int) -> None:
    """A descriptor of the same file; `fd` stays the caller's."""
    if done is None:
        return
    try:
        own = os.dup(fd)
    except OSError as exc:
        call(done, errors.UnavailableError(f"no descriptor left for a block: {exc}"))
    else:
        call(done, own)


def hand_out_part(done: Done, part: Part) -> None:
    """As `hand_out`, to one of those whom `Plan.frames_arrived` gives back: they asked for frames."""
    try:
        own = Part(os.dup(part.fd), part.frames)
    except OSError as exc:
        call(done, errors.UnavailableError(f"no descriptor left for a block: {exc}"))
    else:
        call(cast("PartDone", done), own)


def classify(exc: Exception) -> tuple[plan.Failure, errors.ImagefsError]:
    """What an exception from an origin, from decoding or from the cache means for plan and readers."""
    if isinstance(exc, errors.UnavailableError):
        return plan.Failure.UNAVAILABLE, exc
    if isinstance(exc, errors.DeniedError):
        return plan.Failure.DENIED, exc
    if isinstance(exc, errors.IntegrityError):
        return plan.Failure.CORRUPT, exc
    if isinstance(exc, errors.ImagefsError):
        return plan.Failure.FINAL, exc
    return plan.Failure.UNAVAILABLE, errors.UnavailableError(f"unexpected {type(exc).__name__}: {exc}")


def zeros() -> int:
    """A file of zeros as long as any block, which whoever gets a descriptor of it cannot change."""
    fd = os.memfd_create("glowplug-zeros", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, blockmap.MAX_BLOCK_BYTES)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def closing() -> errors.UnavailableError:
    """For those who wait when the fetcher ends."""
    return errors.UnavailableError("the fetcher is closing")
