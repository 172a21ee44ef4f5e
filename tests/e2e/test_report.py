"""The demo's page: well formed, self-contained, and true to the numbers that it was given."""

from __future__ import annotations

import html.parser
import re

import pytest

from e2e import report, timeline, waterfall

VOID = {"meta"}


def sample(**changes: object) -> report.Report:
    values: dict[str, object] = {
        "image": "demo/<torch>",
        "command": "python3 -c 'print(1 < 2)'",
        "compressed_bytes": 347_000_000,
        "unpacked_bytes": 1_224_000_000,
        "entries": 36_810,
        "bits_per_second": 10**9,
        "machine": {"cpu": "x", "cores": 2, "memory_gib": 24, "kernel": "6.18", "python": "3.11"},
        "pulled": timeline.Start(0, {"mounted": 15.0, "first output": 15.2, "ready": 16.4}, 348_000_000),
        "lazy": timeline.Start(0, {"mounted": 0.3, "first output": 0.5, "ready": 4.1}, 181_000_000),
        "layers": [waterfall.LayerFacts("base", 3, 4_000_000), waterfall.LayerFacts("torch", 200, 9_000_000)],
        "fetches": [
            waterfall.Fetch(0, 2, True, "a read waited for it", 900_000, 0.2, 0.21, 0.3),
            waterfall.Fetch(1, 7, False, "read ahead", 800_000, 0.4, 0.5, 0.6),
            waterfall.Fetch(1, 8, False, "read ahead", 700_000, 0.4, 0.5, 0.7),
        ],
    }
    return report.Report(**{**values, **changes})  # type: ignore[arg-type]


class Balance(html.parser.HTMLParser):
    """Fails on a tag that is closed but was not opened, or the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_balanced_and_complete() -> None:
    page = report.page(sample())
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "$" not in page


def test_the_page_needs_nothing_from_elsewhere() -> None:
    page = report.page(sample())
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", page)


def test_what_others_named_is_escaped() -> None:
    page = report.page(sample())
    assert "demo/&lt;torch&gt;" in page
    assert "1 &lt; 2" in page
    assert "<torch>" not in page


def test_every_fetch_is_a_bar_and_every_block_a_cell() -> None:
    page = report.page(sample())
    assert page.count("<g><title>") == 3
    assert page.count("<title>block ") == 203
    assert page.count("never fetched") == 200
    assert "torch: 2 of 200 blocks, 1.5 of 9.0 MB" in page


@pytest.mark.parametrize("text", ["16.4 s", "4.10 s", "4.0x", "348 MB", "181 MB"])
def test_the_terminal_says_the_figures(text: str) -> None:
    assert text in report.terminal(sample())


def test_a_start_without_fetches_still_makes_a_page() -> None:
    assert "0 of 3 blocks" in report.page(sample(fetches=[]))


@pytest.mark.parametrize("seconds", [0.04, 0.9, 7.0, 61.0, 900.0, 5000.0])
def test_an_axis_has_a_readable_number_of_lines(seconds: float) -> None:
    lines = waterfall.Axis(0, 100, seconds).grid(0, 1, 2).count("<line")
    assert 1 <= lines <= 11


def test_the_document_is_the_same_measurement() -> None:
    document = report.document(sample())
    assert document["ratio"] == 4.0
    assert document["lazy"]["seconds"]["ready"] == 4.1
