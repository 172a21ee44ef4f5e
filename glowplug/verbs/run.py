"""`glowplug run REF -- CMD`: a process in an image, in namespaces of its own, fetched as it is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from glowplug import opening, settings
from glowplug.verbs.mount import security_options
from imagefs import errors

if TYPE_CHECKING:
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


@click.command("run", context_settings={"ignore_unknown_options": False})
@click.argument("ref")
@click.argument("cmd", metavar="[-- CMD...]", nargs=-1, type=click.UNPROCESSED)
@click.option("-e", "--env", "environment", metavar="K=V", multiple=True, help="Set a variable; repeatable.")
@click.option("-w", "--workdir", metavar="DIR", help="Working directory (default: the image's).")
@click.option("-u", "--user", metavar="USER[:GROUP]", help="Names or numbers (default: the image's user).")
@click.option(
    "--mode",
    type=click.Choice(["auto", "erofs", "loop"]),
    default="auto",
    show_default=True,
    help="As in mount.",
)
@security_options
@settings.storage_options
@settings.origin_options
@opening.image_options
def command(
    ref: str,
    cmd: tuple[str, ...],
    environment: tuple[str, ...],
    workdir: str | None,
    user: str | None,
    mode: str,
    suid: bool,
    dev: bool,
    storage: settings.Storage,
    origins: Options,
    open_image: Callable[[str], LazyImage],
) -> None:
    """Run CMD (default: the image's own command) with the root filesystem of REF.

    In mount, pid, ipc and uts namespaces of its own, on the host's network, as the image's user. What it
    writes is kept in memory and gone when it ends. The exit code is CMD's: 127 when it is not found, 126
    when it cannot be executed, 128 + n when signal n ended it. This is no security boundary.
    """
    if os.geteuid() != 0:
        raise errors.ConfigurationError("run needs root, for its namespaces")
    from glowplug import device_server

    with device_server.starting(storage, origins) as server:
        from glowplug import mounting, process
        from imagefs import assembly
        from imagefs.mount import Mode

        image = open_image(ref)
        spec = process.from_config(
            image.config_document(),
            cmd,
            environment=environment,
            directory=workdir,
            user=user,
            terminal=os.environ.get("TERM") if sys.stdin.isatty() else None,
        )
        options = assembly.Options(None if mode == "auto" else Mode(mode), True, suid, dev)
        code = mounting.run(ref, image, spec, options, storage, origins, server.client())
    sys.exit(code)
