"""Debian's docker-registry, behind a link: what the demo and the benchmark pull from.

It listens in the link's server namespace: the client reaches it at the link's speed, a converter or a push
on the server's side at full speed. Plain HTTP. Ended, and its storage removed with `folder`, by the caller.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

from e2e import workloads
from glowplug.startup import link, machine

PORT = 5000

_CONFIG = """\
version: 0.1
log: {{level: warn, accesslog: {{disabled: true}}}}
storage: {{filesystem: {{rootdirectory: {storage}}}, delete: {{enabled: true}}}}
http: {{addr: "0.0.0.0:{port}"}}
"""

_WAIT = """\
import socket, sys, time
for _ in range(200):
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[1])), 1).close()
        sys.exit(0)
    except OSError:
        time.sleep(0.05)
sys.exit("the registry does not answer")
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Registry:
    """A running registry. `host` is its HOST:PORT, the same from both ends of the link."""

    link: link.Link

    @property
    def host(self) -> str:
        """HOST:PORT in a REF."""
        return f"{link.SERVER_ADDRESS}:{PORT}"

    def push(self, workload: workloads.Workload, folder: str = "demo") -> str:
        """Copy a workload's image in, from the server's side; its REF without the transport."""
        name = f"{self.host}/{folder}/{workload.name}:{workloads.TAG}"
        copy = ["skopeo", "copy", "-q", "--dest-tls-verify=false", workload.source, f"docker://{name}"]
        machine.check_call(self.link.server.command(copy))
        return name


@contextlib.contextmanager
def serve(over: link.Link, folder: Path) -> Iterator[Registry]:
    """A registry that answers, its storage, configuration and log in `folder`."""
    config = folder / "registry.yaml"
    config.write_text(_CONFIG.format(storage=folder / "registry", port=PORT))
    command = over.server.command(["docker-registry", "serve", str(config)])
    with machine.daemon(command, folder / "registry.log"):
        machine.check_call(over.server.command([sys.executable, "-c", _WAIT, str(PORT)]))
        yield Registry(over)
