"""Starts, on a scripted clock: what belongs to one, when it is over, what it says."""

from __future__ import annotations

from agent import starts
from tests.agent.outside_world import MAPS, REFERENCE, event

_NS = 1_000_000_000


class _Clock:
    seconds = 100.0

    def ns(self) -> int:
        return int(self.seconds * _NS)


def _made() -> tuple[starts.Starts, _Clock, list[starts.Settled]]:
    clock = _Clock()
    made = starts.Starts(settle_seconds=10, clock_ns=clock.ns, wall_clock=lambda: 1000.0 + clock.seconds)
    made.layers_of = lambda reference: MAPS if reference == REFERENCE else ()
    settled: list[starts.Settled] = []
    made.on_settled = settled.append
    return made, clock, settled


def _pull(made: starts.Starts, clock: _Clock) -> None:
    """From 100.0: lookup until 100.2, metadata until 100.5, pulled."""
    clock.seconds = 100.2
    made.on_phase(REFERENCE, "lookup", 0.2)
    clock.seconds = 100.5
    made.on_phase(REFERENCE, "metadata", 0.3)
    made.on_pull(REFERENCE, lazy=True, seconds=0.5, layers=3, reason=None)


def test_a_start_from_its_pull_to_its_last_miss() -> None:
    made, clock, settled = _made()
    _pull(made, clock)
    assert not made.running()
    assert made.to_json()[0]["state"] == "pulled"
    clock.seconds = 101.0
    made.on_phase(REFERENCE, "mount", 0.5)
    assert made.running()
    made.absorb(
        [
            event(1, 100.3, 100.4),  # metadata, before the mount
            event(2, 101.5, 101.6),
            event(3, 101.6, 102.5, layer=2),
            event(4, 101.6, 104.0, priority="read_ahead"),
            event(5, 102.6, 102.6, outcome="cache"),
            event(6, 102.7, 102.8, layer=1, outcome="peer", size=0),
        ]
    )
    clock.seconds = 112.7
    made.absorb([])
    assert made.running()
    clock.seconds = 112.9
    made.absorb([])
    assert not made.running()
    (summary,) = settled
    assert summary.total_seconds == 2.8
    assert summary.misses == 4
    assert {name: round(value, 6) for name, value in summary.phases.items()} == {
        "first_read": 0.5,
        "reads": 1.3,
    }
    (view,) = made.to_json()
    assert view["state"] == "settled"
    assert view["at_seconds"] == 1100.0
    assert [phase["phase"] for phase in view["phases"]] == [
        "lookup", "metadata", "mount", "first_read", "reads",
    ]  # fmt: skip
    assert [bar["layer"] for bar in view["bars"]] == [0, 0, 2, 0, 1]
    assert view["fetched_bytes"] == 4 << 20
    assert view["hits"] == 1
    assert made.misses() == {"start": 4, "running": 0}


def test_the_wait_between_pull_and_mount_is_left_out_of_the_timeline() -> None:
    made, clock, _ = _made()
    _pull(made, clock)
    clock.seconds = 3700.5
    made.on_phase(REFERENCE, "mount", 0.1)
    made.absorb([event(1, 3700.7, 3700.9)])
    (view,) = made.to_json()
    assert view["waited_seconds"] == 3599.9
    assert view["total_seconds"] == 1.0
    mount = next(phase for phase in view["phases"] if phase["phase"] == "mount")
    assert (mount["begin"], mount["end"]) == (0.5, 0.6)


def test_a_miss_after_the_start_is_one_of_a_running_container() -> None:
    made, clock, settled = _made()
    _pull(made, clock)
    made.on_phase(REFERENCE, "mount", 0.0)
    clock.seconds = 200.0
    made.absorb([])
    assert len(settled) == 1
    made.absorb([event(9, 201.0, 201.1), event(10, 201.2, 201.3, priority="fill")])
    assert made.misses() == {"start": 0, "running": 1}
    assert made.to_json()[0]["misses"] == 0


def test_an_ordinary_pull_waits_for_nothing() -> None:
    made, _, settled = _made()
    made.on_pull("other", lazy=False, seconds=0.1, layers=0, reason="no block image")
    made.absorb([])
    assert not made.running()
    assert settled == []
    (view,) = made.to_json()
    assert (view["state"], view["reason"]) == ("ordinary", "no block image")


def test_two_starts_of_one_image_are_two_and_layers_mounted_one_by_one_are_one() -> None:
    made, clock, settled = _made()
    for _ in range(3):
        clock.seconds += 0.1
        made.on_phase(REFERENCE, "mount", 0.1)
    (view,) = made.to_json()
    assert view["phases"] == [{"phase": "mount", "begin": 0.0, "end": 0.3, "count": 3}]
    clock.seconds = 200.0
    made.absorb([])
    made.on_phase(REFERENCE, "mount", 0.1)
    assert [view["number"] for view in made.to_json()] == [2, 1]
    assert len(settled) == 1


def test_a_failed_read_is_no_miss_and_unknown_layers_are_nobody_s_start() -> None:
    made, clock, _ = _made()
    _pull(made, clock)
    made.on_phase(REFERENCE, "mount", 0.0)
    stranger = {**event(2, 101.0, 101.1), "map_digest": "sha256:" + "f" * 64}
    made.absorb([event(1, 101.0, 101.1, outcome="failed"), stranger])
    assert made.misses() == {"start": 0, "running": 1}
    assert made.to_json()[0]["misses"] == 0


def test_what_is_kept_is_bounded() -> None:
    made, clock, _ = _made()
    _pull(made, clock)
    made.on_phase(REFERENCE, "mount", 0.0)
    made.absorb([event(number, 101.0, 101.1) for number in range(1, 1001)])
    (view,) = made.to_json()
    assert len(view["bars"]) + view["bars_left_out"] == 1000
    assert view["misses"] == 1000
    for number in range(100):
        made.on_pull(f"r{number}", lazy=False, seconds=0, layers=0, reason="x")
    assert len(made.to_json()) < 50


def test_events_are_fed_once_a_start_runs() -> None:
    made, clock, _ = _made()
    woken: list[bool] = []
    made.on_running = lambda: woken.append(made.running())
    _pull(made, clock)
    assert woken == []
    made.on_phase(REFERENCE, "mount", 0.0)
    assert woken == [True]


def test_who_reads_on_and_on_is_at_work_after_ten_minutes() -> None:
    made, clock, settled = _made()
    _pull(made, clock)
    made.on_phase(REFERENCE, "mount", 0.0)
    for step in range(1, 130):
        clock.seconds = 100.5 + 5 * step
        made.absorb([event(step, clock.seconds - 0.2, clock.seconds - 0.1)])
    assert len(settled) == 1
    assert not made.running()
    assert made.misses() == {"start": 121, "running": 8}


def test_a_pull_of_an_image_that_runs_already_does_not_claim_its_reads() -> None:
    made, clock, _ = _made()
    _pull(made, clock)
    made.absorb([event(1, 100.3, 100.4), event(2, 101.0, 101.1)])
    assert made.misses() == {"start": 1, "running": 1}
    clock.seconds = 200.0
    made.on_phase(REFERENCE, "mount", 1.0)
    made.absorb([event(3, 198.0, 199.5), event(4, 199.2, 199.3), event(5, 201.0, 201.1)])
    assert made.misses() == {"start": 3, "running": 2}
    assert [bar["block"] for bar in made.to_json()[0]["bars"]] == [1, 4, 5]
