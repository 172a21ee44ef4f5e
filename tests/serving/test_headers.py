"""Which header fields a proxy passes on."""

import multidict
from hypothesis import given
from hypothesis import strategies as st

from serving import headers

NAMES = st.text("abcxyz-", min_size=1)


def test_what_is_between_neighbours_stays_there() -> None:
    given_fields = multidict.CIMultiDict(
        [("Connection", "close, X-Mine"), ("x-mine", "1"), ("TE", "trailers"), ("Via", "a"), ("via", "b")]
    )
    assert list(headers.end_to_end(given_fields).items()) == [("Via", "a"), ("via", "b")]
    assert not headers.end_to_end(given_fields, ["via"])


@given(st.lists(NAMES), st.lists(NAMES), st.lists(NAMES))
def test_nothing_that_was_named_gets_through(fields: list[str], named: list[str], without: list[str]) -> None:
    all_fields = [(each, "1") for each in fields] + [("Connection", " ,".join(named))]
    passed = {each.lower() for each in headers.end_to_end(multidict.CIMultiDict(all_fields), without)}
    assert passed == set(fields) - set(named) - set(without) - {"connection", "te"}
