"""`glowplug endpoint`: look at a document, and at an endpoint that is being served; change it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from glowplug import endpoints, subcommands
from glowplug.verbs import endpoint_stress

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_document_argument = click.argument("document", type=click.Path(exists=True, dir_okay=False, path_type=Path))
_FOLLOW_SECONDS = 0.5


@click.group("endpoint", cls=subcommands.Verbs)
def command() -> None:
    """Look at an endpoint document, and at an endpoint that `glowplug serve` serves here; change it."""


@command.command()
@_document_argument
def validate(document: Path) -> None:
    """Say what is wrong with DOCUMENT: every key, with its line and the remedy (exit code 3)."""
    from serving import changes, endpoint

    found = endpoint.load(_text(document), str(document))
    click.echo(f"{found.name}: valid; version {changes.version(found)}")


@command.command()
def schema() -> None:
    """Print the document's JSON schema."""
    from serving import endpoint

    click.echo(json.dumps(endpoint.json_schema(), indent=2))


@command.command()
@_document_argument
@endpoints.state_option
@_json_option
def plan(document: Path, state_dir: Path, as_json: bool) -> None:
    """Say what `apply` of DOCUMENT would change, and which of it restarts replicas."""
    name, text = _named(document)
    answer = _client(state_dir, name).post("/api/v1/plan", {"document": text, "where": str(document)})
    _show_changes(answer, as_json)


@command.command()
@_document_argument
@endpoints.state_option
@click.option("--wait", is_flag=True, help="Until the update is through; exit code 1 if it was rolled back.")
@_json_option
def apply(document: Path, state_dir: Path, wait: bool, as_json: bool) -> None:
    """Make DOCUMENT the one in force. Replicas are replaced, without downtime, only where the plan says
    so."""
    name, text = _named(document)
    client = _client(state_dir, name)
    answer = client.post("/api/v1/apply", {"document": text, "where": str(document)})
    _show_changes(answer, as_json)
    if wait:
        _wait(client, answer["revision"])


@command.command()
@click.argument("name")
@endpoints.state_option
@click.option("--watch", is_flag=True, help="Keep showing it.")
@_json_option
def status(name: str, state_dir: Path, watch: bool, as_json: bool) -> None:
    """Show the endpoint NAME: versions, replicas, traffic, events."""
    client = _client(state_dir, name)
    if as_json:
        click.echo(json.dumps(client.get("/api/v1/status"), indent=2))
        return
    from rich.console import Console

    from glowplug import liveview

    if watch:
        liveview.watch(lambda: client.get("/api/v1/status"))
    else:
        Console().print(liveview.render(client.get("/api/v1/status")))


@command.command("list")
@endpoints.state_option
def list_(state_dir: Path) -> None:
    """Name the endpoints of this machine."""
    from serving import client

    for name in client.served(state_dir):
        click.echo(name)


@command.command()
@click.argument("name")
@click.argument("replica", default="")
@endpoints.state_option
@click.option("--lines", type=click.IntRange(1, 10_000), default=100, show_default=True)
def logs(name: str, replica: str, state_dir: Path, lines: int) -> None:
    """Print the last lines that REPLICA (all, if left out) of endpoint NAME wrote."""
    found = _client(state_dir, name).get(f"/api/v1/logs?replica={replica}&lines={lines}")["logs"]
    for each, text in found.items():
        for line in text:
            click.echo(line if replica else f"{each}  {line}")


@command.command()
@click.argument("name")
@endpoints.state_option
@_json_option
def rollback(name: str, state_dir: Path, as_json: bool) -> None:
    """Go back to the document that was in force before, as an update without downtime."""
    _show_changes(_client(state_dir, name).post("/api/v1/rollback"), as_json)


@command.command()
@click.argument("name")
@click.argument("replicas", type=click.IntRange(min=0))
@endpoints.state_option
def scale(name: str, replicas: int, state_dir: Path) -> None:
    """Have REPLICAS replicas of endpoint NAME, until the next document is applied."""
    _client(state_dir, name).post("/api/v1/scale", {"replicas": replicas})


@command.command()
@click.argument("name")
@endpoints.state_option
def delete(name: str, state_dir: Path) -> None:
    """Drain endpoint NAME, end it, forget it."""
    _client(state_dir, name).post("/api/v1/delete")


command.add_command(endpoint_stress.stress)


def _client(state_dir: Path, name: str) -> Any:
    from serving import client

    return client.Client(state_dir, name)


def _text(document: Path) -> str:
    return document.read_text(errors="surrogateescape")


def _named(document: Path) -> tuple[str, str]:
    """The endpoint's name and the document's text; what is wrong is said here, without a server."""
    from serving import endpoint

    text = _text(document)
    return endpoint.load(text, str(document)).name, text


def _show_changes(answer: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for each in answer["changes"]:
        click.echo(f"{each['effect']:8}{each['key']}: {json.dumps(each['old'])} -> {json.dumps(each['new'])}")
    if not answer["changes"]:
        click.echo("nothing changes", err=True)
    elif answer["restarts"]:
        click.echo("replicas are replaced, one version after the other, without downtime", err=True)
    else:
        click.echo("no replica restarts", err=True)


def _wait(client: Any, revision: int) -> None:
    """Until the traffic is on this revision's version, or was rolled back from it."""
    while True:
        status = client.get("/api/v1/status")
        if status["revision"] != revision:
            click.echo(status["note"] or f"revision {status['revision']} was applied meanwhile", err=True)
            raise SystemExit(1)
        if status["phase"] == "steady" and status["stable"] == status["version"]:
            return
        time.sleep(_FOLLOW_SECONDS)
