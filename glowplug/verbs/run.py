"""`glowplug run REF -- CMD`: a process in an image, in namespaces of its own, fetched as it is read."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from glowplug import opening, settings
from glowplug.verbs.mount import security_options

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
    from glowplug import mounting, namespaces, process
    from imagefs import assembly, errors, mount, mounts, syscalls
    from imagefs.mount import Mode

    if os.geteuid() != 0:
        raise errors.ConfigurationError("run needs root, for its namespaces")
    image, client = mounting.open_with_server(storage, origins, lambda: open_image(ref))
    spec = process.from_config(
        image.config_document(),
        cmd,
        environment=environment,
        directory=workdir,
        user=user,
        terminal=os.environ.get("TERM") if sys.stdin.isatty() else None,
    )
    table = mounts.MountTable(storage.state_dir)
    mounting.collect(table, client)
    record = mounts.Record(
        id=f"run-{os.getpid()}-{mounts.process_start(os.getpid())}",
        directory="",
        reference=ref,
        mode="",
        writable=True,
        pid=os.getpid(),
        pid_start=mounts.process_start(os.getpid()),
        ephemeral=True,
    )
    options = assembly.Options(None if mode == "auto" else Mode(mode), True, suid, dev)
    folder: Path = table.claim(record) / "private"
    try:
        devices = client.attach(record.id, mounting.layer_specs(image), origins)
        namespaces.enter_private_mounts()
        mounting.forget_other_roots(table)
        folder.mkdir()
        syscalls.mount("glowplug", folder, "tmpfs", syscalls.MS_NOSUID | syscalls.MS_NODEV, "mode=700")
        root = folder / "root"
        root.mkdir()
        if assembly.assemble(image, devices, folder, root, options) is None:
            raise errors.ConfigurationError("this kernel cannot mount EROFS, which run needs")
        with namespaces.signals_held():
            code = namespaces.run(root, spec)
    finally:
        mount.unmount_all([folder, folder / "root"])
        mounting.release(record, table, client)
    sys.exit(code)
