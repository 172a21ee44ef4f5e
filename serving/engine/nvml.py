"""Asks NVIDIA's driver how busy GPUs are: the adapter to NVML, by `nvidia-ml-py`.

Owned by the supervisor, one `Reader` an engine. A driver may take its time, or forever (a GPU that fell off
the bus): so a thread of the reader's own asks it, once a second, and `last`, which the event loop calls,
never waits: it gives what was read last, if that is not old. What cannot be read is None, never zero, and no
error of NVML's gets further than here; it is said once, and tried again after a minute. On a machine without
the driver's library nothing is loaded and nothing said.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from serving.engine.gpus import Reading

_LIBRARY = "libnvidia-ml.so.1"
_PERIOD_SECONDS = 1.0
_FRESH_SECONDS = 3.0
"""What was read longer ago is not what is now: the driver does not answer."""
_AGAIN_SECONDS = 60.0
"""After a failure."""


class Reader:
    """See the module. `choose` picks from the UUIDs of the machine's GPUs; `say` tells people. Both are
    called on the reader's thread."""

    def __init__(self, choose: Callable[[Sequence[str]], Sequence[str]], say: Callable[[str], None]) -> None:
        self._choose, self._say = choose, say
        self._closing = threading.Event()
        self._read: tuple[float, Reading] | None = None
        # A daemon, because nobody can end it while the driver holds it.
        threading.Thread(target=self._live, name="nvml", daemon=True).start()

    def last(self) -> Reading | None:
        """What was read last; None where nothing was lately."""
        read = self._read
        return read[1] if read is not None and time.monotonic() - read[0] <= _FRESH_SECONDS else None

    def close(self) -> None:
        """Let go of the driver, as soon as it answers."""
        self._closing.set()

    # -- the thread ----------------------------------------------------------------------------------

    def _live(self) -> None:
        said = ""
        while not self._closing.is_set():
            nvml = _library()
            if nvml is not None:
                try:
                    self._read_on(nvml)
                except nvml.NVMLError as exc:
                    if str(exc) != said:
                        said = str(exc)
                        self._say(f"GPUs are not read: NVML: {said}; tried again every {_AGAIN_SECONDS:g} s")
            self._closing.wait(_AGAIN_SECONDS)

    def _read_on(self, nvml: Any) -> None:
        """Until it is closed; where the engine has none, not at all. NVMLError."""
        nvml.nvmlInit()
        try:
            there = [
                nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(number))
                for number in range(nvml.nvmlDeviceGetCount())
            ]
            mine = [nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in self._choose(there)]
            while mine and not self._closing.is_set():
                reading = _reading(nvml, mine)
                self._read = (time.monotonic(), reading)
                self._closing.wait(_PERIOD_SECONDS)
        finally:
            nvml.nvmlShutdown()


def _library() -> Any:
    """The module `pynvml`, which is 6 MB in memory, where there is a driver for it to speak to."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    import pynvml

    return pynvml


def _reading(nvml: Any, mine: Sequence[Any]) -> Reading:
    memory = [nvml.nvmlDeviceGetMemoryInfo(each) for each in mine]
    busy = [_busy(nvml, each) for each in mine]
    known = [each for each in busy if each is not None]
    return Reading(
        len(mine),
        max(known) if len(known) == len(busy) else None,
        sum(int(each.used) for each in memory),
        sum(int(each.total) for each in memory),
    )


def _busy(nvml: Any, handle: Any) -> float | None:
    try:
        percent = int(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except nvml.NVMLError_NotSupported:
        return None
    return percent / 100 if 0 <= percent <= 100 else None
