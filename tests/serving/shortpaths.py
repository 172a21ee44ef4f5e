"""Directories with short names: a unix socket's path has 107 bytes, and pytest's own directories take
most."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """One for the block, gone after it."""
    directory = Path(tempfile.mkdtemp(prefix="gp-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
