"""The live view: everything of the status is in the picture, and no text of a replica is markup."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from glowplug import liveview


def _picture(**changes: Any) -> str:
    status = {
        "name": "chat",
        "url": "http://127.0.0.1:80",
        "revision": 3,
        "phase": "shifting",
        "weights": {"old": 90, "new": 10},
        "now": 10.0,
        "traffic": [{"at": 1.0, "in_flight": 4, "per_second": 12.5, "errors_per_second": 0.5}],
        "latency": {"p99": 0.094},
        "autoscaling": {"mode": "on", "replicas": 3, "limit": 8, "words": "5 in flight; [red]maximum"},
        "replicas": [
            {
                "name": "r1",
                "state": "failed",
                "version": "new",
                "created_at": 1.0,
                "ready_at": 3.5,
                "in_flight": 4,
                "per_second": 12.5,
                "errors": 7,
                "reason": "[red]ended[/red] with code 7\n  more",
            }
        ],
        "events": [{"at": 1.0, "text": "[bold]started"}],
        **changes,
    }
    said = io.StringIO()
    Console(file=said, width=140).print(liveview.render(status))
    return said.getvalue()


def test_what_there_is_is_shown_as_it_is() -> None:
    picture = _picture()
    assert "autoscaling on: 3 replicas, limit 8: 5 in flight; [red]maximum" in picture
    for text in ("chat", "shifting", "old 90 %", "new 10 %", "12.5 req/s, 4 in flight", "p99 94 ms", "2.5 s"):
        assert text in picture
    assert "[red]ended[/red] with code 7" in picture
    assert "more" not in picture
    assert "[bold]started" in picture


def test_before_the_first_report() -> None:
    assert "no load reports yet" in _picture(traffic=[], latency={})
