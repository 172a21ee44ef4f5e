"""`glowplug agent doctor`: what is wrong with this node, and how to mend it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import settings

if TYPE_CHECKING:
    from agent import config

from glowplug import terminal

if TYPE_CHECKING:
    from agent.doctor import Finding

_COLOURS = {"ok": "green", "warning": "yellow", "problem": "red"}


@click.command("doctor")
@click.argument("images", nargs=-1)
@settings.agent_option
@click.option(
    "--containerd-config",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("/etc/containerd/config.toml"),
    show_default=True,
    help="containerd's configuration file.",
)
@click.option("--containerd", default="containerd", help="containerd's program, by name or path.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def command(
    images: tuple[str, ...],
    agent_settings: config.Settings,
    containerd_config: Path,
    containerd: str,
    as_json: bool,
) -> None:
    """Look at this node: kernel, containerd and its configuration, sockets, disks, mounts, registries, clock.

    Each of IMAGES is asked for at its registry, as the agent would; without any, what the node has already.
    Says what is wrong, and how to mend it. Exit code 1 if there is a problem; warnings are none.
    """
    from agent import doctor, doctorprobes

    findings = doctor.examine(doctorprobes.gather(agent_settings, containerd, containerd_config, images))
    if as_json:
        click.echo(json.dumps([finding.to_json() for finding in findings], indent=2))
    else:
        for finding in findings:
            _show(finding)
    if any(finding.level == "problem" for finding in findings):
        sys.exit(1)


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level:8}", fg=_COLOURS[finding.level])
    click.echo(f"{level} {finding.check}: {terminal.printable(finding.found)}")
    if finding.mend:
        click.echo(f"         -> {finding.mend}")
