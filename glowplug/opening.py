"""From the words of a command line to an open block image: shared by the verbs that read one.

A source in docker-archive: or docker-daemon: has no origin to ask; the converter says what its manifest
digest is, and the block image is looked for in --block-repository. imagefs must not know the converter: this
is the seam.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from imagefs import reference

if TYPE_CHECKING:
    from imagefs.image import LazyImage
    from imagefs.origin.connect import Options


def image_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Which block image a REF means, as keyword `open_image`: a function from a REF's text to a LazyImage."""

    @click.option(
        "--platform", metavar="OS/ARCH", help="Image of a multi-platform index (default: this host's)."
    )
    @click.option(
        "--block-repository",
        metavar="REF",
        help="Where the block image is, when it is not beside the source image.",
    )
    @functools.wraps(function)
    def wrapper(
        *args: Any, platform: str | None, block_repository: str | None, origins: Options, **kwargs: Any
    ) -> Any:
        opener = functools.partial(
            open_image, platform=platform, block_repository=block_repository, origins=origins
        )
        return function(*args, origins=origins, open_image=opener, **kwargs)

    return wrapper


def open_image(
    text: str, *, platform: str | None, block_repository: str | None, origins: Options
) -> LazyImage:
    """Open a REF's block image."""
    from imagefs import image, platforms

    ref = reference.parse(text)
    wanted = platforms.parse(platform) if platform else platforms.host()
    source_digest = None
    if ref.transport in ("docker-archive", "docker-daemon"):
        import tempfile

        from converter import source

        with tempfile.TemporaryDirectory(prefix="glowplug-") as folder:
            source_digest = source.open_images(ref, origins, wanted, Path(folder))[0].manifest.digest
    return image.open_image(
        ref,
        platform=wanted,
        block_repository=reference.parse(block_repository) if block_repository else None,
        source_digest=source_digest,
        options=origins,
    )
