"""`glowplug umount DIR`: undo `glowplug mount`."""

from __future__ import annotations

from pathlib import Path

import click

from glowplug import settings


@click.command("umount")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, readable=False))
@click.option("--force", is_flag=True, help="Unmount even if processes still use it; their reads may fail.")
@settings.state_option
def command(directory: Path, force: bool, state_dir: Path) -> None:
    """Unmount DIR, which `glowplug mount` mounted, and release what it held.

    Also cleans up after a crash, and may be repeated. A mount in use is left alone, and who uses it is said.
    """
    from glowplug import mounting

    mounting.umount(directory, state_dir, force=force)
