"""Time lines: which line of a real program's output marks what, and what happens when it never gets there."""

from __future__ import annotations

import sys

import pytest

from e2e import timeline
from glowplug.startup import machine

SERVER = (
    "import sys; print('hello', flush=True); print('ready 1', flush=True); sys.stdin.read(); print('end')"
)


def start(script: str) -> timeline.Start:
    moved = iter((100, 350))
    clock = timeline.Clock(lambda: next(moved))
    timeline.follow([sys.executable, "-c", script], clock, mounted=lambda pid: pid > 0)
    return clock.start()


def test_marks_come_in_order_and_the_program_ends_when_its_input_does() -> None:
    measured = start(SERVER)
    assert set(measured.seconds) == set(timeline.MARKS)
    assert 0 < measured.seconds[timeline.FIRST_OUTPUT] <= measured.ready_seconds
    assert measured.moved_bytes == 250


def test_when_ready_is_called_while_the_program_still_runs() -> None:
    seen: list[str] = []
    clock = timeline.Clock(lambda: 0)
    timeline.follow(
        [sys.executable, "-c", SERVER], clock, when_ready=lambda: seen.append("still waits for its input")
    )
    assert len(seen) == 1


def test_a_program_that_fails_is_an_error_with_its_last_words() -> None:
    with pytest.raises(machine.CommandError, match="no such library"):
        start("import sys; sys.exit('no such library')")


def test_a_program_that_never_says_ready_is_an_error() -> None:
    with pytest.raises(machine.CommandError, match="ready"):
        start("print('hello')")
