"""Block images, mounted by the command: `glowplug mount` and `glowplug umount`, as a person would.

Called by `store`, with the store's lock of that image held. Serving reaches images by the command alone; what
it prints on failure is what is told.
"""

from __future__ import annotations

import os
import subprocess
import threading
from pathlib import Path

from serving import detached, errors

_MOUNT_SECONDS = 300.0
_TURN_SECONDS = 0.2
_EXIT_INVALID, _EXIT_NOT_FOUND, _EXIT_DENIED = 3, 4, 5
"""Exit codes that the document must answer for; see docs/cli.md."""


def mount(ref: str, at: Path, stop: threading.Event) -> None:
    """Have the root of an image at `at`. ConfigurationError, DocumentError, UnavailableError."""
    if os.path.ismount(at):
        return
    at.mkdir(mode=0o700, parents=True, exist_ok=True)
    process = subprocess.Popen(
        [*detached.GLOWPLUG, "mount", ref, str(at)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    left = _MOUNT_SECONDS
    while True:
        try:
            _, said = process.communicate(timeout=_TURN_SECONDS)
            break
        except subprocess.TimeoutExpired:
            left -= _TURN_SECONDS
            if left <= 0 or stop.is_set():
                process.terminate()
                process.communicate()
                raise errors.UnavailableError(f"model: oci:{ref} was not mounted in time") from None
    if process.returncode == 0:
        return
    reason = said.strip().rpartition("\n")[2].removeprefix("glowplug: ")
    if process.returncode in (_EXIT_INVALID, _EXIT_NOT_FOUND, _EXIT_DENIED):
        raise errors.DocumentError(
            f"model: {reason}; name an image that has a block image (glowplug convert)"
        )
    raise errors.ConfigurationError(f"model: {reason}")


def umount(at: Path) -> None:
    """Without a mount there, nothing. One that is busy stays, for who comes next."""
    if os.path.ismount(at):
        subprocess.run(
            [*detached.GLOWPLUG, "umount", str(at)], capture_output=True, timeout=_MOUNT_SECONDS, check=False
        )
