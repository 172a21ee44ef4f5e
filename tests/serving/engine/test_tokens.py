"""What requests ask for, and what answers say that they cost, whatever their bytes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.engine import tokens
from serving.engine.tokens import Meter, Terms, Usage

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
_USAGE = st.dictionaries(
    st.sampled_from(
        ["prompt_tokens", "completion_tokens", "input_tokens", "output_tokens", "prompt_tokens_details"]
    ),
    st.integers(-5, 1 << 50) | _JSON,
)


def read(path: str, terms: Terms, **document: Any) -> tuple[tokens.Reading, dict[str, Any]]:
    reading = tokens.read(path, json.dumps(document).encode(), terms, measure=True)
    return reading, json.loads(reading.body)


def test_text_is_measured_in_bytes_and_numbers_in_tokens() -> None:
    reading, _ = read(COMPLETIONS, Terms(), prompt=[5, 6, 7], max_tokens=4)
    assert (reading.input_tokens, reading.input_bytes, reading.output_tokens) == (3, 0, 4)
    content = [
        {"type": "text", "text": "grüße"},
        {"type": "image_url", "image_url": {"url": "data:" + "x" * 999}},
    ]
    reading, _ = read(CHAT, Terms(), messages=[{"role": "user", "content": content}])
    assert reading.input_bytes == len("user" + "text" + "grüße" + "image_url") + 2
    assert reading.output_tokens is None


@pytest.mark.parametrize("asked", [9_000, "9000", 9e3, "NaN", "1e400", [], True + 8_999, " 9_000 "])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "max_output_tokens"])
def test_no_spelling_gets_a_longer_answer_than_the_terms_allow(field: str, asked: Any) -> None:
    reading, passed = read(CHAT, Terms(output_tokens=100), **{field: asked})
    assert passed[field] == 100
    assert reading.output_tokens == 100


def test_who_names_no_bound_gets_the_terms_and_who_asks_for_less_gets_less() -> None:
    assert read(CHAT, Terms(output_tokens=100))[1]["max_completion_tokens"] == 100
    assert read("/v1/responses", Terms(output_tokens=100), input="x")[1]["max_output_tokens"] == 100
    reading, passed = read(COMPLETIONS, Terms(output_tokens=100), prompt=["a", "b"], n=3, max_tokens=7)
    assert passed["max_tokens"] == 7
    assert reading.output_tokens == 42


@pytest.mark.parametrize(
    ("allowed", "asked", "gets"),
    [(0, -5, 0), (0, 5, 5), (-3, -5, -3), (-3, None, -3), (5, None, 5), (5, 0, 5), (0, "-9", 0), (0, [], 0)],
)
def test_nobody_outranks_what_the_key_allows(allowed: int, asked: Any, gets: int) -> None:
    given_ = {} if asked is None else {"priority": asked}
    assert read(CHAT, Terms(priority=allowed), **given_)[1]["priority"] == gets


@pytest.mark.parametrize(
    "body", [b'{"priority":-1}', b'{"\\u0070riority":-1}', '{"priority":-1}'.encode("utf-16")]
)
def test_a_priority_is_seen_however_it_is_spelt(body: bytes) -> None:
    assert tokens.names_priority(body)
    assert json.loads(tokens.read(CHAT, body, Terms(0), measure=False).body)["priority"] == 0


def test_what_is_within_its_terms_is_passed_on_byte_for_byte() -> None:
    body = b' { "prompt" : "x", "max_tokens": 3,  "priority": 2, "temperature": 1e-1 } '
    assert tokens.read(COMPLETIONS, body, Terms(0, 5), measure=True).body == body
    assert not tokens.names_priority(b'{"prompt":"x"}')


@given(
    body=st.binary() | _JSON.map(lambda value: json.dumps(value).encode()),
    most=st.none() | st.integers(1, 50),
)
@example(b"[" * 100_000, 5)
@example(b'{"max_tokens": ' + b"9" * 5_000 + b"}", 5)
def test_any_body_can_be_read(body: bytes, most: int | None) -> None:
    reading = tokens.read(CHAT, body, Terms(output_tokens=most), measure=True)
    assert reading.input_tokens >= 0
    assert reading.input_bytes >= 0
    assert reading.output_tokens is None or reading.output_tokens >= 0


@given(
    document=st.dictionaries(
        st.sampled_from(["max_tokens", "max_completion_tokens", "priority", "n", "stream", "prompt"]), _JSON
    ),
    priority=st.integers(-9, 9),
)
def test_the_terms_hold_for_any_document(document: dict[str, Any], priority: int) -> None:
    _, passed = read(CHAT, Terms(priority, 10), **document)
    assert passed.get("priority", 0) >= priority
    for field in ("max_tokens", "max_completion_tokens"):
        assert passed.get(field) is None or 0 <= passed[field] <= 10
    assert any(passed.get(field) is not None for field in ("max_tokens", "max_completion_tokens"))


# -- answers -----------------------------------------------------------------------------------------


def chunk(usage: Any = None, **more: Any) -> bytes:
    return json.dumps({"choices": [{"text": "x"}], **({"usage": usage} if usage else {}), **more}).encode()


LAST = chunk(
    {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 4}}, choices=[]
)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r"])
@given(data=st.data())
def test_a_stream_is_read_wherever_it_is_cut(end: bytes, data: st.DataObject) -> None:
    shown = b"".join(b"data: " + each + end for each in (chunk(), chunk(), chunk()))
    done = b": a comment" + end + b"data: [DONE]" + end
    whole = shown + b"data: " + LAST + end + done
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)))))
    for added, wanted in ((False, whole), (True, shown + done)):
        meter = Meter("text/event-stream; charset=utf-8", usage_added=added)
        pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
        passed = b"".join(map(meter.feed, pieces)) + meter.end()
        assert passed.replace(end, b"|") == wanted.replace(end, b"|")
        assert meter.usage == Usage(7, 3, 4)
        assert meter.events == 3


@given(
    pieces=st.lists(st.binary() | st.sampled_from([b"data: {", b'"usage":', b"\r", b"\n", b"}\n\n"])),
    added=st.booleans(),
)
def test_a_stream_of_anything_is_passed_on_whole(pieces: list[bytes], added: bool) -> None:
    meter = Meter("text/event-stream", usage_added=added)
    assert b"".join(map(meter.feed, pieces)) + meter.end() == b"".join(pieces)


def test_an_event_without_an_end_is_not_kept_for_ever() -> None:
    meter = Meter("text/event-stream", usage_added=True)
    piece = b"data: " + bytes(1 << 16)
    passed = sum(len(meter.feed(piece)) for _ in range(64))
    assert passed > 40 * len(piece)
    assert passed + len(meter.end()) == 64 * len(piece)


def test_a_stream_that_was_cut_off_has_cost_its_events() -> None:
    meter = Meter("text/event-stream")
    meter.feed(b"data: " + chunk() + b"\n\ndata: " + chunk() + b"\n\ndata: {")
    meter.end()
    assert (meter.events, meter.usage) == (3, None)


@given(found=_USAGE, cut=st.integers(0, 60))
def test_usage_is_numbers_or_nothing(found: dict[str, Any], cut: int) -> None:
    body = json.dumps({"usage": found}).encode()
    meter = Meter("application/json")
    assert meter.feed(body[:cut]) + meter.feed(body[cut:]) == body
    meter.end()
    if meter.usage is not None:
        assert meter.usage.input >= meter.usage.cached >= 0
        assert meter.usage.output >= 0


def test_usage_in_the_words_of_other_apis() -> None:
    responses = {"type": "response.completed", "response": {"usage": {"input_tokens": 5, "output_tokens": 2}}}
    assert tokens.usage(responses) == Usage(5, 2)
    messages = {"type": "message_delta", "usage": {"output_tokens": 9, "cache_read_input_tokens": 3}}
    assert tokens.usage(messages) == Usage(0, 9, 0)
    assert tokens.usage({"usage": {"prompt_tokens": True}}) is None


def test_an_answer_too_long_to_keep_is_passed_on_and_measured() -> None:
    meter = Meter("application/json")
    piece = bytes(1 << 20)
    assert all(meter.feed(piece) == piece for _ in range(20))
    assert meter.end() == b""
    assert (meter.bytes, meter.usage) == (20 << 20, None)
