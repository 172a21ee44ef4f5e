"""Rendezvous hashing: agreed, balanced, and calm when members come and go."""

from __future__ import annotations

import collections
import hashlib

from hypothesis import given
from hypothesis import strategies as st

from imagefs import rendezvous

KEYS = [hashlib.sha256(str(number).encode()).digest() for number in range(4000)]
MEMBERS = st.lists(st.text(min_size=1, max_size=90), min_size=1, max_size=12, unique=True)


@given(members=MEMBERS, key=st.binary(max_size=64), data=st.data())
def test_everybody_agrees_whatever_the_order(members: list[str], key: bytes, data: st.DataObject) -> None:
    shuffled = data.draw(st.permutations(members))
    assert rendezvous.home(key, members) == rendezvous.home(key, shuffled)
    assert rendezvous.home(key, members) in members


@given(members=MEMBERS, data=st.data())
def test_a_member_that_leaves_moves_its_own_keys_only(members: list[str], data: st.DataObject) -> None:
    leaving = data.draw(st.sampled_from(members))
    left = [member for member in members if member != leaving]
    for key in KEYS[:50]:
        before, after = rendezvous.home(key, members), rendezvous.home(key, left)
        assert after == before or before == leaving


def test_nobody_is_home_where_nobody_is() -> None:
    assert rendezvous.home(b"key", []) is None


def test_shares_are_even() -> None:
    members = [f"10.0.0.{number}:7311" for number in range(8)]
    counts = collections.Counter(rendezvous.home(key, members) for key in KEYS)
    # The standard deviation is 21: six of them are 25 % of a share.
    assert all(abs(counts[member] - len(KEYS) / 8) < 125 for member in members), counts


def test_keys_of_a_member_that_left_go_evenly_to_the_others() -> None:
    members = [f"10.0.0.{number}:7311" for number in range(8)]
    orphans = [key for key in KEYS if rendezvous.home(key, members) == members[3]]
    counts = collections.Counter(
        rendezvous.home(key, [member for member in members if member != members[3]]) for key in orphans
    )
    assert len(counts) == 7
    assert max(counts.values()) < 2 * len(orphans) / 7


def test_the_hash_stays_what_it_is() -> None:
    """Nodes of two versions must agree during an upgrade."""
    members = ["node-a:7311", "node-b:7311", "node-c:7311", "x" * 80 + ":1"]
    homes = [members.index(str(rendezvous.home(key, members))) for key in KEYS[:16]]
    assert homes == [1, 2, 3, 2, 3, 3, 3, 0, 3, 3, 3, 2, 1, 1, 2, 3]
