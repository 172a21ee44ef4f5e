"""`glowplug agent install` and `uninstall`: the agent as a service of this host, which containerd uses."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from agent.containerdconfig import Mode
    from agent.host import Change

_F = TypeVar("_F", bound=Callable[..., Any])


def _host_options(function: _F) -> _F:
    options = [
        click.option(
            "--containerd-config",
            type=click.Path(dir_okay=False, path_type=Path),
            default=Path("/etc/containerd/config.toml"),
            show_default=True,
            help="containerd's configuration file.",
        ),
        click.option("--containerd", default="containerd", help="containerd's program, by name or path."),
        click.option(
            "--root-prefix",
            type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
            default=Path("/"),
            help="Where the host's /etc is, if not in /.",
        ),
        click.option("--systemctl", default="systemctl", hidden=True),
        click.option("--no-restart", is_flag=True, help="Change files only: start and restart nothing."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command("install")
@click.option(
    "--config",
    "settings_source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Settings to install as /etc/glowplug/agent.toml; by default those that are there stay.",
)
@click.option(
    "--mode",
    type=click.Choice(["default", "runtime-class"]),
    default="default",
    show_default=True,
    help="default: all pods; runtime-class: only those whose RuntimeClass has the handler glowplug.",
)
@click.option("--dry-run", is_flag=True, help="Show what would change, as a diff, and change nothing.")
@_host_options
def install(settings_source: Path | None, mode: Mode, dry_run: bool, **host: Any) -> None:
    """Install the agent on this host: its settings, its units, and what containerd's configuration needs.

    containerd is restarted if its configuration changed (containers go on running), and asked whether it
    reaches the agent. If anything fails, everything is put back. The same command again changes nothing.
    """
    from agent import install as installing

    change = _change(settings_source=settings_source, **host)
    if dry_run:
        click.echo(installing.preview(change.host, mode), nl=False)
    else:
        installing.install(change, mode)


@click.command("uninstall")
@click.option("--force", is_flag=True, help="Also while containers use the snapshotter.")
@_host_options
def uninstall(force: bool, **host: Any) -> None:
    """Undo `install`: containerd's configuration as it was, units stopped and removed.

    Refused while containers use the snapshotter (exit code 9). Settings, database and cache stay.
    """
    from agent import uninstall as uninstalling

    uninstalling.uninstall(_change(settings_source=None, **host), force=force)


def _change(
    settings_source: Path | None,
    containerd_config: Path,
    containerd: str,
    root_prefix: Path,
    systemctl: str,
    no_restart: bool,
) -> Change:
    from agent import containerdprobe
    from agent.host import Change, Host, Systemctl

    # As it was called, links unresolved: behind /opt/glowplug/current comes the next version.
    host = Host(
        program=Path(os.path.abspath(sys.argv[0])),
        containerd=containerdprobe.find_program(containerd),
        containerd_config=Path(os.path.abspath(containerd_config)),
        settings_source=settings_source,
        prefix=root_prefix,
    )
    return Change(host, Systemctl(systemctl), lambda line: click.echo(line, err=True), restart=not no_restart)
