"""The provider that keeps replicas by their records; what differs from machine to machine is a `Launcher`.

Owned by the server and called by its thread (`logs` by any). Replicas are `glowplug engine` processes,
wherever the launcher runs them: each answers /readyz on its port and takes its limit on its socket. All that
is known of a replica is in its record, so that another server process goes on where this one was killed.

A replica leaves in steps, by `observe`: DRAINING at once (the router drops it from the routes), told to stop
after the notice, killed when the drain's time is up, forgotten when it is gone. Failed replicas stay to be
seen, the newest few of each version for some time.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import logging
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from serving import changes, endpoint, errors, ports, wholefile
from serving.endpoint import Endpoint
from serving.engine.state import Rations, Spent
from serving.providers import backoff, engineclient, enginecommand
from serving.providers.record import Record, Shelf
from serving.replica import Replica, State

_KEPT_FAILED = 10
_FAILED_SECONDS = 900.0
_READY_PROBE_SECONDS = 1.0
_SILENT_SECONDS = 10.0
"""A replica that answers nothing for so long is taken for not ready; Envoy's own checks are faster."""
_PROBES_AT_ONCE = 16
_ADDRESS = "127.0.0.1"
_LOG_BYTES = 64 << 10
_LAST_LINES, _SEARCHED_LINES = 5, 50

_log = logging.getLogger(__name__)


class Launcher(Protocol):
    """Starts and ends what a record describes. Errors as Provider's."""

    def check(self, wanted: Endpoint) -> None:
        """Whether replicas of this endpoint can be started here. Fetches what a first start would wait
        for."""

    def start(self, record: Record, wanted: Endpoint, folder: Path, known: Callable[[str], None]) -> None:
        """Start it, its output to `folder`/log. `known` is called with the handle by which it is found again,
        before it does anything: without that, a server that is killed here would leave it to nobody."""

    def ended(self, record: Record) -> str | None:
        """Why it is no longer there; None while it is."""

    def stop(self, record: Record) -> None:
        """Tell it to finish what it does and leave. Without it there, nothing."""

    def kill(self, record: Record) -> None:
        """End it and whatever it started, and clean up after it. Without it there, the cleaning up."""

    def close(self) -> None:
        """Let go of what this process holds."""


