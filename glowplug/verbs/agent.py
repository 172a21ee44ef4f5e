"""`glowplug agent`: the node daemon, and what belongs to it. A subcommand is imported when it is called."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import settings
from glowplug.subcommands import Subcommands

if TYPE_CHECKING:
    from agent import config

_TEXTS = {
    "doctor": "Say what is wrong with this node, and how to mend it.",
    "install": "Install the agent on this host, for its containerd.",
    "keeper": "Start the device server apart from the agent.",
    "run": "Serve containerd's snapshots from block images.",
    "upgrade": "Have this version take over from the one that runs.",
    "uninstall": "Undo `install`.",
}
_PLACES = {
    "doctor": "agent_doctor",
    "install": "agent_install:install",
    "keeper": "agent_keeper",
    "run": "agent:run",
    "upgrade": "agent_upgrade",
    "uninstall": "agent_install:uninstall",
}


@click.group("agent", cls=Subcommands, texts=_TEXTS, places=_PLACES)
def command() -> None:
    """The node agent: containerd starts containers from block images."""


@click.command("run")
@settings.agent_option
@click.option(
    "--root",
    type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
    help="What survives a reboot.",
)
@click.option(
    "--state", type=click.Path(file_okay=False, path_type=Path, resolve_path=True), help="What does not."
)
@click.option(
    "--socket", type=click.Path(path_type=Path, resolve_path=True), help="For containerd's proxy plugin."
)
def run(agent_settings: config.Settings, root: Path | None, state: Path | None, socket: Path | None) -> None:
    """Serve containerd's snapshots API, lazily where an image has a block image.

    Runs until SIGTERM; running containers keep their files then, and also when it is killed.
    """
    from agent import daemon

    daemon.run(
        dataclasses.replace(
            agent_settings,
            root=root or agent_settings.root,
            state=state or agent_settings.state,
            socket=socket or agent_settings.socket,
        )
    )
