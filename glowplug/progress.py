"""Progress on stderr: bars by rich when it is a terminal, nothing when it is not.

rich is imported only when there is something to draw.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from converter import observer

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from converter.source import SourceImage


@contextlib.contextmanager
def conversion() -> Iterator[observer.Observer]:
    """The observer of one conversion."""
    if not sys.stderr.isatty():
        yield observer.Silent()
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
        progress.TextColumn("{task.fields[state]}"),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as display:
        yield _Bars(display)


@contextlib.contextmanager
def total(name: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
    """One bar of `total_bytes`; what it yields is told how many more were done, from any thread."""
    if not sys.stderr.isatty():
        yield lambda done_bytes: None
        return
    from rich import console, progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.DownloadColumn(binary_units=True),
        progress.TransferSpeedColumn(),
    )
    with progress.Progress(*columns, console=console.Console(stderr=True)) as display:
        task = display.add_task(name, total=total_bytes)
        yield lambda done_bytes: display.update(task, advance=done_bytes)


class _Bars:
    """One bar per layer: compressed bytes read."""

    def __init__(self, display: Progress) -> None:
        self._display = display
        self._tasks: list[TaskID] = []

    def image(self, image: SourceImage) -> None:
        self._tasks = [
            self._display.add_task(
                f"{image.platform} {layer.descriptor.digest[7:19]}", total=layer.descriptor.size, state=""
            )
            for layer in image.layers
        ]

    def advanced(self, layer: int, compressed_bytes: int) -> None:
        self._display.update(self._tasks[layer], advance=compressed_bytes)

    def converted(self, layer: int, reused: bool) -> None:
        task = self._tasks[layer]
        size = next(t.total for t in self._display.tasks if t.id == task)
        self._display.update(task, completed=size, state="reused" if reused else "uploading")

    def published(self, layer: int) -> None:
        self._display.update(self._tasks[layer], state="done")
