"""The observer: what is kept, who is told, and that whoever observes is never hurt; what the log shows."""

from __future__ import annotations

import io
import json
import logging
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import logs, observer


class _Heard:
    def __init__(self) -> None:
        self.said: list[tuple[object, ...]] = []

    def on_event(self, event: observer.Event) -> None:
        self.said.append(("event", event.kind, event.level))

    def on_pull(self, reference: str, *, lazy: bool, seconds: float, layers: int, reason: str | None) -> None:
        self.said.append(("pull", reference, lazy, reason))

    def on_phase(self, reference: str, phase: str, seconds: float) -> None:
        self.said.append(("phase", reference, phase, seconds))

    def on_grpc(self, method: str, code: str, seconds: float) -> None:
        self.said.append(("grpc", method, code))


class _Broken(_Heard):
    def on_event(self, event: observer.Event) -> None:
        raise RuntimeError("no")

    on_pull = on_phase = on_grpc = on_event  # type: ignore[assignment]


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A log of its own for the test, as the agent's is set up; what was there before comes back."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    out = io.StringIO()
    logs.set_up("INFO", "json", out)
    yield out
    root.handlers[:], root.level = before, level


def test_listeners_hear_everything_and_a_broken_one_hurts_nobody() -> None:
    heard = _Heard()
    recorder = observer.Recorder([_Broken(), heard])
    recorder.event("mounted", "x")
    recorder.pulled("r", lazy=True, seconds=0.1, layers=2)
    recorder.phase("r", "mount", 0.5)
    recorder.grpc("Prepare", "OK", 0.1)
    assert heard.said == [
        ("event", "mounted", "info"),
        ("event", "lazy_pull", "info"),
        ("pull", "r", True, None),
        ("phase", "r", "mount", 0.5),
        ("grpc", "Prepare", "OK"),
    ]


@pytest.mark.parametrize(("reason", "level"), [("no block image", "info"), ("unavailable", "warning")])
def test_an_ordinary_pull_is_an_event_with_its_reason(reason: str, level: str) -> None:
    recorder = observer.Recorder()
    recorder.pulled("r", lazy=False, seconds=1, layers=0, reason=reason)
    (event,) = recorder.events()
    assert (event.kind, event.level, event.image) == (observer.ORDINARY_PULL, level, "r")
    assert reason in event.message


def test_the_ring_is_bounded_and_read_on_from_a_number() -> None:
    recorder = observer.Recorder(kept_events=10, wall_clock=lambda: 5.0)
    threads = [
        threading.Thread(target=lambda: [recorder.event("k", "m") for _ in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [event.number for event in recorder.events()] == list(range(191, 201))
    assert [event.number for event in recorder.events(after=198)] == [199, 200]


def test_the_base_class_takes_everything_and_does_nothing() -> None:
    nobody = observer.Observer()
    nobody.event("k", "m", level="error", image="i", anything=1)
    nobody.pulled("r", lazy=False, seconds=1, layers=0, reason="x")
    nobody.phase("r", "lookup", 1)
    nobody.grpc("m", "OK", 1)


def test_an_event_is_one_json_line_with_its_fields(stream: io.StringIO) -> None:
    observer.Recorder().event(
        "quarantined", "it is\nbroken", level="warning", snapshot="s", tries=3, where=stream
    )
    (line,) = stream.getvalue().splitlines()
    document = json.loads(line)
    assert document["level"] == "warning"
    assert document["kind"] == "quarantined"
    assert document["snapshot"] == "s"
    assert document["tries"] == 3
    assert isinstance(document["where"], str)
    assert document["message"] == "it is\nbroken"
    assert document["time"].endswith("Z")


def test_fields_cannot_pass_for_the_line_s_own(stream: io.StringIO) -> None:
    observer.Recorder().event("k", "m", time="never", logger="other")
    document = json.loads(stream.getvalue())
    assert document["time"] != "never"
    assert document["logger"] == "agent.events"


def test_text_lines_stay_lines_and_drive_no_terminal(stream: io.StringIO) -> None:
    logs.set_up("INFO", "text", stream)
    observer.Recorder().event("k", "a\n2026-01-01 forged \x1b[2J", image="img")
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert "image=img" in line


@pytest.mark.parametrize(
    "text",
    [
        "GET failed: Authorization: Bearer {}",
        "Authorization: Basic {}",
        "https://user:{}@registry.example/v2/",
        '{{"token": "{}", "expires_in": 300}}',
        '{{"auth":"{}"}}',
        "https://bucket/key?X-Amz-Signature={}&X-Amz-Date=1",
        "password={}",
        "refresh_token={} and more",
    ],
)
def test_secrets_are_masked(text: str) -> None:
    secret = "c2VjcmV0LXNlY3JldA=="
    shown = logs.masked(text.format(secret))
    assert secret not in shown
    assert logs.MASK in shown


@pytest.mark.parametrize(
    "text",
    [
        "layer sha256:" + "a" * 64 + ": block 3 did not come",
        "docker://registry.example:5000/team/app:v1@sha256:" + "b" * 64,
        "asked for a token and got 401",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert logs.masked(text) == text


@given(st.text())
def test_masking_takes_any_text(text: str) -> None:
    logs.masked(text)


def test_a_traceback_is_in_the_line(stream: io.StringIO) -> None:
    try:
        raise ValueError("password=hunter22")
    except ValueError:
        logging.getLogger("x").exception("failed")
    document = json.loads(stream.getvalue())
    assert "ValueError" in document["exception"]
    assert "hunter22" not in document["exception"]
