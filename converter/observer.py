"""What a conversion tells whoever watches it. Called from any of its threads; returns at once."""

from __future__ import annotations

from typing import Protocol

from converter.source import SourceImage


class Observer(Protocol):
    """A progress display, or `Silent`."""

    def image(self, image: SourceImage) -> None:
        """The layers that follow are of this image."""

    def advanced(self, layer: int, compressed_bytes: int) -> None:
        """So many more bytes of the source blob were read."""

    def converted(self, layer: int, reused: bool) -> None:
        """The layer's blob is made, or was found."""

    def published(self, layer: int) -> None:
        """The layer is in the destination."""


class Silent:
    """Nobody watches."""

    def image(self, image: SourceImage) -> None:
        return

    def advanced(self, layer: int, compressed_bytes: int) -> None:
        return

    def converted(self, layer: int, reused: bool) -> None:
        return

    def published(self, layer: int) -> None:
        return
