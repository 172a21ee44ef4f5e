"""`glowplug agent upgrade`: this version of ours in place of the one that runs, under running containers."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("upgrade")
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="GLOWPLUG_AGENT_CONFIG",
    show_envvar=True,
    help="The agent's settings (default /etc/glowplug/agent.toml, if it is there).",
)
@click.option("--no-restart", is_flag=True, help="Leave the agent itself as it is.")
def command(file: Path | None, no_restart: bool) -> None:
    """Have the keeper, device server and workers of this glowplug take over from those that run, with the
    settings as they are now; then restart the agent's unit, if it runs.

    Containers read on: what waits for a block is answered by the successor. `install` does the same.
    """
    from agent import config, daemon, host

    if file is None and config.DEFAULT_FILE.exists():
        file = config.DEFAULT_FILE
    settings = config.load(file) if file is not None else config.Settings()
    if daemon.hand_over(settings):
        click.echo(f"the device server of {settings.state} is this version's", err=True)
    else:
        click.echo(f"no device server runs in {settings.state}", err=True)
    if not no_restart:
        host.Systemctl()("try-restart", host.AGENT_UNIT)
        click.echo(f"restarted {host.AGENT_UNIT}, if it ran", err=True)
