"""`glowplug agent`: the node daemon, and what belongs to it. A subcommand is imported when it is called."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import settings

if TYPE_CHECKING:
    from agent import config

_SUBCOMMANDS = {
    "doctor": ("agent_doctor", "command", "Say what is wrong with this node, and how to mend it."),
    "install": ("agent_install", "install", "Install the agent on this host, for its containerd."),
    "keeper": ("agent_keeper", "command", "Start the device server apart from the agent."),
    "run": ("agent", "run", "Serve containerd's snapshots from block images."),
    "upgrade": ("agent_upgrade", "command", "Have this version take over from the one that runs."),
    "uninstall": ("agent_install", "uninstall", "Undo `install`."),
}


class _Subcommands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        module, name, _ = _SUBCOMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"glowplug.verbs.{module}"), name)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in sorted(_SUBCOMMANDS.items())])


@click.group("agent", cls=_Subcommands)
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
