"""The supervisor's side of the request log: the socket, and the writer process while the log is on.

Runs on the supervisor's event loop. The listening socket is open for as long as the supervisor lives, so that
recorders connect once and wait, whoever writes now; the writer is given it when it is started. A writer that
dies is started again after a pause that doubles; what it had not written is lost, and that is all.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from serving import errors
from serving.engine.requestlog import recorder, requirements
from serving.observability import RequestLog

_FIRST_PAUSE_SECONDS = 1.0
_MOST_PAUSE_SECONDS = 60.0
_END_SECONDS = 12.0
"""For the writer's last file, and its upload."""


@dataclasses.dataclass(frozen=True, slots=True)
class Totals:
    """Of all writers that there were: records in whole files, records that were not kept, files."""

    written: int = 0
    dropped: int = 0
    files: int = 0
    written_bytes: int = 0


class Keeper:
    """`open` first, `close` last. `say` is the supervisor's log."""

    def __init__(
        self, directory: Path, service: str, instance: str, say: Callable[[str, dict[str, Any]], None]
    ) -> None:
        self._directory = directory
        self._whose = {"service": service, "instance": instance, "spool": str(directory / "spool")}
        self._say = say
        self._wanted: RequestLog | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeping: asyncio.Task[None] | None = None
        self._before = self.totals = Totals()
        self._trouble: str | None = None

    def open(self) -> None:
        """Recorders can connect from now on."""
        path = self._directory / recorder.SOCKET
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        os.fchmod(self._listener.fileno(), 0o600)
        self._listener.bind(os.fspath(path))
        self._listener.listen(128)

    async def settle(self, wanted: RequestLog | None) -> None:
        """Log like this from now on; None is not at all. ConfigurationError where it needs what is not
        here."""
        if wanted is not None:
            requirements.check(wanted)
        if wanted == self._wanted:
            return
        self._wanted = wanted
        if wanted is None:
            await self._stop()
        elif self._keeping is None:
            self._keeping = asyncio.create_task(self._keep())
        else:
            self._tell()

    async def close(self) -> None:
        """The last records are written."""
        await self._stop()
        self._listener.close()

    def _tell(self) -> None:
        process = self._process
        if process is not None and process.stdin is not None and self._wanted is not None:
            document = {**self._wanted.model_dump(mode="json"), **self._whose}
            with contextlib.suppress(OSError, RuntimeError):  # it is gone, and its successor will be told
                process.stdin.write(json.dumps(document).encode() + b"\n")

    async def _stop(self) -> None:
        keeping, self._keeping = self._keeping, None
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.close()
        if keeping is None:
            return
        try:
            await asyncio.wait_for(keeping, _END_SECONDS)
        except TimeoutError:
            self._say("request_log", {"trouble": "the writer did not finish and was killed"})
        finally:
            self._process = None

    async def _keep(self) -> None:
        """One writer after the other, until `_stop`."""
        pause = _FIRST_PAUSE_SECONDS
        while True:
            began = self.totals
            try:
                why = f"the writer ended with status {await self._one_writer()}"
            except OSError as exc:
                why = f"the writer cannot be started: {exc.strerror or exc}"
            if self._keeping is None:
                return
            self._say("request_log", {"trouble": f"{why}; it is started again"})
            await asyncio.sleep(pause)
            pause = _FIRST_PAUSE_SECONDS if self.totals != began else min(_MOST_PAUSE_SECONDS, 2 * pause)

    async def _one_writer(self) -> int:
        self._before = self.totals
        process = self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "serving.engine.requestlog.writer", str(self._listener.fileno())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(self._listener.fileno(),),
            start_new_session=True,
        )
        assert process.stdout is not None
        try:
            self._tell()
            while line := await process.stdout.readline():
                self._heard(line)
            return await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise

    def _heard(self, line: bytes) -> None:
        now = json.loads(line)
        trouble = now.pop("trouble")
        self.totals = Totals(
            **{name: getattr(self._before, name) + int(value) for name, value in now.items()}
        )
        if trouble != self._trouble:
            # Once, however many records it costs.
            self._trouble = trouble
            self._say("request_log", {"trouble": trouble} if trouble else {"mended": True})


def parse(text: bytes) -> RequestLog | None:
    """The body of `POST /request-log`: `{"request_log": ...}`, as in the document, or null. DocumentError."""
    try:
        document = json.loads(text)["request_log"]
        return None if document is None else RequestLog.model_validate(document)
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise errors.DocumentError(f"request_log: {exc}") from exc
