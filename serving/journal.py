"""What an endpoint's server remembers on disk: the documents it was given, where its update stands, its port.

One folder an endpoint, `<state>/<name>/`, of the user who serves it alone (0700); `journal.json` in it is
replaced whole after each change. The lock of the folder makes its holder the only server of the endpoint, and
is let go of by the kernel when the holder dies. One thread.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

from serving import errors, history, wholefile
from serving.history import History


class Journal:
    """See the module. ConflictError if another server has the folder."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            os.close(self._lock)
            raise errors.ConflictError(
                f"endpoint {directory.name} is being served already; change it with `glowplug endpoint apply`"
            ) from exc
        self.state = self._read()

    def write(self, state: History) -> None:
        """Keep this, if it is new."""
        if state != self.state:
            wholefile.write(self._file, json.dumps(history.to_json(state)))
            self.state = state

    def close(self) -> None:
        """Let another server have the endpoint."""
        os.close(self._lock)

    @property
    def _file(self) -> Path:
        return self.directory / "journal.json"

    def _read(self) -> History:
        try:
            return history.from_json(json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return History()
        except (ValueError, TypeError, KeyError, errors.DocumentError) as exc:
            raise errors.ConfigurationError(
                f"{self._file} cannot be read ({exc}); it was written by another version of glowplug: "
                "end its replicas, remove the folder and serve the document anew"
            ) from exc
