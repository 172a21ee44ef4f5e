"""`glowplug router`: the control plane of Envoys, for services that somebody else runs."""

from __future__ import annotations

import json
import logging
import signal
import threading
import types
from pathlib import Path

import click

from glowplug import subcommands


@click.group("router", cls=subcommands.Verbs)
def command() -> None:
    """Tell Envoys what to route where: services from a file, or from Kubernetes."""


@command.command("run")
@click.option(
    "--config", required=True, type=click.Path(dir_okay=False, path_type=Path), help="What is routed."
)
@click.option(
    "--listen",
    help="HOST:PORT for Envoys on other machines; needs --certificate, --key and --client-ca. "
    "[default: a unix socket below --state]",
)
@click.option("--certificate", type=click.Path(path_type=Path), help="Of the control plane, PEM.")
@click.option("--key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option("--client-ca", type=click.Path(path_type=Path), help="The CA of the Envoys, PEM.")
@click.option("--envoy", is_flag=True, help="Run an Envoy here, too.")
@click.option(
    "--state",
    default="/run/glowplug-router",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    help="Sockets, logs and the Envoy's files.",
)
@click.option("--zone", default="", help="The zone of the Envoy here.")
@click.option("--workers", default=0, type=click.IntRange(0), help="Its threads. [default: one per CPU]")
@click.option(
    "--drain-seconds",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0),
    help="How long its requests may go on when it is stopped.",
)
def run(
    config: Path,
    listen: str | None,
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    envoy: bool,
    state: Path,
    zone: str,
    workers: int,
    drain_seconds: float,
) -> None:
    """Route what --config says, and follow it, until SIGTERM.

    Envoys keep their last configuration while this is away.
    """
    from serving.router import control, standalone

    if (certificate is None) != (key is None) or (certificate is None) != (client_ca is None):
        raise click.UsageError("--certificate, --key and --client-ca belong together")
    tls = None
    if certificate is not None and key is not None and client_ca is not None:
        tls = control.ServerTls(certificate, key, client_ca)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    here = standalone.Here(state, zone, workers, drain_seconds) if envoy else None
    standalone.run(config, listen or f"unix:{state}/xds.sock", tls, here, _until_signalled())


@command.command("bootstrap")
@click.option("--node", required=True, help="A name that no other Envoy has.")
@click.option("--control", required=True, help="HOST:PORT of `glowplug router run`, or a unix socket's path.")
@click.option("--zone", default="", help="Where this Envoy is.")
@click.option("--admin", default="/run/envoy/admin.sock", show_default=True, help="Envoy's own socket.")
@click.option("--certificates", help="Directory, at the Envoy, of tls.crt, tls.key and ca.crt.")
@click.option("--server-name", help="A DNS name in the control plane's certificate. [default: HOST]")
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    help="Write envoy.json here, and with --certificates what names them; the Envoy must find them at the "
    "same path. [default: print envoy.json]",
)
@click.option("--state-of-the-world", is_flag=True, help="Send everything at each change, not what changed.")
def bootstrap(
    node: str,
    control: str,
    zone: str,
    admin: str,
    certificates: str | None,
    server_name: str | None,
    output: Path | None,
    state_of_the_world: bool,
) -> None:
    """Make what an Envoy elsewhere is started with (envoy -c envoy.json)."""
    from serving.router import bootstrap as made
    from serving.router import document

    where: str | tuple[str, int] = (
        control if control.startswith("/") else document.place(control, "--control")
    )
    tls = None
    if certificates is not None:
        name = server_name or (where[0] if isinstance(where, tuple) else "")
        if not name:
            raise click.UsageError("--server-name is needed with a unix socket and --certificates")
        if output is None:
            raise click.UsageError("--output is needed with --certificates")
        tls = made.ClientTls(
            certificates,
            str(output),
            f"{certificates}/tls.crt",
            f"{certificates}/tls.key",
            f"{certificates}/ca.crt",
            name,
        )
    settings = made.Settings(node, where, admin, zone, tls, delta=not state_of_the_world)
    if output is None:
        click.echo(json.dumps(made.document(settings), indent=2))
        return
    output.mkdir(parents=True, exist_ok=True)
    secrets = made.secrets(tls) if tls is not None else {}
    for file, document_ in ({"envoy.json": made.document(settings)} | secrets).items():
        (output / file).write_text(json.dumps(document_, indent=2))


def _until_signalled() -> threading.Event:
    """Set by the first SIGTERM or SIGINT, which drains; the second interrupts."""
    stopping = threading.Event()

    def stop(signum: int, frame: types.FrameType | None) -> None:
        stopping.set()
        signal.signal(signum, signal.default_int_handler)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return stopping
