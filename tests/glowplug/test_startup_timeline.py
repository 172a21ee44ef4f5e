"""Time lines: what of a real program's output marks what, and what happens when it never gets there."""

from __future__ import annotations

import re
import sys

import pytest

from glowplug.startup import machine, result, timeline
from glowplug.until import Until

SERVER = (
    "import sys; print('hello', flush=True); print('ready 1', flush=True); sys.stdin.read(); print('end')"
)
READY = Until(log=re.compile(b"^ready"))


def start(script: str, until: Until = READY, watch: timeline.Watch | None = None) -> result.Start:
    moved, answered = iter((100, 350)), iter((3, 5))
    clock = timeline.Clock(lambda: next(moved), lambda: next(answered))
    timeline.follow([sys.executable, "-c", script], clock, until, watch or timeline.Watch())
    return clock.start()


def test_marks_come_in_order_and_bytes_and_requests_are_those_of_the_start() -> None:
    measured = start(SERVER, watch=timeline.Watch(mounted=lambda pid: pid > 0))
    assert set(measured.seconds) == set(result.MARKS)
    assert 0 < measured.seconds[result.FIRST_OUTPUT] <= measured.ready_seconds
    assert measured.moved_bytes == 250
    assert measured.requests == 2
    assert measured.flow[-1] == (measured.ready_seconds, 250)


def test_when_ready_is_called_while_the_program_still_runs_and_then_it_ends() -> None:
    seen: list[str] = []
    calls = timeline.Watch(
        mounted=lambda pid: True,
        when_mounted=lambda: seen.append("mounted"),
        when_ready=lambda: seen.append("still waits for its input"),
        end=lambda: seen.append("end"),
    )
    start("import time; time.sleep(0.3); " + SERVER, watch=calls)
    assert seen == ["mounted", "still waits for its input", "end"]


def test_who_prints_was_mounted_however_late_it_was_seen() -> None:
    clock = timeline.Clock(lambda: 0, lambda: 0)
    for mark in (result.FIRST_OUTPUT, result.MOUNTED, result.READY):
        clock.mark(mark)
    marks = clock.start().seconds
    assert marks[result.MOUNTED] == marks[result.FIRST_OUTPUT] <= marks[result.READY]


def test_without_another_sign_the_end_is_ready() -> None:
    assert start("pass", Until()).seconds.keys() == {result.READY}


@pytest.mark.parametrize("until", [READY, Until()])
def test_a_program_that_fails_is_an_error_with_its_last_words(until: Until) -> None:
    with pytest.raises(machine.CommandError, match="no such library"):
        start("import sys; sys.exit('no such library')", until)


def test_a_program_that_never_says_ready_is_an_error() -> None:
    with pytest.raises(machine.CommandError, match="ready"):
        start("print('hello')")
