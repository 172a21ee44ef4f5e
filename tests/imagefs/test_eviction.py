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


def choose(
    listing: list[eviction.Entry],
    pinned: set[bytes],
    quota: int,
    free: int = 10**9,
    floor: int = 0,
    in_use: set[bytes] = frozenset(),  # type: ignore[assignment]
) -> eviction.Choice:
    return eviction.choose(listing, pinned, lambda: in_use, eviction.Space(quota, free, floor))


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


def test_what_no_image_in_use_has_goes_first() -> None:
    old = eviction.Entry(b"old, in use", 10, 5.0)
    new = eviction.Entry(b"new, of a removed image", 10, 6.0)
    newer = eviction.Entry(b"newer, of a removed image", 10, 7.0)
    assert choose([newer, old, new], set(), quota=25, in_use={old.digest}).victims == (new,)
    assert choose([newer, old, new], set(), quota=5, in_use={old.digest}).victims == (new, newer, old)


@given(entries, st.sets(st.binary(min_size=2, max_size=2)), st.integers(0, 5000), st.integers(-2000, 2000))
def test_a_copy_that_keeps_to_its_room_makes_nothing_go_that_is_in_use(
    listing: list[eviction.Entry], in_use: set[bytes], quota: int, above_floor: int
) -> None:
    used = sum(entry.allocated_bytes for entry in listing)
    kept = sum(entry.allocated_bytes for entry in listing if entry.digest in in_use)
    room = eviction.copy_room_bytes(kept, used, eviction.Space(quota, 3000 + above_floor, 3000))
    if room <= 0:
        return
    copy = eviction.Entry(b"the copied block", room, 1e10)
    after = eviction.Space(quota, 3000 + above_floor - room, 3000)
    choice = eviction.choose([*listing, copy], set(), lambda: {*in_use, copy.digest}, after)
    assert not {entry.digest for entry in choice.victims} & {*in_use, copy.digest}
    assert not choice.short_bytes
