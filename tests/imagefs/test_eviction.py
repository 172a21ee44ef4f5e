from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from imagefs import eviction

entries = st.lists(
    st.builds(
        eviction.Entry,
        digest=st.binary(min_size=2, max_size=2),
        allocated_bytes=st.integers(0, 1000),
        used_at=st.floats(0, 1e9),
    ),
    unique_by=lambda entry: entry.digest,
)


def choose(listing: list[eviction.Entry], pinned: set[bytes], quota: int, free: int = 10**9, floor: int = 0):
    return eviction.choose(listing, pinned, quota_bytes=quota, free_bytes=free, free_floor_bytes=floor)


@given(entries, st.sets(st.binary(min_size=2, max_size=2)), st.integers(0, 5000), st.integers(0, 2000))
def test_enough_goes_oldest_first_and_never_what_is_pinned(
    listing: list[eviction.Entry], pinned: set[bytes], quota: int, floor: int
) -> None:
    choice = choose(listing, pinned, quota, free=1000, floor=floor)
    total = sum(entry.allocated_bytes for entry in listing)
    freed = sum(entry.allocated_bytes for entry in choice.victims)
    assert not {entry.digest for entry in choice.victims} & pinned
    assert total - freed <= quota + choice.short_bytes
    assert 1000 + freed >= floor - choice.short_bytes
    kept = [e for e in listing if e not in choice.victims and e.digest not in pinned]
    assert all(victim.used_at <= entry.used_at for victim in choice.victims for entry in kept)
    if choice.short_bytes:
        assert not kept
    if total <= quota and floor <= 1000:
        assert not choice.victims


def test_forgotten_blocks_go_first() -> None:
    old = eviction.Entry(b"old", 10, 5.0)
    forgotten = eviction.Entry(b"forgotten", 10, eviction.FORGOTTEN)
    assert choose([old, forgotten], set(), quota=15).victims == (forgotten,)
