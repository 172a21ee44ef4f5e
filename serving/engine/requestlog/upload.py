"""Whole files from a spool directory to S3, one after the other, on a thread of the writer process.

Credentials, region and endpoint are botocore's business (environment, profile, instance role). A file whose
upload fails is tried again with growing pauses; the spool is bounded, and when it is full its oldest files
are dropped and their records counted. botocore's errors are told as `trouble`.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import threading
from pathlib import Path

import boto3
import boto3.exceptions
import botocore.config
import botocore.exceptions

from serving import observability
from serving.engine.requestlog.files import Totals

_FIRST_PAUSE_SECONDS = 0.5
_MOST_PAUSE_SECONDS = 30.0
_CONFIG = botocore.config.Config(
    connect_timeout=5, read_timeout=30, retries={"mode": "standard", "max_attempts": 1}
)


class Uploader:
    """`put`, `totals` and `close` from one thread. The lock is of the queue and the totals."""

    def __init__(self, destination: str, spool: Path, spool_bytes: int) -> None:
        self._bucket, self._prefix = observability.s3_place(destination)
        self._destination, self._spool, self._most_bytes = destination, spool, spool_bytes
        self._totals = Totals()
        self._queue: collections.deque[tuple[Path, int, int]] = collections.deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._closing = False
        self._s3 = boto3.client("s3", config=_CONFIG)
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def put(self, path: Path, records: int) -> None:
        """A whole file, which is the uploader's from now on."""
        size = path.stat().st_size
        with self._changed:
            self._queue.append((path, records, size))
            self._queued_bytes += size
            while self._queued_bytes > self._most_bytes and len(self._queue) > 1:
                self._drop(self._queue.popleft())
            self._changed.notify()

    def totals(self) -> Totals:
        """Up to now."""
        with self._changed:
            return dataclasses.replace(self._totals)

    def close(self, seconds: float) -> None:
        """Upload what waits, for so long; drop the rest."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        with self._changed:
            while self._queue:
                self._drop(self._queue.popleft())

    def _drop(self, entry: tuple[Path, int, int]) -> None:
        path, records, size = entry
        self._queued_bytes -= size
        self._totals.dropped += records
        with contextlib.suppress(OSError):
            path.unlink()

    def _run(self) -> None:
        pause = 0.0
        while True:
            with self._changed:
                if pause:
                    self._changed.wait(pause)
                while not self._queue:
                    if self._closing:
                        return
                    self._changed.wait()
                path, records, size = entry = self._queue[0]
            try:
                key = path.relative_to(self._spool).as_posix()
                self._s3.upload_file(
                    str(path), self._bucket, f"{self._prefix}/{key}" if self._prefix else key
                )
            except (
                botocore.exceptions.BotoCoreError,
                botocore.exceptions.ClientError,
                boto3.exceptions.Boto3Error,
                OSError,
            ) as exc:
                with self._changed:
                    self._totals.trouble = f"{self._destination}: {exc}"
                pause = min(_MOST_PAUSE_SECONDS, max(_FIRST_PAUSE_SECONDS, 2 * pause))
                continue
            pause = 0.0
            with self._changed:
                if not self._queue or self._queue[0] is not entry:
                    continue  # it was dropped while it went; it is counted so
                self._queue.popleft()
                self._queued_bytes -= size
                self._totals.written += records
                self._totals.files += 1
                self._totals.written_bytes += size
                self._totals.trouble = None
            with contextlib.suppress(OSError):
                path.unlink()
