"""`glowplug serve ENDPOINT.yaml`: replicas, Envoy and the control plane of one endpoint, on this machine."""

from __future__ import annotations

import logging
import signal
import sys
import threading
import types
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import endpoints

if TYPE_CHECKING:
    from serving.server import Server


@click.command("serve")
@click.argument("document", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@endpoints.state_option
@click.option(
    "--status",
    "status_address",
    metavar="ADDRESS:PORT",
    default="127.0.0.1:7311",
    show_default=True,
    callback=endpoints.parse_address,
    help="Where the status page and /metrics listen; port 0 takes a free one, 'none' is nowhere.",
)
@click.option("--plain", is_flag=True, help="Log lines instead of the live view, also on a terminal.")
def command(document: Path, state_dir: Path, status_address: tuple[str, int] | None, plain: bool) -> None:
    """Serve the endpoint that DOCUMENT describes, until Ctrl-C, which drains.

    Killed and started again, it takes over the replicas and the Envoy that went on meanwhile.
    """
    from serving import endpoint, server

    wanted = endpoint.load(document.read_text(errors="surrogateescape"), str(document))
    live = sys.stderr.isatty() and not plain
    logging.basicConfig(
        level=logging.WARNING if live else logging.INFO, format="%(asctime)s %(levelname)s %(message)s"
    )
    running = server.Server(wanted, server.Options(state_dir, status_address))
    running.start()
    host, port = running.address
    if running.status_address is not None:
        click.echo("status page: http://{}:{}".format(*running.status_address), err=True)
    click.echo(f"http://{host}:{port}")
    sys.stdout.flush()

    def end(signum: int, frame: types.FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait
        running.stop()

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)
    if live:
        threading.Thread(target=_watch, args=(running,), name="live-view", daemon=True).start()
    running.run()


def _watch(running: Server) -> None:
    from glowplug import liveview

    liveview.watch(running.status)
