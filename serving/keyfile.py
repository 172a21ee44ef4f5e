"""The API keys of a file, read again when it changes. Used by the server's loop."""

from __future__ import annotations

import os
from pathlib import Path

from serving import errors, routes
from serving.service import Key


class KeyFile:
    """A file that turned bad keeps the keys that it had: nobody is locked out, or let in, by a slip."""

    def __init__(self) -> None:
        self._stamp: tuple[str, bool, int, int] | None = None
        self._keys: tuple[Key, ...] = ()

    def read(self, file: str | None, *, units: bool) -> tuple[Key, ...]:
        """The keys now; none without a file. `units`: whether limits may be in model units."""
        if file is None:
            self._stamp, self._keys = None, ()
            return ()
        try:
            self.check(file, units=units)
        except errors.DocumentError:
            if self._stamp is None or self._stamp[0] != file:
                raise
        return self._keys

    def check(self, file: str, *, units: bool) -> None:
        """Read it, if it is new. DocumentError."""
        try:
            found = os.stat(file)
            stamp = (file, units, found.st_mtime_ns, found.st_size)
            if stamp != self._stamp:
                keys = routes.keys(Path(file).read_text(), file)
                for key in keys:
                    if key.units_per_second is not None and not units:
                        raise errors.DocumentError(
                            f"{file}: {key.tenant} is limited in units, and the document's `units` does not "
                            "say what a request costs; write it, or limit tokens"
                        )
                self._keys, self._stamp = keys, stamp
        except (OSError, UnicodeDecodeError, errors.DocumentError) as exc:
            raise errors.DocumentError(f"limits.keys_file: {exc}; write the file, or name another") from exc
