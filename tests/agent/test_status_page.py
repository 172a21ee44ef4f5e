"""The status page: well-formed, complete, and safe whatever an image or a registry put into a text."""

from __future__ import annotations

import html.parser
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import observer, starts, status
from agent.status import waterfall
from tests.agent.outside_world import BLOCK_DIGEST, MAPS, REFERENCE, event, server_status

_VOID = {"meta", "br"}


class _Reader(html.parser.HTMLParser):
    """Elements must close in order; texts and attributes are collected."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag == "p" and self.open[-1] != "p":
            return
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def _status(**changes: Any) -> dict[str, Any]:
    image = {
        "reference": REFERENCE,
        "block_digest": BLOCK_DIGEST,
        "source_digest": "",
        "layers": 3,
        "map_digests": list(MAPS),
        "blob_bytes": 300 << 20,
        "snapshots": 4,
        "pinned": True,
        "prefetched": False,
    }
    return {
        "version": "0.1.0",
        "node": "node-7",
        "pid": 1,
        "up_seconds": 7200.0,
        "not_ready": {},
        "server": server_status(fetched_bytes=100 << 20, peer_bytes=5 << 20),
        "server_error": None,
        "replaced": {"server": 0, "worker": 1, "keeper": 0},
        "misses": {"start": 9, "running": 2},
        "mounts": [{"directory": "/var/lib/glowplug/agent/layers/1", "filesystem": "erofs"}],
        "snapshots": {"active": 1, "committed": 3, "view": 0},
        "quarantined": [],
        "images": [image],
        **changes,
    }


def _started() -> starts.Starts:
    clock = [100.0]
    made = starts.Starts(clock_ns=lambda: int(clock[0] * 1e9), wall_clock=lambda: clock[0])
    made.layers_of = lambda reference: MAPS
    made.on_phase(REFERENCE, "lookup", 0.2)
    clock[0] = 101.0
    made.on_phase(REFERENCE, "mount", 0.1)
    made.absorb([event(number, 101 + number / 50, 101.1 + number / 40) for number in range(1, 60)])
    return made


def _read(page: str) -> _Reader:
    reader = _Reader()
    reader.feed(page)
    assert reader.open == []
    return reader


def _render(page_status: dict[str, Any], events: list[dict[str, Any]] | None = None) -> _Reader:
    return _read(status.render(page_status, _started().to_json(), events or [], 200.0))


def test_everything_is_there_and_nothing_is_loaded() -> None:
    recorder = observer.Recorder(wall_clock=lambda: 190.0)
    recorder.event("quarantined", "a message", level="warning")
    reader = _render(_status(), [each.to_json() for each in recorder.events()])
    text = " ".join(reader.text)
    for part in (
        REFERENCE,
        "node-7",
        "ready",
        "3.0 GiB",
        "100.0 MiB",
        "a message",
        "10.0.0.2:7311",
        "layers/1",
    ):
        assert part in text
    assert set(reader.links) == {"/metrics", "/api/v1/status", "/api/v1/starts", "/api/v1/events"}
    assert "script" not in reader.tags
    assert reader.tags.count("rect") > 59


def test_what_is_wrong_stands_first() -> None:
    changed = _status(
        server=None,
        not_ready={"device server": "it does not answer"},
        quarantined=[{"name": "k8s.io/5/x", "why": "its layer is gone"}],
    )
    text = " ".join(_render(changed).text)
    assert "not ready" in text
    assert text.index("it does not answer") < text.index("its layer is gone") < text.index("Recent starts")


def test_an_agent_that_has_nothing_yet() -> None:
    empty = _status(images=[], snapshots={}, mounts=[], server=None)
    reader = _read(status.render(empty, [], [], 0.0))
    assert "No image was pulled" in " ".join(reader.text)


@given(st.text())
def test_no_text_becomes_markup(text: str) -> None:
    page = _status(node=text, not_ready={text: text}, quarantined=[{"name": text, "why": text}])
    page["images"][0]["reference"] = text
    made = starts.Starts()
    made.on_pull(text, lazy=False, seconds=1, layers=0, reason=text)
    made.on_phase(text, text, 0.1)
    events = [{"at_seconds": 1.0, "level": text, "kind": text, "message": text}]
    rendered = _read(status.render(page, made.to_json(), events, 2.0))
    harmless = _read(
        status.render(
            {**page, "node": "n", "not_ready": {"a": "a"}, "quarantined": [{"name": "b", "why": "b"}]},
            made.to_json(),
            events,
            2.0,
        )
    )
    assert rendered.tags == harmless.tags


_TIMES = st.floats(0, 100)


@given(st.lists(st.tuples(_TIMES, _TIMES), max_size=60), st.floats(0, 1))
def test_bars_of_a_lane_never_overlap(spans: list[tuple[float, float]], gap: float) -> None:
    bars = [{"wanted": min(span), "arrived": max(span)} for span in spans]
    lanes = waterfall.pack(bars, gap)
    for one, lane in enumerate(lanes):
        for other in range(one):
            if lanes[other] == lane:
                first, second = sorted((bars[one], bars[other]), key=lambda bar: bar["wanted"])
                assert first["arrived"] <= second["wanted"] or first["wanted"] == second["wanted"]
    if bars:
        assert set(lanes) == set(range(max(lanes) + 1))


@given(st.floats(1e-4, 1e6))
def test_the_axis_has_a_handful_of_round_marks(span: float) -> None:
    step, end = waterfall.scale(span)
    assert end >= span * (1 - 1e-9)
    assert 2 <= round(end / step) <= 10


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (0.4, "0 s"), (89, "89 s"), (120, "2 min"), (7200, "2 h"), (2e5, "2 d")],
)
def test_durations(seconds: float, text: str) -> None:
    assert status.duration(seconds) == text
