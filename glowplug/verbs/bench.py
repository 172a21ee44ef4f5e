"""`glowplug bench`: measurements on this machine. A subcommand is imported when it is called."""

from __future__ import annotations

import importlib

import click

_SUBCOMMANDS = {
    "startup": ("bench_startup", "Measure how soon a container is ready: pulled, lazily, with a boot pack."),
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


@click.group("bench", cls=_Subcommands)
def command() -> None:
    """Measure on this machine."""
