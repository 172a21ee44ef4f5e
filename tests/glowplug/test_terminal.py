"""Texts that verbs print: harmless ones, and sizes."""

from __future__ import annotations

import pytest

from glowplug import terminal

MEBI = 1 << 20


def test_messages_do_not_drive_the_terminal() -> None:
    assert terminal.printable("a\x1b[2Jb\nc\udcff é") == "a\\x1b[2Jb\\nc\\udcff é"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1 KiB"), (4 * MEBI, "4 MiB"), (1500 * MEBI, "1.46 GiB")],
)
def test_sizes_for_people(value: int, text: str) -> None:
    assert terminal.size(value) == text
