"""The document of `glowplug warmpool`: one YAML text in, one frozen `Settings` out, or an error that names
key, line and remedy. Pure.

Called by the verbs. No file is opened here that the document names. How it is read, and how errors are
worded, is `documents`.
"""

from __future__ import annotations

from documents import reading
from warmpool import errors
from warmpool.settings import Settings

MAX_DOCUMENT_BYTES = 1 << 20


def parse(text: str, where: str) -> Settings:
    """The settings in a YAML text. InvalidInputError with `where`, line, key and remedy."""
    if len(text) > MAX_DOCUMENT_BYTES:
        raise errors.InvalidInputError(f"{where}: over {MAX_DOCUMENT_BYTES} bytes: no document of ours")
    try:
        return reading.load(text, where, Settings, called="the document", example="name: gpu")
    except reading.InvalidError as exc:
        raise errors.InvalidInputError(str(exc)) from exc
