"""`glowplug agent keeper`: the device server as a unit of its own, apart from the agent."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("keeper")
@click.option(
    "--config",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="GLOWPLUG_AGENT_CONFIG",
    show_envvar=True,
    help="The agent's settings (default /etc/glowplug/agent.toml, if it is there).",
)
def command(file: Path | None) -> None:
    """Start keeper and device server, if they do not run, in the control group of whoever calls; returns when
    they serve. glowplug-keeper.service does so before the agent starts."""
    from agent import config, daemon
    from imagefs.fuse.control import DeviceClient

    if file is None and config.DEFAULT_FILE.exists():
        file = config.DEFAULT_FILE
    settings = config.load(file) if file is not None else config.Settings()
    DeviceClient.ensure(daemon.server_settings(settings, daemon.origin_options(settings)))
