"""`glowplug bench`: measurements on this machine. A subcommand is imported when it is called."""

from __future__ import annotations

import click

from glowplug.subcommands import Subcommands

_TEXTS = {"startup": "Measure how soon a container is ready: pulled, lazily, with a boot pack."}


@click.group("bench", cls=Subcommands, texts=_TEXTS, places={"startup": "bench_startup"})
def command() -> None:
    """Measure on this machine."""
