"""Debian's docker-registry, behind a link: what starts are measured against.

It listens in the link's server namespace. The client reaches it at the link's speed, and through the delaying
proxy where the link has a round-trip time; a converter or a push on the server's side at full speed. Plain
HTTP. Its storage is a folder of the caller's: what one registry was given, another that serves the same
folder has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from glowplug.startup import link, machine

_PORT = 5000
_DELAYED_PORT = 5001
_CONFIG = """\
version: 0.1
log: {{level: info, accesslog: {{disabled: false}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}"}}
"""
_REQUEST = b'] "'
"""What each line of the access log has once, behind its date, and no other line has."""


@dataclasses.dataclass(frozen=True, slots=True)
class Registry:
    """A running registry. `host` is its HOST:PORT from the server's side, `far_host` from the client's."""

    link: link.Link
    log: Path
    host: str
    far_host: str

    def push(self, source: str, name: str) -> str:
        """Copy an image in, from the server's side; REPOSITORY:TAG becomes HOST:PORT/REPOSITORY:TAG."""
        target = f"{self.host}/{name}"
        plain = ["--src-tls-verify=false", "--dest-tls-verify=false"]
        copy = ["skopeo", "copy", "-q", *plain, source, f"docker://{target}"]
        machine.check_call(self.link.server.command(copy))
        return target

    def requests(self) -> int:
        """Requests answered so far."""
        return self.log.read_bytes().count(_REQUEST)


@contextlib.contextmanager
def serve(over: link.Link, folder: Path, storage: Path) -> Iterator[Registry]:
    """A registry that answers behind a link, its configuration and log in `folder`."""
    log = folder / "registry.log"
    address = f"{link.SERVER_ADDRESS}:{_PORT}"
    far = f"{link.SERVER_ADDRESS}:{_DELAYED_PORT}" if over.speed.rtt_seconds else address
    config = folder / "registry.yaml"
    config.write_text(_CONFIG.format(storage=storage, address=address))
    command = over.server.command(["docker-registry", "serve", str(config)])
    with machine.daemon(command, log) as process, contextlib.ExitStack() as stack:
        machine.await_log(process, log, r"listening on ")
        if far != address:
            stack.enter_context(_delay(over, folder / "delay.log", far, address))
        yield Registry(over, log, address, far)


@contextlib.contextmanager
def _delay(over: link.Link, log: Path, listen: str, to: str) -> Iterator[None]:
    """The delaying proxy, at the server's end."""
    words = ["--listen", listen, "--to", to, "--rtt-seconds", str(over.speed.rtt_seconds)]
    command = over.server.command([sys.executable, "-m", "glowplug.startup.delay", *words])
    with machine.daemon(command, log) as process:
        machine.await_log(process, log, r"(?m)^ready ")
        yield
