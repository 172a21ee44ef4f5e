"""What is remembered comes back, and what is damaged is told."""

from __future__ import annotations

import contextlib
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster import connection
from cluster.api import Api
from tests.fixtures.kubernetes_api import KubernetesApi
from warmpool import errors, journal
from warmpool.backoff import Wait
from warmpool.lifecycle import Record, Roster, Tally
from warmpool.observation import NodeState

_times = st.floats(0, 1e10)
_names = st.text(max_size=10)
_records = st.builds(
    Record,
    _names,
    st.sampled_from(NodeState),
    _times,
    st.none() | _times,
    st.none() | _times,
    st.none() | _times,
    st.none() | _times,
)
_kept = st.builds(
    journal.Kept,
    _times,
    st.text(),
    st.builds(
        lambda at, records, tally: Roster(at, records, tally=tally),
        _times,
        st.dictionaries(_names, _records, max_size=5),
        st.builds(
            Tally,
            st.dictionaries(_names, st.integers(0, 1 << 40), max_size=3),
            st.dictionaries(_names, st.integers(0, 1 << 40), max_size=3),
        ),
    ),
    st.dictionaries(_names, st.builds(Wait, st.integers(1, 30), _times, st.text()), max_size=3),
    st.dictionaries(_names, st.integers(0, 1 << 50), max_size=3),
    st.frozensets(_names, max_size=3),
)
_EMPTY = journal.Kept(1.0, "", Roster(), {}, {}, frozenset())


@given(_kept)
def test_everything_comes_back(kept: journal.Kept) -> None:
    assert journal.decode(journal.encode(kept)) == kept


@given(st.binary(max_size=60))
def test_any_bytes_are_our_error(data: bytes) -> None:
    with pytest.raises(errors.InvalidInputError):
        journal.decode(data)


@given(st.data())
def test_any_field_that_is_damaged_is_our_error_or_a_value(data: st.DataObject) -> None:
    document = json.loads(gzip.decompress(journal.encode(data.draw(_kept))))
    key = data.draw(st.sampled_from(sorted(document)))
    document[key] = data.draw(st.none() | st.integers() | st.text() | st.lists(st.integers()))
    with contextlib.suppress(errors.InvalidInputError):
        journal.decode(gzip.compress(json.dumps(document).encode()))


def test_a_bomb_is_not_unpacked() -> None:
    with pytest.raises(errors.InvalidInputError, match="too large"):
        journal.decode(gzip.compress(bytes(65 << 20), compresslevel=1))


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    store = journal.FileStore(tmp_path / "state")
    assert store.read() is None
    for text in (b"first", b"second"):
        store.write(text)
        assert store.read() == text
    assert [each.name for each in tmp_path.iterdir()] == ["state"]
    with pytest.raises(errors.ConfigurationError, match="state_directory"):
        journal.FileStore(tmp_path / "none" / "state").write(b"x")


def test_a_config_map_keeps_it(kubernetes_api: KubernetesApi) -> None:
    store = journal.ConfigMapStore(
        Api(connection.Connection(connection.Where(url=kubernetes_api.url)), "pool"), "state"
    )
    assert store.read() is None
    for number in (1.0, 2.0):
        data = journal.encode(journal.Kept(number, "", Roster(), {}, {}, frozenset()))
        store.write(data)
        read = store.read()
        assert read is not None
        assert journal.decode(read).saved_at == number
    kubernetes_api.refuse("GET", "configmaps", 503, "away")
    with pytest.raises(errors.UnavailableError):
        store.read()
    kubernetes_api.accept()
    kubernetes_api.refuse("PATCH", "configmaps", 403, "no")
    with pytest.raises(errors.ConfigurationError):
        store.write(journal.encode(_EMPTY))
