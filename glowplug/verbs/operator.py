"""`glowplug operator`: endpoints as custom resources of a Kubernetes namespace."""

from __future__ import annotations

import logging
import signal
import threading
from pathlib import Path

import click

from glowplug import endpoints, subcommands


@click.group("operator", cls=subcommands.Verbs)
def command() -> None:
    """Serve the ModelEndpoints of a Kubernetes namespace."""


@command.command("run")
@click.option(
    "--listen",
    default="0.0.0.0:18000",
    show_default=True,
    help="HOST:PORT for the Envoys, with the three files; or unix:PATH for one beside this process.",
)
@click.option("--certificate", type=click.Path(path_type=Path), help="Of the control plane, PEM.")
@click.option("--key", type=click.Path(path_type=Path), help="Its key, PEM.")
@click.option("--client-ca", type=click.Path(path_type=Path), help="The CA of the Envoys, PEM.")
@click.option("--namespace", help="Whose endpoints are served. [default: the pod's, or the context's]")
@click.option(
    "--metrics",
    "metrics_address",
    metavar="ADDRESS:PORT",
    default="127.0.0.1:7312",
    show_default=True,
    callback=endpoints.parse_address,
    help="Where /metrics listens; port 0 takes a free one, 'none' is nowhere.",
)
@click.option(
    "--state",
    default="/run/glowplug-operator",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    help="What the autoscalers remember while this runs.",
)
def run(
    listen: str,
    certificate: Path | None,
    key: Path | None,
    client_ca: Path | None,
    namespace: str | None,
    metrics_address: tuple[str, int] | None,
    state: Path,
) -> None:
    """Serve every ModelEndpoint, until SIGTERM; replicas and Envoys go on without this.

    Of several, one leads and the others wait. The cluster is the pod's, or kubectl's current context.
    """
    from serving.operator import process
    from serving.router import control

    tls = None
    if certificate is not None and key is not None and client_ca is not None:
        tls = control.ServerTls(certificate, key, client_ca)
    elif certificate is not None or key is not None or client_ca is not None:
        raise click.UsageError("--certificate, --key and --client-ca belong together")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    state.mkdir(mode=0o700, parents=True, exist_ok=True)
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    process.run(process.Options(listen, tls, state, namespace, metrics_address), stopping)


@command.command("crd")
def crd() -> None:
    """Print the CustomResourceDefinition of endpoints, YAML."""
    import yaml

    from serving.operator import definition

    click.echo(yaml.safe_dump(definition.document(), sort_keys=False, width=110), nl=False)
