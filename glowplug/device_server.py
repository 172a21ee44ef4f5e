"""The device server on its way up, while the command does other things.

Starting it takes about as long as opening an image does: the verbs that mount start it first, and import
what the rest of them needs meanwhile. This module therefore imports little.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from glowplug import interrupts, settings

if TYPE_CHECKING:
    from imagefs.fuse.control import DeviceClient, ServerSettings
    from imagefs.origin.connect import Options

_SWITCH_SECONDS = 0.0005
"""Imports hold the interpreter lock in long stretches; the starting thread needs it often and briefly."""

_OPTIONS = {
    "--cache": "cache_dir",
    "--cache-quota": "cache_quota_bytes",
    "--read-deadline": "read_deadline_seconds",
}


class Starting:
    """A thread that makes sure that the device server runs. `client` waits for it."""

    def __init__(self, storage: settings.Storage, origins: Options) -> None:
        from imagefs.fuse import control

        wanted = settings.server_settings(storage, origins)
        self._client: DeviceClient | None = None
        self._error: BaseException | None = None

        def work() -> None:
            try:
                self._client = control.DeviceClient.ensure(wanted)
                _say_differences(wanted)
            except BaseException as exc:
                self._error = exc

        self._thread = threading.Thread(target=work, name="device-server", daemon=True)
        self._thread.start()

    def client(self) -> DeviceClient:
        """The client, once the server takes requests. Raises what its start raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._client is not None
        return self._client


def _say_differences(wanted: ServerSettings) -> None:
    """A server that runs already keeps what it was started with: nobody should think otherwise."""
    from imagefs.fuse import control

    running = control.kept_settings(wanted)
    kept = [f"{option} {running[name]}" for option, name in _OPTIONS.items() if name in running]
    if kept:
        click.echo(
            f"glowplug: the device server of {wanted.state_dir} was started by an earlier mount and keeps "
            f"its {', '.join(kept)} until the last umount",
            err=True,
        )


@contextlib.contextmanager
def starting(storage: settings.Storage, origins: Options) -> Iterator[Starting]:
    """Have the server started. If what it was wanted for fails, and nothing else uses it, it is stopped."""
    sys.setswitchinterval(_SWITCH_SECONDS)
    server = Starting(storage, origins)
    try:
        yield server
    except BaseException:
        with interrupts.deferred(), contextlib.suppress(Exception):
            server.client().stop_if_idle()
        raise
