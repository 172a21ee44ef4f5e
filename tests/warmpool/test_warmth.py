"""What a node should have, and what is done about it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from warmpool import warmth
from warmpool.warmth import Cached, Reading, Verb, Wanted

_WHOLE = Cached(10, 10, True, True, True)

_wanted = st.builds(Wanted, st.sampled_from("abcdef"), st.floats(0.01, 1.0), st.booleans())


def test_best_is_what_is_likely_for_its_size() -> None:
    wanted = [Wanted("big", 0.9, False), Wanted("small", 0.5, False), Wanted("base", 0.1, True)]
    sizes = {"big": 100, "small": 10, "base": 50}
    assert [each.image for each in warmth.choose(wanted, sizes, 1_000)] == ["base", "small", "big"]
    assert [each.image for each in warmth.choose(wanted, sizes, 70)] == ["base", "small"]


def test_what_is_wanted_twice_is_likelier() -> None:
    (both,) = warmth.choose([Wanted("a", 0.5, False), Wanted("a", 0.5, True)], {}, 10)
    assert both == Wanted("a", 0.75, True)


@given(
    st.lists(_wanted, max_size=12),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 100)),
    st.integers(0, 300),
)
def test_what_is_chosen_fits_but_for_what_is_required(
    wanted: list[Wanted], sizes: dict[str, int], disk: int
) -> None:
    chosen = warmth.choose(wanted, sizes, disk)
    names = [each.image for each in chosen]
    assert len(set(names)) == len(names)
    assert {each.image for each in wanted if each.required} <= set(names)
    optional = sum(sizes.get(each.image, 0) for each in chosen if not each.required)
    required = sum(sizes.get(each.image, 0) for each in chosen if each.required)
    assert optional <= max(0, disk - required)
    assert chosen == warmth.choose(list(reversed(wanted)), sizes, disk) or any(
        0 < each.chance < 1 for each in wanted
    )


def test_only_complete_and_pinned_is_warm() -> None:
    chosen = [Wanted("base", 1.0, True), Wanted("maybe", 0.5, False)]
    for cached in (None, Cached(9, 10, False, True, True), Cached(10, 10, True, False, True)):
        assert not warmth.judge(chosen, Reading({"base": cached})).warm
    verdict = warmth.judge(chosen, Reading({"base": _WHOLE, "maybe": None}))
    assert verdict.warm, "what is not required is fetched and not waited for"
    assert [(task.verb, task.image) for task in verdict.tasks] == [
        (Verb.PREFETCH, "maybe"),
        (Verb.PIN, "maybe"),
    ]


def test_a_copy_that_does_not_get_on_says_why() -> None:
    stuck = Cached(1, 10, False, True, True, "no room")
    assert warmth.judge([Wanted("a", 1.0, True)], Reading({"a": stuck})).missing == (
        "a: 1 of 10 bytes: no room",
    )


def test_nothing_is_left_to_do_on_a_node_that_has_all() -> None:
    assert warmth.judge([Wanted("a", 1.0, True)], Reading({"a": _WHOLE})).tasks == ()


def test_what_is_no_longer_wanted_goes_first() -> None:
    reading = Reading({"old": _WHOLE, "gone": None})
    tasks = warmth.judge([Wanted("new", 1.0, True)], reading, unwanted=["old", "gone"]).tasks
    assert [(task.verb, task.image) for task in tasks] == [
        (Verb.UNPIN, "old"),
        (Verb.PREFETCH, "new"),
        (Verb.PIN, "new"),
    ]
