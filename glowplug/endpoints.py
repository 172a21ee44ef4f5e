"""What the endpoint verbs share: where endpoints keep their state, and how an address is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])


def default_state_dir() -> Path:
    """/var/lib/glowplug/endpoints, or below the user's state directory when not root."""
    if os.geteuid() == 0:
        return Path("/var/lib/glowplug/endpoints")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "glowplug" / "endpoints"


def state_option(function: _F) -> _F:
    """`--state DIR`, as keyword `state_dir`."""
    return click.option(
        "--state",
        "state_dir",
        type=click.Path(file_okay=False, path_type=Path, resolve_path=True),
        envvar="GLOWPLUG_ENDPOINTS",
        show_envvar=True,
        show_default=False,
        default=default_state_dir,
        help="Where endpoints keep their state (default /var/lib/glowplug/endpoints).",
    )(function)


def parse_address(ctx: click.Context, param: click.Parameter, value: str) -> tuple[str, int] | None:
    """ADDRESS:PORT, or None for 'none'."""
    if value == "none":
        return None
    host, colon, port = value.rpartition(":")
    if not colon or not host or not (port.isascii() and port.isdigit() and int(port) < 65_536):
        raise click.BadParameter(
            f"{value!r} is not ADDRESS:PORT, as in 127.0.0.1:7311, nor 'none'", ctx, param
        )
    return host.strip("[]"), int(port)
