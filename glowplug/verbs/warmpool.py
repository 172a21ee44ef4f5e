"""`glowplug warmpool`: nodes that are ready before they are needed."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import subcommands
from glowplug.verbs import warmpool_backtest

if TYPE_CHECKING:
    from warmpool.settings import Settings

_MAX_ANSWER_BYTES = 32 << 20
_ANSWER_SECONDS = 10.0

_config = click.option(
    "--config",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="The pool: provider, demand, policy.",
)


@click.group("warmpool", cls=subcommands.Verbs)
def command() -> None:
    """Hold nodes ready: as many as are worth it, with the images cached that they will need."""


command.add_command(warmpool_backtest.command)


@command.command("run")
@_config
@click.option("--dry-run", is_flag=True, help="Look and decide, show it, and change nothing.")
def run(config: Path, dry_run: bool) -> None:
    """Keep the pool, until SIGTERM. Several may run: one acts.

    What is held stays held when this ends, or is killed.
    """
    from warmpool import shell

    settings = _read(config)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    shell.run(settings, dry_run=dry_run)


@command.command("plan")
@_config
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document.")
def plan(config: Path, as_json: bool) -> None:
    """Look once, and say what `run` would do now. Changes nothing; may be asked beside a running
    controller."""
    from warmpool import errors, shell, view

    settings = _read(config)
    report = shell.once(settings)
    status = view.document(settings.name, report, (), {})
    if as_json:
        click.echo(json.dumps(status, indent=2))
    elif report.decision is not None:
        _show(status)
        for each in status["orders"]:
            click.echo(f"would: {each['node_class']}: {each['text']}")
        if not status["orders"]:
            click.echo("nothing to do")
    if report.decision is None:
        raise errors.UnavailableError("; ".join(f"{place}: {what}" for place, what in report.trouble.items()))


@command.command("explain")
@click.option(
    "--status",
    "address",
    default="127.0.0.1:7320",
    show_default=True,
    help="HOST:PORT of a running controller (status.listen).",
)
@click.option("--json", "as_json", is_flag=True, help="Print its whole status as JSON.")
def explain(address: str, as_json: bool) -> None:
    """Why the pools of a running controller have their sizes, and what happened lately."""
    status = _ask(address)
    if as_json:
        click.echo(json.dumps(status, indent=2))
        return
    _show(status)
    click.echo(f"{'acts' if status['leading'] else 'does not act'}; leader: {status['holder'] or 'unknown'}")
    for each in status["events"]:
        click.echo(f"{each['at']:.0f} {each['node_class'] or '-'}: {each['text']}")


def _show(status: dict[str, Any]) -> None:
    from glowplug import terminal
    from warmpool import view

    for pool in status["pools"]:
        for line in view.explained(pool):
            click.echo(terminal.printable(line))
    for place, what in status["trouble"].items():
        click.echo(terminal.printable(f"{place}: {what}"), err=True)


def _read(config: Path) -> Settings:
    from warmpool import document, errors

    try:
        return document.parse(config.read_text(), str(config))
    except (OSError, UnicodeDecodeError) as exc:
        raise errors.ConfigurationError(f"--config: {config}: {exc}") from exc


def _ask(address: str) -> dict[str, Any]:
    import http.client

    from warmpool import errors

    host, _, port = address.rpartition(":")
    try:
        connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_ANSWER_SECONDS)
        connection.request("GET", "/api/v1/status")
        answer = connection.getresponse()
        found = json.loads(answer.read(_MAX_ANSWER_BYTES))
        connection.close()
    except (OSError, ValueError, http.client.HTTPException) as exc:
        raise errors.UnavailableError(
            f"--status: no warm pool controller answers at {address} ({exc}): is `glowplug warmpool run` up, "
            "and is this its status.listen?"
        ) from exc
    if not isinstance(found, dict) or "pools" not in found:
        raise errors.UnavailableError(f"--status: {address} is no warm pool controller")
    return found