class Fleet:
    """A Provider (see serving.replica). `clock` is Unix seconds."""

    def __init__(
        self, directory: Path, launcher: Launcher, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._directory = directory
        self._launcher = launcher
        self._clock = clock
        (directory / "versions").mkdir(mode=0o700, parents=True, exist_ok=True)
        self._shelf = Shelf(directory / "replicas")
        self._records = self._shelf.read()
        self._looks: dict[str, engineclient.Look] = {}
        self._looked_at: dict[str, float] = collections.defaultdict(float)
        self._current: Endpoint | None = None
        self._limit: int | None = None
        self._pool = concurrent.futures.ThreadPoolExecutor(_PROBES_AT_ONCE, "replica-probe")

    # -- Provider ----------------------------------------------------------------------------------

    def apply(self, endpoint_: Endpoint) -> str:
        """See Provider."""
        self._launcher.check(endpoint_)
        version = changes.version(endpoint_)
        wholefile.write(self._version_file(version), endpoint.to_json(endpoint_))
        self._current = endpoint_
        return version

    def observe(self) -> list[Replica]:
        """See Provider."""
        self._probe()
        now = self._clock()
        for record in list(self._records.values()):
            self._follow(record, now)
        self._forget_old_failures(now)
        return [
            self._shown(record) for record in sorted(self._records.values(), key=lambda each: each.created_at)
        ]

    def scale(self, n: int, keep: Collection[str] = (), version: str | None = None) -> None:
        """See Provider."""
        if version is None:
            version = changes.version(self._wanted())
        here = [each for each in self._records.values() if each.version == version]
        going = [each for each in here if each.failed_at is None and each.draining_at is None]
        if len(going) > n:
            spare = [each for each in going if each.name not in keep]
            spare.sort(key=lambda each: (each.ready_at is not None, -each.created_at))
            self.drain([each.name for each in spare[: len(going) - n]])
        elif len(going) < n and self._clock() >= backoff.next_start(here):
            for _ in range(n - len(going)):
                self._start(version)

    def set_limit(self, n: int) -> None:
        """See Provider."""
        self._limit = n

    def ration(self, rations: Mapping[str, Rations]) -> Mapping[str, Mapping[str, Spent]]:
        """See replica.Rationed. One that cannot be told is tried again by the caller, a second later."""

        def tell(name: str) -> Mapping[str, Spent] | None:
            try:
                return engineclient.ration(self._shelf.folder(name) / enginecommand.CONTROL, rations[name])
            except errors.UnavailableError:
                return None

        answers = zip(rations, self._pool.map(tell, rations), strict=True)
        return {name: spent for name, spent in answers if spent is not None}

    def drain(self, names: Collection[str]) -> None:
        """See Provider."""
        for name in names:
            record = self._records.get(name)
            if record is None:
                continue
            if record.failed_at is not None:
                self._forget(record)
            elif record.draining_at is None:
                self._write(dataclasses.replace(record, draining_at=self._clock()))

    def remove(self, version: str) -> None:
        """See Provider."""
        self.drain([each.name for each in self._records.values() if each.version == version])
        if not any(each.version == version for each in self._records.values()):
            self._version_file(version).unlink(missing_ok=True)

    def logs(self, name: str, lines: int) -> Sequence[str]:
        """See Provider."""
        if name not in self._records:
            known = ", ".join(self._records) or "none"
            raise errors.NotFoundError(f"no replica is called {name}; there are: {known}")
        return last_lines(self._shelf.folder(name) / enginecommand.LOG, lines)

    def close(self) -> None:
        """See Provider."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._launcher.close()

    # -- a replica's life --------------------------------------------------------------------------

    def _start(self, version: str) -> None:
        wanted = self._of_version(version)
        name = f"{version[:4]}-{secrets.token_hex(3)}"
        limit = self._limit if self._limit is not None else wanted.replicas.limit
        record = Record(
            name,
            version,
            (_ADDRESS, ports.probe(_ADDRESS, 0)),
            self._clock(),
            limit=limit,
            request_log=enginecommand.request_log(wanted),
        )
        self._write(record)
        try:
            self._launcher.start(
                record,
                wanted,
                self._shelf.folder(name),
                lambda handle: self._write(dataclasses.replace(record, handle=handle)),
            )
        except errors.ServingError as exc:
            self._write(dataclasses.replace(record, failed_at=self._clock(), reason=str(exc)))
            _log.error("replica %s could not be started: %s", name, exc)
            return
        _log.info("replica %s of version %s started", name, version)

    def _follow(self, record: Record, now: float) -> None:
        """The next step of one replica's life, if it is due."""
        if record.failed_at is not None:
            return
        ended = self._launcher.ended(record)
        if ended is not None:
            self._ended(record, ended, now)
        elif record.draining_at is not None:
            self._leave(record, record.draining_at, now)
        else:
            self._serve(record, now)

    def _ended(self, record: Record, ended: str, now: float) -> None:
        self._launcher.kill(record)
        if record.draining_at is not None:
            _log.info("replica %s has left", record.name)
            self._forget(record)
            return
        said = last_lines(self._shelf.folder(record.name) / enginecommand.LOG, _SEARCHED_LINES)
        tail = [line for line in said if not line.startswith(enginecommand.EVENT)][-_LAST_LINES:]
        reason = "\n".join([ended, *(f"  {line}" for line in tail)])
        _log.error("replica %s failed: %s", record.name, reason)
        self._write(dataclasses.replace(record, failed_at=now, reason=reason))

    def _leave(self, record: Record, draining_at: float, now: float) -> None:
        settings = self._wanted().drain
        if record.told_at is None:
            if now >= draining_at + settings.notice_seconds:
                self._write(dataclasses.replace(record, told_at=now))
                self._launcher.stop(record)
        elif now >= record.told_at + settings.seconds:
            _log.warning(
                "replica %s did not finish in %g s (drain.seconds): killed", record.name, settings.seconds
            )
            self._launcher.kill(record)

    def _serve(self, record: Record, now: float) -> None:
        look = self._looks.get(record.name)
        if look is not None and look.ready and record.ready_at is None:
            self._write(dataclasses.replace(record, ready_at=now, phases=dict(look.phases)))
        elif record.ready_at is None:
            seconds = enginecommand.start_timeout_seconds(self._of_version(record.version))
            if now - record.created_at > seconds:
                late = f"not ready after {seconds:g} s (engine.start_timeout_seconds)"
                self._ended(record, late, now)
        else:
            with contextlib.suppress(errors.UnavailableError):  # said again at the next look
                self._tell(record)

    def _tell(self, record: Record) -> None:
        """What is changed while a replica runs. UnavailableError."""
        control = self._shelf.folder(record.name) / enginecommand.CONTROL
        if self._limit is not None and record.limit != self._limit:
            engineclient.set_limit(control, self._limit)
            record = dataclasses.replace(record, limit=self._limit)
            self._write(record)
        log = enginecommand.request_log(self._wanted())
        if record.request_log != log:
            engineclient.set_request_log(control, log)
            self._write(dataclasses.replace(record, request_log=log))

    def _shown(self, record: Record) -> Replica:
        state, reason = State.STARTING, record.reason
        if record.failed_at is not None:
            state = State.FAILED
        elif record.draining_at is not None:
            state = State.DRAINING
        elif record.ready_at is not None:
            refused = self._refusal(record)
            state, reason = (State.STARTING, refused) if refused else (State.READY, None)
        return Replica(
            name=record.name,
            version=record.version,
            address=record.address,
            state=state,
            created_at=record.created_at,
            ready_at=record.ready_at,
            phases=record.phases,
            reason=reason,
            vitals=look.vitals if (look := self._looks.get(record.name)) is not None else None,
        )

    def _refusal(self, record: Record) -> str | None:
        """Why a replica that was ready is not now. One that is merely slow to answer still is: it may be
        busy."""
        look = self._looks.get(record.name)
        if look is None or look.ready:
            return None
        if look.answered:
            return look.reason
        silent = self._clock() - look.answered_at
        return f"has not answered /readyz for {silent:.0f} s" if silent > _SILENT_SECONDS else None

    # -- probes ------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Ask those that are due, all at once: one that hangs must not hide the others."""
        now = self._clock()
        due = [
            each
            for each in self._records.values()
            if each.failed_at is None
            and each.draining_at is None
            and now - self._looked_at[each.name] >= (_READY_PROBE_SECONDS if each.ready_at else 0.0)
        ]

        def look(record: Record) -> tuple[str, engineclient.Look]:
            before = self._looks.get(record.name)
            since = before.answered_at if before is not None else now
            socket_path = self._shelf.folder(record.name) / enginecommand.CONTROL
            return record.name, engineclient.look(record.address, socket_path, since, self._clock)

        for name, found in self._pool.map(look, due):
            self._looks[name] = found
            self._looked_at[name] = self._clock()

    # -- records -----------------------------------------------------------------------------------

    def _write(self, record: Record) -> None:
        self._shelf.write(record)
        self._records[record.name] = record

    def _forget(self, record: Record) -> None:
        self._shelf.remove(record.name)
        for table in (self._records, self._looks, self._looked_at):
            table.pop(record.name, None)

    def _forget_old_failures(self, now: float) -> None:
        failed: dict[str, list[Record]] = collections.defaultdict(list)
        for record in self._records.values():
            if record.failed_at is not None:
                failed[record.version].append(record)
        for records in failed.values():
            records.sort(key=lambda each: each.created_at, reverse=True)
            for number, record in enumerate(records):
                assert record.failed_at is not None
                if number >= _KEPT_FAILED or now - record.failed_at > _FAILED_SECONDS:
                    self._forget(record)

    def _wanted(self) -> Endpoint:
        if self._current is None:
            raise errors.ConflictError("no endpoint document has been applied yet")
        return self._current

    def _of_version(self, version: str) -> Endpoint:
        if self._current is not None and changes.version(self._current) == version:
            return self._current
        try:
            return endpoint.from_json(self._version_file(version).read_text())
        except FileNotFoundError as exc:
            raise errors.NotFoundError(f"no version {version} has been applied") from exc

    def _version_file(self, version: str) -> Path:
        return self._directory / "versions" / f"{version}.json"


def last_lines(path: Path, lines: int) -> list[str]:
    """The end of a log, with what a terminal would obey left out."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - _LOG_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    found = text.splitlines()[-lines:] if lines > 0 else []
    return ["".join(each for each in line if each.isprintable() or each == "\t") for line in found]
