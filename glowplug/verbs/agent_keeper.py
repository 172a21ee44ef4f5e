"""`glowplug agent keeper`: the device server as a unit of its own, apart from the agent."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from glowplug import settings

if TYPE_CHECKING:
    from agent import config


@click.command("keeper")
@settings.agent_option
def command(agent_settings: config.Settings) -> None:
    """Start keeper and device server, if they do not run, in the control group of whoever calls; returns when
    they serve. glowplug-keeper.service does so before the agent starts."""
    from agent import daemon
    from imagefs.fuse.control import DeviceClient

    DeviceClient.ensure(daemon.server_settings(agent_settings, daemon.origin_options(agent_settings)))
