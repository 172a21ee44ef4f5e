"""Mounts that are being started from, and when they read ahead more.

Owned by the server. While an image starts its mounts read ahead little: what its boot pack was traced with,
or kernelreadahead.START_READ_AHEAD_KIB. Once the start is over they get READ_AHEAD_KIB, because afterwards
files are read from end to end. Whoever mounts says so (`started`), and may end: the server is there as long
as the mounts are, and its successor goes on, from a file in the state directory.

When is a start over? Nobody tells us. Reads alone do not say it: a service that has begun to read a large
file must not go on with a small read-ahead because it reads. A start with a boot pack is over when the pack
has come and, for `START_SECONDS`, no reader has asked for a part of it that was not asked for before; the
pack being what starts read, in that order. A start without one is over when that time has passed since the
mount. Raised too early, the rest of a start reads what is not in the pack, by blocks, which is slower and not
wrong.
A start that is being recorded is not over: the read-ahead of a trace is one.

Threads: `started` and `forget` from control threads; one thread of its own looks every second, while there is
anything to look at.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from imagefs import errors, kernelreadahead
from imagefs.fuse.devices import write_atomically

START_SECONDS = 10.0
"""Longer than a start pauses between two reads of its pack, as a rule: to compile, to wait for another
service. Shorter than what is noticed of a service that reads its data more slowly at first."""
_LOOK_SECONDS = 1.0
_MAX_MOUNTS = 1 << 16

_log = logging.getLogger(__name__)

QuietSeconds = Callable[[str], float]
"""How long ago an owner's boot pack was last of use to a start; 0 while it comes, or while the start is being
recorded; infinite without one."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Mount:
    owner: str
    since: float


class StartReadAhead:
    """See the module. `token` names the FUSE mount that all devices are files of; `clock` is monotonic."""

    def __init__(
        self,
        path: Path,
        token: str,
        device_directory: Path,
        quiet_seconds: QuietSeconds,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._token = token
        self._device_directory = device_directory
        self._quiet_seconds = quiet_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._closed = False
        self._mounts = {name: _Mount(owner, clock()) for name, owner in self._read().items()}
        threading.Thread(target=self._run, name="start-read-ahead", daemon=True).start()

    def started(self, owner: str, names: Sequence[str]) -> None:
        """These backing devices are of mounts that `owner` is being started from. InvalidInputError for what
        is no name of one."""
        wrong = [name for name in names if not kernelreadahead.is_name(name)]
        if wrong or len(names) > _MAX_MOUNTS:
            raise errors.InvalidInputError(f"control: started: backing devices {wrong[:3]!r}, {len(names)}")
        with self._changed:
            now = self._clock()
            for name in names:
                self._mounts.setdefault(name, _Mount(owner, now))
            self._keep()
            self._changed.notify()

    def forget(self, owner: str) -> None:
        """The owner is gone: its mounts are, or nobody is to touch them."""
        with self._changed:
            gone = [name for name, mount in self._mounts.items() if mount.owner == owner]
            for name in gone:
                del self._mounts[name]
            if gone:
                self._keep()

    def owners(self) -> list[str]:
        """Whose starts are not over yet."""
        with self._changed:
            return sorted({mount.owner for mount in self._mounts.values()})

    def look(self) -> None:
        """Raise what is due."""
        with self._changed:
            waiting = dict(self._mounts)
        now = self._clock()
        quiet = {owner: self._quiet_seconds(owner) for owner in {mount.owner for mount in waiting.values()}}
        due = [
            name
            for name, mount in waiting.items()
            if min(quiet[mount.owner], now - mount.since) >= START_SECONDS
        ]
        for name in due:
            self._raise(name)
        if due:
            with self._changed:
                for name in due:
                    self._mounts.pop(name, None)
                self._keep()

    def close(self) -> None:
        """Leave the rest to a successor."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                if not self._closed:
                    self._changed.wait(_LOOK_SECONDS if self._mounts else None)
                if self._closed:
                    return
            self.look()

    def _raise(self, name: str) -> None:
        if not kernelreadahead.is_backed_by(name, self._device_directory):
            return
        try:
            kernelreadahead.set_kib(name, kernelreadahead.READ_AHEAD_KIB)
        except FileNotFoundError:
            return  # unmounted meanwhile
        except OSError as exc:
            _log.warning("%s keeps the read-ahead of its start: %s", name, exc.strerror)

    # -- the file: for a successor only, so that a full disk is no error ---------------------------

    def _keep(self) -> None:
        document = {"token": self._token, "mounts": {name: m.owner for name, m in self._mounts.items()}}
        try:
            write_atomically(self._path, json.dumps(document).encode())
        except OSError as exc:
            _log.warning("cannot write %s: %s", self._path, exc.strerror)

    def _read(self) -> dict[str, str]:
        try:
            document = json.loads(self._path.read_bytes())
            if document["token"] != self._token:
                return {}
            return {str(k): str(v) for k, v in document["mounts"].items() if kernelreadahead.is_name(str(k))}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as exc:
            _log.warning("%s is passed over: %r", self._path, exc)
            return {}
