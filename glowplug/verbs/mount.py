"""`glowplug mount REF DIR`: an image's root filesystem at DIR, fetched as it is read."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from glowplug import opening, settings

if TYPE_CHECKING:
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


def security_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--suid` and `--dev`, for the verbs that mount."""

    @click.option("--suid", is_flag=True, help="Honour setuid bits and file capabilities.")
    @click.option("--dev", is_flag=True, help="Honour device nodes.")
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@click.command("mount")
@click.argument("ref")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, readable=False))
@click.option("--rw", "writable", is_flag=True, help="A writable overlay; changes go when it is unmounted.")
@click.option(
    "--mode",
    type=click.Choice(["auto", "erofs", "loop", "fuse"]),
    default="auto",
    show_default=True,
    help="EROFS on plain files, on loop devices, or a file-level FUSE mount.",
)
@security_options
@settings.storage_options
@settings.origin_options
@opening.image_options
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    ref: str,
    directory: Path,
    writable: bool,
    mode: str,
    suid: bool,
    dev: bool,
    storage: settings.Storage,
    origins: Options,
    open_image: Callable[[str], LazyImage],
    as_json: bool,
) -> None:
    """Mount the root filesystem of REF at DIR.

    Only the block maps and the layers' metadata are fetched now, file contents when they are read. Without
    root, or where the kernel has no EROFS, the mount is a FUSE filesystem of files (--mode fuse).
    """
    from glowplug import device_server

    # Without the kernel's EROFS there is no use for the device server.
    in_kernel = mode in ("erofs", "loop") or (mode == "auto" and os.geteuid() == 0)
    starting = device_server.starting(storage, origins) if in_kernel else contextlib.nullcontext()
    with starting as server:
        from glowplug import mounting
        from imagefs import assembly
        from imagefs.mount import Mode

        options = assembly.Options(None if mode == "auto" else Mode(mode), writable, suid, dev)
        image, place, choice = mounting.mount(
            ref, directory, options, storage, origins, lambda: open_image(ref), server
        )
    if as_json:
        import json

        click.echo(json.dumps(mounting.report(ref, image, place, choice, options), indent=2))
    else:
        click.echo(
            f"{ref}: {len(image.layers)} layers mounted at {place} (mode {choice.mode}: {choice.why})",
            err=True,
        )
