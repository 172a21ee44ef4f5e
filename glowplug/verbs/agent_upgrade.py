"""`glowplug agent upgrade`: this version of ours in place of the one that runs, under running containers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from glowplug import settings

if TYPE_CHECKING:
    from agent import config


@click.command("upgrade")
@settings.agent_option
@click.option("--no-restart", is_flag=True, help="Leave the agent itself as it is.")
def command(agent_settings: config.Settings, no_restart: bool) -> None:
    """Have the keeper, device server and workers of this glowplug take over from those that run, with the
    settings as they are now; then restart the agent's unit, if it runs.

    Containers read on: what waits for a block is answered by the successor. `install` does the same.
    """
    from agent import daemon, host

    if daemon.hand_over(agent_settings):
        click.echo(f"the device server of {agent_settings.state} is this version's", err=True)
    else:
        click.echo(f"no device server runs in {agent_settings.state}", err=True)
    if not no_restart:
        host.Systemctl()("try-restart", host.AGENT_UNIT)
        click.echo(f"restarted {host.AGENT_UNIT}, if it ran", err=True)
