"""`glowplug autoscale`: what the autoscaler decides, and would. Subcommands are imported when called."""

from __future__ import annotations

import click

from glowplug.subcommands import Subcommands

_TEXTS = {
    "explain": "Say what was decided for an endpoint in the last hour, and why.",
    "simulate": "Compare autoscaling policies on simulated and real traffic.",
}
_PLACES = {"explain": "autoscale_explain", "simulate": "autoscale_simulate"}


@click.group("autoscale", cls=Subcommands, texts=_TEXTS, places=_PLACES)
def command() -> None:
    """How many replicas an endpoint has, and why."""
