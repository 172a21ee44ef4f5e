"""What registries send in header fields, and the delays that follow from it: parsers and policy, pure."""

from __future__ import annotations

import email.utils
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imagefs.origin import headers, retry

TOKEN = st.text(string.ascii_letters + string.digits + "-_.", min_size=1, max_size=12)
VALUE = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=30)


def quoted(value: str) -> str:
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


class TestChallenges:
    def test_bearer(self) -> None:
        field = (
            'Bearer realm="https://auth.example/token?a=b,c",service="registry", scope="repository:a/b:pull"'
        )
        [challenge] = headers.challenges([field])
        assert challenge.scheme == "bearer"
        assert challenge.parameters == {
            "realm": "https://auth.example/token?a=b,c",
            "service": "registry",
            "scope": "repository:a/b:pull",
        }

    def test_several_in_one_field_and_in_two(self) -> None:
        fields = ['Negotiate, Basic realm="a\\"b", Bearer realm=x', "basic"]
        found = headers.challenges(fields)
        assert [c.scheme for c in found] == ["negotiate", "basic", "bearer", "basic"]
        assert found[1].parameters == {"realm": 'a"b'}

    def test_token68(self) -> None:
        found = headers.challenges(["Negotiate YII0123/+==, Basic realm=r"])
        assert [c.scheme for c in found] == ["negotiate", "basic"]

    @given(st.lists(st.tuples(TOKEN, st.dictionaries(TOKEN.map(str.lower), VALUE, min_size=1, max_size=4))))
    def test_written_and_parsed(self, wanted: list[tuple[str, dict[str, str]]]) -> None:
        field = ", ".join(
            f"{scheme} " + ", ".join(f"{name}={quoted(value)}" for name, value in parameters.items())
            for scheme, parameters in wanted
        )
        found = headers.challenges([field])
        assert [(c.scheme, dict(c.parameters)) for c in found] == [(s.lower(), p) for s, p in wanted]

    @given(st.lists(st.text(max_size=200), max_size=3))
    def test_anything_is_parsed_or_left(self, fields: list[str]) -> None:
        for challenge in headers.challenges(fields):
            assert challenge.scheme == challenge.scheme.lower()

    def test_no_quadratic_time(self) -> None:
        # Each would take minutes if the pattern went back over what it had matched.
        for field in ('a="' * 200_000, "a=" + "\\" * 200_000, ", " * 200_000, "x" * 200_000, '"' * 200_000):
            headers.challenges([field])
            headers.next_link([field, "<" * 100_000, "<a>" + ";a" * 100_000])


class TestLink:
    @pytest.mark.parametrize(
        ("fields", "target"),
        [
            (['</v2/a/referrers/x?last=1>; rel="next"'], "/v2/a/referrers/x?last=1"),
            (['<a>; rel=prev, <b>; title="x, <y>; rel=next"; rel=next'], "b"),
            (["<a>; rel=prev", "<b>;rel=next"], "b"),
            (['<a>; rel="first next"'], "a"),
            (["<a>; rel=nextish"], None),
            (["a; rel=next"], None),
            ([], None),
        ],
    )
    def test_known(self, fields: list[str], target: str | None) -> None:
        assert headers.next_link(fields) == target

    @given(st.lists(st.text(max_size=100), max_size=3))
    def test_anything(self, fields: list[str]) -> None:
        headers.next_link(fields)


class TestRanges:
    @given(st.integers(0, 10**18), st.integers(1, 10**6), st.integers(0, 10**6))
    def test_content_range(self, first: int, length: int, rest: int) -> None:
        last, total = first + length - 1, first + length + rest
        found = headers.content_range(f"bytes {first}-{last}/{total}")
        assert found == headers.ContentRange(first, last, total)
        assert headers.content_range(f"Bytes {first}-{last}/*") == headers.ContentRange(first, last, None)

    @pytest.mark.parametrize(
        "field",
        [None, "", "bytes 5-4/10", "bytes 0-10/10", "bytes */10", "items 0-1/2", "bytes 0-1", "bytes -1-2/3"],
    )
    def test_no_content_range(self, field: str | None) -> None:
        assert headers.content_range(field) is None

    @given(st.text(max_size=60))
    def test_anything(self, field: str) -> None:
        headers.content_range(field)
        offset = headers.upload_offset(field)
        assert offset is None or offset >= 0
        length = headers.content_length(field)
        assert length is None or length >= 0
        delay = headers.retry_after_seconds(field, 1e9)
        assert delay is None or delay >= 0

    @pytest.mark.parametrize(
        ("field", "offset"),
        [("0-0", 0), ("0-1023", 1024), ("bytes=0-9", 10), ("5-9", None), ("x", None), (None, None)],
    )
    def test_upload_offset(self, field: str | None, offset: int | None) -> None:
        assert headers.upload_offset(field) == offset


class TestRetryAfter:
    @given(st.integers(0, 10**6))
    def test_seconds(self, seconds: int) -> None:
        assert headers.retry_after_seconds(str(seconds), 0.0) == seconds

    @given(st.integers(0, 2**32), st.integers(-1000, 1000))
    def test_date(self, now: int, ahead: int) -> None:
        date = email.utils.formatdate(now + ahead, usegmt=True)
        assert headers.retry_after_seconds(date, now) == max(0, ahead)

    @pytest.mark.parametrize("field", [None, "", "soon", "-5", "Mon, 99 Foo 2020", "1e9"])
    def test_nothing(self, field: str | None) -> None:
        assert headers.retry_after_seconds(field, 0.0) is None


POLICIES = st.builds(
    retry.Policy,
    attempts=st.integers(1, 10),
    first_delay_seconds=st.floats(0.001, 1),
    max_delay_seconds=st.floats(1, 60),
    max_retry_after_seconds=st.floats(1, 600),
)
UNIT = st.floats(0, 1, exclude_max=True)


class TestDelay:
    @given(POLICIES, st.integers(1, 10_000), UNIT)
    def test_backoff_is_bounded_and_spread(self, policy: retry.Policy, failures: int, unit: float) -> None:
        low = retry.delay_for(policy, failures, None, 0.0)
        delay = retry.delay_for(policy, failures, None, unit)
        assert 0 < low <= delay <= 2 * low
        assert delay <= policy.max_delay_seconds
        assert low <= retry.delay_for(policy, failures + 1, None, 0.0)

    @given(POLICIES, st.integers(1, 10), st.floats(-10, 1e9), UNIT)
    def test_retry_after_is_honoured_and_bounded(
        self, policy: retry.Policy, failures: int, asked: float, unit: float
    ) -> None:
        delay = retry.delay_for(policy, failures, asked, unit)
        assert delay >= min(asked, policy.max_retry_after_seconds)
        assert delay <= max(policy.max_delay_seconds, 1.1 * policy.max_retry_after_seconds)
