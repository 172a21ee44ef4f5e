"""What a device server leaves to its successor when it hands over: the reads that its workers had taken.

A file in the state directory, written by the server that goes, when its workers have ended, and taken by the
one that comes, before its workers begin. A request of the kernel is answered through the clone of /dev/fuse
that it was read from, whoever holds that: so a read that waits for an origin is answered by the next worker
on the same clone, and no hand-over has to wait for it. That works on every kernel. After a kill nobody
leaves anything; then the kernel must queue again (FUSE_NOTIFY_RESEND).

The two may be of different versions: the file bears a version, and one that cannot be understood is no
hand-over. Clones keep their order from keeper to server and on.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from imagefs import errors
from imagefs.fuse import protocol
from imagefs.fuse.devices import write_atomically

_VERSION = 1
_NAME = "handover.json"

Left = Mapping[int, Sequence[protocol.Read]]
"""Clone (its place in the keeper's order) -> reads that were taken from it and wait for an answer."""


def leave(state_dir: Path, token: str, left: Left) -> None:
    """Write it down. `token` names the mount. ConfigurationError if the disk does not take it."""
    document = {
        "version": _VERSION,
        "token": token,
        "reads": [[clone, *dataclasses.astuple(read)] for clone, reads in left.items() for read in reads],
    }
    try:
        write_atomically(state_dir / _NAME, json.dumps(document).encode())
    except OSError as exc:
        raise errors.ConfigurationError(f"cannot write {state_dir / _NAME}: {exc.strerror}") from exc


def take(state_dir: Path, token: str) -> dict[int, list[protocol.Read]]:
    """What a predecessor on this mount left; nothing if it was killed. Each is taken once."""
    path = state_dir / _NAME
    left: dict[int, list[protocol.Read]] = {}
    try:
        data = path.read_bytes()
        path.unlink()
        document = json.loads(data)
        if document["version"] == _VERSION and document["token"] == token:
            for clone, *read in document["reads"]:
                left.setdefault(int(clone), []).append(protocol.Read(*map(int, read)))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise errors.InvalidInputError(f"{path}: cannot be understood: {exc!r}") from exc
    return left
