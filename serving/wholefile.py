"""Replace a file's text at once: who reads it, after a kill at any moment, finds the old one or the new
one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def write(path: Path, text: str) -> None:
    """Make `path` hold `text`. Not synced: what it describes are processes, which a power cut ends as
    well."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        draft.replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
