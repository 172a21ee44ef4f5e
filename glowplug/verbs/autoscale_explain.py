"""`glowplug autoscale explain`: why an endpoint that is served here has as many replicas as it has."""

from __future__ import annotations

import json
from pathlib import Path

import click

from glowplug import endpoints
from imagefs import duration


@click.command("explain")
@click.argument("name")
@endpoints.state_option
@click.option("--last", default="1h", show_default=True, help="How far back, an hour at most.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def command(name: str, state_dir: Path, last: str, as_json: bool) -> None:
    """Say what the autoscaler of endpoint NAME decided in the last hour, and why.

    Signal, window, formula, clamps and result of each decision; equal ones after one another are one.
    """
    from serving import client
    from serving.autoscaler import explanation

    since_seconds = duration.parse(last, "--last")
    explained = client.Client(state_dir, name).get("/api/v1/decisions")
    if as_json:
        click.echo(json.dumps(explained, indent=2))
        return
    for line in explanation.lines(name, explained, since_seconds):
        click.echo(line)
