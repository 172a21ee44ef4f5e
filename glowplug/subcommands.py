"""A group of commands that are imported when they are called, so that none pays for another's packages.

Used by the command itself and by the verbs that have verbs of their own.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class Subcommands(click.Group):
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
