"""The benchmark's page and table: well formed, self-contained, and true to the numbers they were given."""

from __future__ import annotations

import contextlib
import dataclasses
import html.parser
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glowplug.startup import axis, report, result, speed, table
from imagefs import errors

VOID = {"meta"}
FETCHES = (
    result.Fetch(1, 2, True, "a read waited for it", 900_000, 0.2, 0.21, 0.3),
    result.Fetch(2, 7, False, "read ahead", 800_000, 0.4, 0.5, 0.6),
    result.Fetch(2, 8, False, "read ahead", 700_000, 0.4, 0.5, 0.7),
)


def start(ready: float, moved_bytes: int, *fetches: result.Fetch, **changes: object) -> result.Start:
    values: dict[str, object] = {
        "began_ns": 0,
        "seconds": {"mounted": ready / 4, "first output": ready / 2, "ready": ready},
        "moved_bytes": moved_bytes,
        "requests": 7,
        "flow": ((0.0, 0), (ready / 2, moved_bytes // 3), (ready, moved_bytes)),
        "fetches": fetches,
        "waits": len(fetches) if fetches else None,
    }
    return result.Start(**{**values, **changes})  # type: ignore[arg-type]


def sample(**changes: object) -> result.Measurement:
    values: dict[str, object] = {
        "image": "demo/<torch>",
        "command": ("python3", "-c", "print(1 < 2)"),
        "until": "it printed '^ready'",
        "speed": speed.Speed(10**9, 0.05),
        "machine": {"cpu": "x & y", "cores": 2, "memory_gib": 24, "kernel": "6.18", "python": "3.11"},
        "source_bytes": 347_000_000,
        "unpacked_bytes": 1_224_000_000,
        "layers": (
            result.Layer("boot pack", "p", 5, 75_000_000),
            result.Layer("layer 1", "a", 3, 4_000_000),
            result.Layer("layer 2", "b", 200, 9_000_000),
        ),
        "series": (
            result.Series("containerd", "containerd <1.6>", (start(16.4, 348_000_000),) * 2),
            result.Series("blocks", "by blocks", (start(4.1, 181_000_000, *FETCHES),)),
            result.Series("pack", "boot pack", (start(2.0, 80_000_000),) * 3),
            result.Series("warm", "warm", tuple(start(at, 1000) for at in (1.4, 1.5, 9.0))),
            result.Series("local", "unpacked", (start(1.3, 0, seconds={"ready": 1.3}),)),
        ),
    }
    return result.Measurement(**{**values, **changes})  # type: ignore[arg-type]


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


@pytest.mark.parametrize("count", [1, 2])
def test_the_page_is_balanced_and_complete(count: int) -> None:
    page = report.page([sample()] * count)
    balance = Balance()
    balance.feed(page)
    assert balance.open == []
    assert "$" not in page
    assert page.count("<article>") == count


def test_the_headline_is_against_the_faster_pull() -> None:
    measured = sample()
    faster = sample(series=(*measured.series, result.Series("tuned", "2.1", (start(6.0, 350_000_000),))))
    assert "8.2 times sooner ready" in report.page([measured])
    assert "3.0 times sooner ready" in report.page([faster])
    assert "3.0 to 8.2 times sooner ready" in report.page([measured, faster])


def test_the_page_needs_nothing_from_elsewhere() -> None:
    assert not re.search(r"(?:src|href)=|url\(|@import|<script", report.page([sample()]))


def test_what_others_named_is_escaped() -> None:
    page = report.page([sample()])
    for text in ("demo/&lt;torch&gt;", "1 &lt; 2", "containerd &lt;1.6&gt;", "x &amp; y"):
        assert text in page
    assert "<torch>" not in page
    assert "<1.6>" not in page


def test_every_fetch_is_a_bar_and_every_block_a_cell() -> None:
    page = report.page([sample()])
    assert page.count("<g><title>") == 3
    assert page.count("<title>block ") == 208
    assert page.count("never fetched") == 205
    assert "layer 2: 2 of 200 blocks, 1.5 of 9.0 MB" in page


def test_a_start_without_fetches_has_no_waterfall() -> None:
    series = tuple(each for each in sample().series if each.mode != "blocks")
    assert "<details" not in report.page([sample(series=series)])


def test_the_limit_is_the_links_time_and_a_warm_start() -> None:
    measured = sample()
    limits = {series.mode: measured.limit_seconds(series) for series in measured.series}
    assert limits["pack"] == pytest.approx(80e6 * 8 / 1e9 + 1.5)
    assert limits["warm"] is limits["local"] is None
    without = sample(series=tuple(each for each in measured.series if each.mode != "warm"))
    assert all(without.limit_seconds(series) is None for series in without.series)


def test_the_median_start_is_the_one_that_is_drawn() -> None:
    warm = sample().of("warm")
    assert warm is not None
    assert warm.typical.ready_seconds == warm.ready_seconds == 1.5
    assert warm.spread == (1.4, 9.0)


def test_a_mark_that_was_not_seen_has_no_median() -> None:
    assert (
        result.Series("local", "", (start(1.0, 0), start(1.0, 0, seconds={"ready": 1.0}))).median("mounted")
        is None
    )


@pytest.mark.parametrize(
    "text",
    ["16.4 s", "4.10 s", "348 MB", "181 MB", "1 Gbit/s + 50 ms", "1.40 to 9.00", "8.2 times sooner"],
)
def test_the_table_says_the_figures(text: str) -> None:
    assert text in table.text(sample())


def test_a_lazy_start_that_is_slower_is_called_so() -> None:
    slow = result.Series("blocks", "by blocks", (start(32.8, 1_000_000),))
    assert "by blocks: 2.0 times later than containerd" in table.text(
        sample(series=(*sample().series[:1], slow))
    )


def test_the_document_is_the_same_measurement() -> None:
    document = json.loads(json.dumps(sample().document()))
    pack = next(series for series in document["series"] if series["mode"] == "pack")
    assert pack["median_seconds"]["ready"] == 2.0
    assert pack["limit_seconds"] == pytest.approx(2.14)
    assert len(pack["starts"]) == 3
    assert document["layers"][0] == dataclasses.asdict(sample().layers[0])


@given(st.floats(min_value=1e-6, max_value=1e12), st.integers(1, 20))
def test_steps_are_few_and_not_fewer_than_needed(span: float, most: int) -> None:
    step = axis.round_step(span, most)
    assert span / step <= most * (1 + 1e-9)
    assert span / step > most / 2.5 * (1 - 1e-9)


@pytest.mark.parametrize(
    ("text", "bits"), [("1gbit", 10**9), ("2.5Gbit", 2_500_000_000), ("100 mbit", 10**8), ("800bit", 800)]
)
def test_rates(text: str, bits: int) -> None:
    assert speed.parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "1", "fast", "1gbps", "-1gbit", "0gbit", "1e9bit", "nanbit", "٣gbit"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(errors.InvalidInputError, match="not a rate"):
        speed.parse_rate(text)


@given(st.text())
def test_any_text_is_a_rate_or_an_error_of_ours(text: str) -> None:
    with contextlib.suppress(errors.InvalidInputError):
        assert speed.parse_rate(text) > 0


def test_speeds_read_as_they_were_given() -> None:
    assert str(speed.Speed(10**9)) == "1 Gbit/s"
    assert str(speed.Speed(10**8, 0.05)) == "100 Mbit/s + 50 ms"
