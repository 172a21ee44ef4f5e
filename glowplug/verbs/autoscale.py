"""`glowplug autoscale`: what the autoscaler decides, and would. Subcommands are imported when called."""

from __future__ import annotations

import importlib

import click

_SUBCOMMANDS = {
    "explain": ("autoscale_explain", "Say what was decided for an endpoint in the last hour, and why."),
    "simulate": ("autoscale_simulate", "Compare autoscaling policies on simulated and real traffic."),
}


class _Subcommands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_SUBCOMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _SUBCOMMANDS:
            return None
        command = importlib.import_module(f"glowplug.verbs.{_SUBCOMMANDS[cmd_name][0]}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in sorted(_SUBCOMMANDS.items())])


@click.group("autoscale", cls=_Subcommands)
def command() -> None:
    """How many replicas an endpoint has, and why."""
