"""What an endpoint's server remembers on disk: the documents it was given, where its update stands, its port.

One folder an endpoint, `<state>/<name>/`, of the user who serves it alone (0700); `journal.json` in it is
replaced whole after each change. The lock of the folder makes its holder the only server of the endpoint, and
is let go of by the kernel when the holder dies. One thread.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
from pathlib import Path
from typing import Any

from serving import endpoint, errors
from serving.controller import Rollout
from serving.endpoint import Endpoint
from serving.providers.record import write_whole

_KEPT_REVISIONS = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Revision:
    """A document that was applied. `note` says what became of it."""

    number: int
    applied_at: float
    document: Endpoint
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class State:
    """`revisions` oldest first, the last one wanted; `scaled`: replicas as `endpoint scale` said, instead of
    the document's least; `port`: where Envoy listens."""

    revisions: tuple[Revision, ...] = ()
    rollout: Rollout = dataclasses.field(default_factory=Rollout)
    scaled: int | None = None
    port: int | None = None

    @property
    def wanted(self) -> Revision:
        """The document in force."""
        return self.revisions[-1]

    def with_document(self, document: Endpoint, now: float, note: str = "") -> State:
        """Another document in force."""
        number = self.revisions[-1].number + 1 if self.revisions else 1
        kept = (*self.revisions, Revision(number, now, document, note))[-_KEPT_REVISIONS:]
        return dataclasses.replace(self, revisions=kept, scaled=None)


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

    def write(self, state: State) -> None:
        """Keep this, if it is new."""
        if state != self.state:
            write_whole(self._file, json.dumps(_to_json(state)))
            self.state = state

    def close(self) -> None:
        """Let another server have the endpoint."""
        os.close(self._lock)

    @property
    def _file(self) -> Path:
        return self.directory / "journal.json"

    def _read(self) -> State:
        try:
            return _from_json(json.loads(self._file.read_bytes()))
        except FileNotFoundError:
            return State()
        except (ValueError, TypeError, KeyError, errors.DocumentError) as exc:
            raise errors.ConfigurationError(
                f"{self._file} cannot be read ({exc}); it was written by another version of glowplug: "
                "end its replicas, remove the folder and serve the document anew"
            ) from exc


def _to_json(state: State) -> dict[str, Any]:
    return {
        "revisions": [
            {
                "number": each.number,
                "applied_at": each.applied_at,
                "document": each.document.model_dump(mode="json"),
                "note": each.note,
            }
            for each in state.revisions
        ],
        "rollout": state.rollout.to_json(),
        "scaled": state.scaled,
        "port": state.port,
    }


def _from_json(value: dict[str, Any]) -> State:
    return State(
        revisions=tuple(
            Revision(
                each["number"],
                each["applied_at"],
                endpoint.from_json(json.dumps(each["document"])),
                each["note"],
            )
            for each in value["revisions"]
        ),
        rollout=Rollout.from_json(value["rollout"]),
        scaled=value["scaled"],
        port=value["port"],
    )
