"""Groups of commands: what the list of them says, and what a wrong name is answered.

Used by the command itself and by the verbs that have verbs of their own. `Subcommands` are imported when they
are called, so that none pays for another's packages.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Mapping
from typing import Any

import click

_WHOLE_SENTENCE = 1000
"""Characters. click cuts what a list says of a command to the rest of one line."""


class Verbs(click.Group):
    """Commands that are at hand; each is listed with the whole first sentence of its help."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in (names := self.list_commands(ctx)) and not ctx.resilient_parsing:
            close = difflib.get_close_matches(args[0], names, 1)
            if close:
                ctx.fail(f"No such command {args[0]!r}; did you mean {close[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [
                    (name, self.commands[name].get_short_help_str(_WHOLE_SENTENCE))
                    for name in self.list_commands(ctx)
                ]
            )


class Subcommands(Verbs):
    """`texts` is what the list of commands says of each. `places`: which attribute of which module of
    `glowplug.verbs` it is ("agent_install:install"), where that is not `command` of the module with its
    name."""

    def __init__(
        self, *args: Any, texts: Mapping[str, str], places: Mapping[str, str] | None = None, **more: Any
    ) -> None:
        super().__init__(*args, **more)
        self._texts = texts
        self._places = places or {}

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._texts)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._texts:
            return None
        module, _, name = self._places.get(cmd_name, cmd_name).partition(":")
        command = getattr(importlib.import_module(f"glowplug.verbs.{module}"), name or "command")
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(self._texts.items()))
