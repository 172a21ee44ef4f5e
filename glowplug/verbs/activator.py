"""`glowplug activator`: the process that holds requests while a service has no replica."""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import click

from imagefs import duration

if TYPE_CHECKING:
    from serving.activator import choice


@click.command("activator", context_settings={"show_default": True})
@click.option(
    "--service",
    "services",
    multiple=True,
    required=True,
    metavar="NAME=ADDRESS:PORT",
    help="A service, and where to take its requests; repeat for more.",
)
@click.option(
    "--control",
    required=True,
    metavar="HOST:PORT|unix:PATH",
    help="The router that endpoints come from and load goes to.",
)
@click.option("--control-ca", type=click.Path(path_type=Path), help="CA of the router's certificate (PEM).")
@click.option("--control-cert", type=click.Path(path_type=Path), help="Our certificate for the router (PEM).")
@click.option("--control-key", type=click.Path(path_type=Path), help="Its key (PEM).")
@click.option("--name", default=None, help="Tells activators of one router apart (default: host name).")
@click.option("--max-held", default=1000, help="Requests of a service that wait at a time.")
@click.option("--deadline", default="60s", help="How long a request may wait.")
@click.option("--concurrency", default=16, help="Requests in flight from here to each replica.")
@click.option("--health-path", default="/readyz", help="A replica that answers it with 200 is up.")
@click.option("--drain", default="30s", help="Time for what waits when told to end.")
@click.option("--metrics", metavar="ADDRESS:PORT", help="Serve Prometheus metrics there.")
def command(
    services: tuple[str, ...],
    control: str,
    control_ca: Path | None,
    control_cert: Path | None,
    control_key: Path | None,
    name: str | None,
    max_held: int,
    deadline: str,
    concurrency: int,
    health_path: str,
    drain: str,
    metrics: str | None,
) -> None:
    """Hold requests while a service has no replica, until one is up.

    The router gives the activator's addresses to Envoy at a lower priority than any replica: requests come
    here exactly while no replica is healthy. Each waits its turn, bounded in number and time, and how many
    wait is reported to the router at once: it is the demand that starts the first replica.
    """
    from serving.activator import hold, process

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    tls = None
    if control_ca is not None and control_cert is not None and control_key is not None:
        tls = process.Tls(control_cert, control_key, control_ca)
    elif control_ca or control_cert or control_key:
        raise click.UsageError("--control-ca, --control-cert and --control-key belong together")
    elif not control.startswith("unix:"):
        raise click.UsageError("a router over TCP needs --control-ca, --control-cert and --control-key")
    if concurrency < 1:
        raise click.BadParameter("must be at least 1", param_hint="--concurrency")
    listens = dict(_service(each) for each in services)
    if len(listens) != len(services):
        raise click.BadParameter("a service is there twice", param_hint="--service")
    process.run(
        process.Settings(
            name=name or socket.gethostname(),
            control=control,
            services=listens,
            limits=hold.Limits(max_held, duration.parse(deadline, "--deadline")),
            concurrency=concurrency,
            health_path=health_path,
            drain_seconds=duration.parse(drain, "--drain"),
            metrics=_place(metrics, "--metrics") if metrics else None,
            tls=tls,
        )
    )


def _service(text: str) -> tuple[str, choice.Place]:
    name, equals, place = text.partition("=")
    if not name or not equals:
        raise click.BadParameter(f"{text!r} is not NAME=ADDRESS:PORT", param_hint="--service")
    return name, _place(place, "--service")


def _place(text: str, option: str) -> choice.Place:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise click.BadParameter(f"{text!r} is not ADDRESS:PORT", param_hint=option)
    return host.removeprefix("[").removesuffix("]"), int(port)
