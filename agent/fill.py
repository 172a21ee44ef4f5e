"""Full copies: has the device server copy the images that `fillpolicy` says, again after it lost its state.

Called by the daemon's upkeep, `tick` every few seconds; one thread. The device server does the work, resumes
it after its own restart, and ends it with the image; here only the difference between what should be copied
and what it says it copies is carried out, so that nothing has to be remembered.
"""

from __future__ import annotations

import logging
from typing import Any, Protocol

from agent import config, fillpolicy
from agent.observer import Observer
from agent.rows import ImageRow, SnapshotRow
from imagefs import errors
from imagefs.fuse.coverage import Coverage

_log = logging.getLogger(__name__)

OWNER_PREFIX = "image:"


class Devices(Protocol):
    """What of the device client is used here; imagefs.fuse.control.DeviceClient."""

    def fill(self, owner: str, bandwidth_bytes_per_second: int = 0) -> None:
        """See DeviceClient."""

    def stop_fill(self, owner: str) -> None:
        """See DeviceClient."""

    def fills(self) -> dict[str, Any]:
        """See DeviceClient."""
        ...

    def coverage(self, owner: str | None = None) -> dict[str, Coverage]:
        """See DeviceClient."""
        ...


class Snapshots(Protocol):
    """What of the store is used here."""

    def walk(self) -> list[SnapshotRow]:
        """See Store."""
        ...


class AttachedImages(Protocol):
    """What of images.py is used here."""

    def rows(self) -> list[ImageRow]:
        """See Images."""
        ...

    def attach(self, block_digest: str) -> object:
        """See Images."""


class Fills:
    """See the module."""

    def __init__(
        self,
        settings: config.Fill,
        images: AttachedImages,
        snapshots: Snapshots,
        devices: Devices,
        observer: Observer,
    ) -> None:
        self._settings = settings
        self._images = images
        self._snapshots = snapshots
        self._devices = devices
        self._observer = observer
        self._states: dict[str, str] = {}
        self._failing: set[str] = set()

    def tick(self) -> None:
        """Begin and end copies; tell the observer of those that changed. One that cannot begin keeps no other
        from it. Raises what the device server raises: the next tick tries again."""
        rows = {row.block_digest: row for row in self._images.rows()}
        if not rows and not self._states:
            return
        copies = self._devices.fills()["copies"]
        self._tell(rows, copies)
        copying = {str(copy["owner"]).removeprefix(OWNER_PREFIX) for copy in copies}
        decision = fillpolicy.decide(self._settings, self._candidates(rows, copying), copying)
        failing = set()
        for digest in decision.begin:
            try:
                self.begin(rows[digest])
            except errors.ImagefsError as exc:
                failing.add(digest)
                if digest not in self._failing:
                    _log.warning("no full copy of %s yet: %s", rows[digest].reference, exc)
        self._failing = failing
        for digest in decision.end:
            self._devices.stop_fill(OWNER_PREFIX + digest)

    def begin(self, row: ImageRow) -> None:
        """Copy an image from now on. Attaches it first: after a reboot nobody may have used it yet."""
        try:
            self._images.attach(row.block_digest)
            rate = self._settings.bandwidth_bytes_per_second
            self._devices.fill(OWNER_PREFIX + row.block_digest, rate)
        except errors.NotFoundError as exc:
            _log.info("no full copy of %s: %s", row.reference, exc)  # let go of at this moment

    def _candidates(self, rows: dict[str, ImageRow], copying: set[str]) -> list[fillpolicy.Candidate]:
        settles = self._settings.start == "settled"
        waiting = {digest for digest, row in rows.items() if not row.prefetched and digest not in copying}
        started = fillpolicy.started_images(self._snapshots.walk()) if settles and waiting else set()
        return [
            fillpolicy.Candidate(
                digest,
                row.prefetched,
                digest in started,
                self._quiet_seconds(digest) if digest in started & waiting else None,
            )
            for digest, row in rows.items()
        ]

    def _quiet_seconds(self, block_digest: str) -> float | None:
        try:
            layers = self._devices.coverage(OWNER_PREFIX + block_digest).values()
        except errors.NotFoundError:
            return None  # not attached since a reboot: not used since, either
        return min((layer.quiet_seconds for layer in layers), default=None)

    def _tell(self, rows: dict[str, ImageRow], copies: list[dict[str, Any]]) -> None:
        states = {str(copy["owner"]).removeprefix(OWNER_PREFIX): copy for copy in copies}
        for digest, copy in states.items():
            row, state = rows.get(digest), str(copy["state"])
            if row is None or self._states.get(digest) == state:
                continue
            if state == "complete":
                text = f"{row.reference}: every block is on this node; it needs no registry any more"
                self._observer.event("copy_complete", text, image=row.reference)
            elif state in ("no room", "origin fails"):
                text = f"{row.reference}: full copy waits: {copy['error'] or state}"
                self._observer.event("copy_waits", text, level="warning", image=row.reference, reason=state)
            else:
                continue
            self._states[digest] = state
        self._states = {digest: state for digest, state in self._states.items() if digest in states}
